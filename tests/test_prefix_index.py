"""The prefix index against an oracle that has a set for every instance."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.prefix_hash import chain_hashes
from router.prefix_index import PrefixIndex

BLOCK = 4
NAMES = ("prefill-0", "prefill-1", "decode-0")


def prompt(*parts: int) -> list[int]:
    """A block of each number."""
    return [part for part in parts for _ in range(BLOCK)]


def test_names_are_equal_where_all_before_is_equal() -> None:
    one, other = (list(chain_hashes(prompt(1, 2, end), BLOCK)) for end in (3, 4))
    assert one[:2] == other[:2]
    assert one[2] != other[2]
    assert list(chain_hashes(prompt(3), BLOCK, one[1])) == one[2:]
    assert list(chain_hashes([1] * (BLOCK - 1), BLOCK)) == []


def test_who_has_how_much_of_a_prompt() -> None:
    index = PrefixIndex(BLOCK)
    names = list(chain_hashes(prompt(1, 2, 3, 4), BLOCK))
    index.stored("prefill-0", names)
    index.stored("prefill-1", names[:2])
    index.stored("decode-0", names[2:])  # without what comes before, they are of no use
    assert index.match(prompt(1, 2, 3, 9)) == {"prefill-0": 3 * BLOCK, "prefill-1": 2 * BLOCK}
    assert index.match([*prompt(1), 2]) == {"prefill-0": BLOCK, "prefill-1": BLOCK}
    assert index.match(prompt(9, 1)) == {}
    index.removed("prefill-0", names[1:])
    assert index.match(prompt(1, 2, 3)) == {"prefill-0": BLOCK, "prefill-1": 2 * BLOCK}
    index.forget("prefill-1")
    assert index.match(prompt(1, 2, 3)) == {"prefill-0": BLOCK}
    assert index.blocks_of("prefill-0") == 1


def test_a_new_life_has_nothing_of_the_old_one() -> None:
    index = PrefixIndex(BLOCK)
    names = list(chain_hashes(prompt(1, 2), BLOCK))
    index.stored("prefill-0", names)
    index.forget("prefill-0")
    index.stored("prefill-0", names[:1])
    assert index.match(prompt(1, 2)) == {"prefill-0": BLOCK}


def test_the_dead_are_swept_away() -> None:
    index = PrefixIndex(BLOCK)
    index.stored("prefill-0", range(1, 1001))
    index.stored("prefill-1", range(501, 1501))
    index.forget("prefill-0")
    index.removed("prefill-1", [])  # nothing has changed, and the sweep goes on
    index.stored("decode-0", range(2000, 2400))
    assert len(index) == 1000 + 400
    assert index.blocks_of("prefill-1") == 1000


def test_there_are_no_more_blocks_than_allowed() -> None:
    index = PrefixIndex(BLOCK, most_blocks=3)
    index.stored("prefill-0", [1, 2, 3, 4, 5])
    index.stored("prefill-1", [1, 6])
    assert len(index) == 3
    index.removed("prefill-0", [2, 3])
    index.stored("prefill-1", [6])
    assert len(index) == 2
    assert index.blocks_of("prefill-1") == 2


operations = st.lists(
    st.tuples(
        st.sampled_from(["stored", "removed", "forget"]),
        st.sampled_from(NAMES),
        st.lists(st.integers(0, 2), min_size=1, max_size=4),
        st.integers(0, 4),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(operations, st.lists(st.integers(0, 2), max_size=5))
def test_the_index_does_as_the_oracle(
    asked: list[tuple[str, str, list[int], int]], looked_up: list[int]
) -> None:
    index = PrefixIndex(BLOCK)
    oracle: dict[str, set[int]] = {name: set() for name in NAMES}
    for what, name, parts, first in asked:
        names = list(chain_hashes(prompt(*parts), BLOCK))[first:]
        if what == "stored":
            index.stored(name, names)
            oracle[name].update(names)
        elif what == "removed":
            index.removed(name, names)
            oracle[name].difference_update(names)
        else:
            index.forget(name)
            oracle[name].clear()
        expected = {}
        for holder, held in oracle.items():
            count = 0
            for block in chain_hashes(prompt(*looked_up), BLOCK):
                if block not in held:
                    break
                count += 1
            if count:
                expected[holder] = count * BLOCK
        assert index.match(prompt(*looked_up)) == expected
        assert {holder: index.blocks_of(holder) for holder in NAMES} == {n: len(s) for n, s in oracle.items()}
