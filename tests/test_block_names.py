"""Blocks under the engine's names and under ours."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.block_names import BlockChanges, BlockNames
from cluster.prefix_hash import SPAN_TOKENS, chain_hashes, span_tokens

BLOCK = SPAN_TOKENS
TOKENS = list(range(3 * BLOCK))


def test_blocks_get_the_names_that_their_tokens_give() -> None:
    names = BlockNames()
    expected = list(chain_hashes(TOKENS, BLOCK))
    assert list(names.stored(["a", "b"], None, TOKENS[: 2 * BLOCK], BLOCK)) == expected[:2]
    assert list(names.stored(["c"], "b", TOKENS[2 * BLOCK :], BLOCK)) == expected[2:]
    assert list(names.removed(["b", "never seen"])) == [expected[1]]
    assert len(names) == 2


def test_small_blocks_are_named_together_and_gone_with_their_last() -> None:
    size = SPAN_TOKENS // 4
    names = BlockNames()
    expected = list(chain_hashes(TOKENS, SPAN_TOKENS))
    first = list(names.stored(range(3), None, TOKENS[: 3 * size], size))
    then = list(names.stored(range(3, 9), 2, TOKENS[3 * size : 9 * size], size))
    assert (first, then) == ([], expected[:2])
    assert list(names.removed([8, 6])) == []  # of a third one that was never whole; and in the middle
    assert list(names.removed([7])) == [expected[1]]
    assert list(names.stored([6, 7], 5, TOKENS[6 * size : 8 * size], size)) == [expected[1]]
    # The same tokens may go on in another way.
    other = [*TOKENS[4 * size : 7 * size], *[7] * size]
    assert (
        list(names.stored([20, 21, 22, 23], 3, other, size))
        == list(chain_hashes([*TOKENS[: 4 * size], *other], SPAN_TOKENS))[1:]
    )


def test_spans_are_whole_blocks() -> None:
    assert [span_tokens(size) for size in (16, 48, 128, 256)] == [128, 96, 128, 256]


def test_what_is_stored_again_is_no_news_and_what_follows_it_is() -> None:
    names = BlockNames()
    expected = list(chain_hashes(TOKENS, BLOCK))
    list(names.stored(["a", "b"], None, TOKENS[: 2 * BLOCK], BLOCK))
    assert list(names.stored(["a", "b", "c"], None, TOKENS, BLOCK)) == expected[2:]


def test_what_follows_an_unknown_block_has_no_name() -> None:
    names = BlockNames()
    assert list(names.stored(["b"], "a", TOKENS[:BLOCK], BLOCK)) == []
    assert list(names.removed(["b"])) == []
    list(names.stored(["a"], None, TOKENS[:BLOCK], BLOCK))
    names.clear()
    assert len(names) == 0


@given(st.lists(st.tuples(st.sampled_from(["stored", "removed", "clear", "take"]), st.integers(0, 5))))
def test_whoever_is_told_all_changes_knows_what_is_there(asked: list[tuple[str, int]]) -> None:
    changes = BlockChanges()
    there: set[int] = set()
    told: set[int] = set()

    def tell() -> None:
        message = changes.take()
        if message.cleared:
            told.clear()
        told.difference_update(message.removed)
        told.update(message.stored)
        assert not changes

    for what, name in asked:
        if what == "stored":
            changes.stored([name])
            there.add(name)
        elif what == "removed":
            changes.removed([name])
            there.discard(name)
        elif what == "clear":
            changes.clear()
            there.clear()
        else:
            tell()
    tell()
    assert told == there
