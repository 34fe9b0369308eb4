from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.handle import handle_of, keep_for_reader, readable_tokens
from kv_transfer.blocks import blocks_for, surplus_blocks

PARAMS = {
    "do_remote_prefill": True,
    "remote_block_ids": [[1, 2]],
    "remote_request_id": "r~1",
    "remote_num_tokens": 20,
}


def test_a_handle_is_read_from_what_the_engine_says() -> None:
    handle = handle_of(PARAMS)
    assert handle is not None
    assert (handle.request_id, handle.tokens) == ("r~1", 20)


def test_no_handle_where_nothing_is_kept() -> None:
    assert handle_of(None) is None
    assert handle_of({**PARAMS, "remote_block_ids": []}) is None
    assert handle_of(keep_for_reader()) is None


@given(prompt=st.integers(1, 5000), first=st.booleans(), block=st.sampled_from([16, 32, 128]))
def test_reader_and_source_end_on_the_same_block(prompt: int, first: bool, block: int) -> None:
    """The reader's prompt is the source's, with or without the first token."""
    held = prompt
    wanted = readable_tokens(held, prompt + first)
    assert wanted == (prompt if first else prompt - 1)
    surplus = surplus_blocks(held, wanted, block)
    assert surplus in (0, 1)
    assert blocks_for(held, block) - surplus == blocks_for(wanted, block)
