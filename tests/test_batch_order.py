"""Requests with a common beginning stand together, in the groups that save most."""

from __future__ import annotations

from itertools import groupby, takewhile

from hypothesis import given
from hypothesis import strategies as st

from router.batch_file import NAME_BYTES, Line
from router.batch_order import _groups, _tree, in_order


def line(number: int, blocks: str, output: int = 10, tokens: float = 100.0) -> Line:
    """One whose prompt has a block per letter."""
    names = b"".join(letter.encode().rjust(NAME_BYTES) for letter in blocks)
    return Line(number, 0, 0, names, tokens, output)


def numbers(*lines: Line) -> list[int]:
    return [one.number for one in in_order(lines)]


def test_those_with_a_common_beginning_stand_together() -> None:
    found = numbers(line(1, "abc"), line(2, "xyz"), line(3, "abd"), line(4, "xyq"), line(5, "abc"))
    assert [sorted(group) for _, group in groupby(found, key=lambda n: n in (2, 4))] in (
        [[1, 3, 5], [2, 4]],
        [[2, 4], [1, 3, 5]],
    )


def test_long_answers_to_short_prompts_go_first() -> None:
    assert numbers(line(1, "a", 10), line(2, "b", 90), line(3, "c", 50)) == [2, 3, 1]
    # A group by all that is in it: 60 of output for 200 of input.
    assert numbers(line(1, "aa", 10), line(2, "b", 25), line(3, "aa", 50)) == [1, 3, 2]


def groups_of(lines: list[Line]) -> list[list[int]]:
    return _groups(_tree(lines))


def test_a_group_is_split_where_its_parts_share_more() -> None:
    """One group saves 5 x 1 block; the two that have four blocks in common save 4 x 2."""
    lines = [line(n, "s" + ("abc" if n % 2 else "xyz") + str(n)) for n in range(6)]
    ordered = sorted(lines, key=lambda one: one.blocks)
    assert groups_of(ordered) == [[0, 1, 2], [3, 4, 5]]
    # With one block more in common, less.
    lines = [line(n, "sssssss" + ("a" if n % 2 else "x") + str(n)) for n in range(6)]
    assert groups_of(sorted(lines, key=lambda one: one.blocks)) == [list(range(6))]
    # And some may leave the others alone.
    lines = [line(n, text) for n, text in enumerate(["sa", "sb", "sbcdefg", "sbcdefh", "sc"])]
    assert groups_of(lines) == [[0, 1, 4], [2, 3]]


prompts = st.lists(st.text(alphabet="ab", max_size=4), min_size=1, max_size=9)


def saved(texts: list[str], groups: list[list[int]]) -> int:
    """Blocks that these groups need not compute twice."""
    total = 0
    for group in groups:
        columns = zip(*(texts[n] for n in group), strict=False)
        common = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
        total += (len(group) - 1) * common
    return total


@given(prompts)
def test_what_is_said_to_be_saved_is_and_no_simpler_grouping_saves_more(texts: list[str]) -> None:
    ordered = sorted(texts)
    root = _tree([line(n, text) for n, text in enumerate(ordered)])
    groups = _groups(root)
    assert sorted(n for group in groups for n in group) == list(range(len(texts)))
    assert saved(ordered, groups) == root.saved
    for length in range(1, 5):  # those that begin with the same blocks, so many
        alike = [list(same) for _, same in groupby(range(len(ordered)), key=lambda n: ordered[n][:length])]
        assert root.saved >= saved(ordered, alike)


@given(prompts)
def test_every_line_is_run_once(texts: list[str]) -> None:
    lines = [line(n, text, output=len(text) + 1) for n, text in enumerate(texts)]
    assert sorted(numbers(*lines)) == list(range(len(texts)))


def test_no_lines_no_order() -> None:
    assert in_order([]) == []


def test_a_chain_of_a_thousand_prefixes() -> None:
    lines = [line(n, "a" * n) for n in range(1, 1001)]
    assert sorted(numbers(*lines)) == list(range(1, 1001))
