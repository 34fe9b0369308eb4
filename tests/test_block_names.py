"""Blocks under the engine's names and under ours."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.block_names import BlockChanges, BlockNames
from cluster.prefix_hash import chain_hashes

BLOCK = 2
TOKENS = [1, 2, 3, 4, 5, 6]


def test_blocks_get_the_names_that_their_tokens_give() -> None:
    names = BlockNames()
    expected = list(chain_hashes(TOKENS, BLOCK))
    assert list(names.stored(["a", "b"], None, TOKENS[:4], BLOCK)) == expected[:2]
    assert list(names.stored(["c"], "b", TOKENS[4:], BLOCK)) == expected[2:]
    assert list(names.removed(["b", "never seen"])) == [expected[1]]
    assert len(names) == 2


def test_what_is_stored_again_is_no_news_and_what_follows_it_is() -> None:
    names = BlockNames()
    expected = list(chain_hashes(TOKENS, BLOCK))
    list(names.stored(["a", "b"], None, TOKENS[:4], BLOCK))
    assert list(names.stored(["a", "b", "c"], None, TOKENS, BLOCK)) == expected[2:]


def test_what_follows_an_unknown_block_has_no_name() -> None:
    names = BlockNames()
    assert list(names.stored(["b"], "a", TOKENS[:2], BLOCK)) == []
    assert list(names.removed(["b"])) == []
    list(names.stored(["a"], None, TOKENS[:2], BLOCK))
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
