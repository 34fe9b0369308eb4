from __future__ import annotations

from cluster.handle import handle_of, keep_for_reader

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
