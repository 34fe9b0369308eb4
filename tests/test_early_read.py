"""What is read of a prompt before its end: each block once, of a request that held it, whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.early_read import EarlyRead, Piece

# A reader's blocks 100, 101, ... are the prompt's last; a source's are numbered anew in each life.


def local_blocks(prompt: int, cached: int) -> list[int]:
    return [100 + position for position in range(cached, prompt)]


def source_blocks(life: int, count: int) -> list[int]:
    return [1000 * (life + 1) + position for position in range(count)]


def test_blocks_are_read_as_they_come_but_the_last_one() -> None:
    read = EarlyRead([local_blocks(6, 0)], 6)
    assert read.next() is None
    read.heard(0, [source_blocks(0, 2)])
    assert read.next() == Piece([[100, 101]], [[1000, 1001]])
    assert read.next() is None  # one at a time
    read.heard(0, [source_blocks(0, 4)])
    read.ended(is_good=True)
    assert read.next() == Piece([[102, 103]], [[1002, 1003]])
    read.ended(is_good=True)
    read.heard(0, [source_blocks(0, 6)])
    assert read.next() == Piece([[104]], [[1004]])
    read.ended(is_good=True)
    assert read.next() is None
    assert read.left(0) == [[105]]


def test_what_the_reader_has_is_not_read() -> None:
    read = EarlyRead([local_blocks(6, 3)], 6)
    read.heard(0, [source_blocks(0, 3)])
    assert read.next() is None
    read.heard(0, [source_blocks(0, 5)])
    assert read.next() == Piece([[103, 104]], [[1003, 1004]])


def test_a_group_that_frees_blocks_on_the_way_is_read_at_the_end() -> None:
    read = EarlyRead([local_blocks(6, 0), [200, 201]], 6)
    read.heard(0, [source_blocks(0, 4), []])
    assert read.next() == Piece([[100, 101, 102, 103], []], [source_blocks(0, 4), []])
    read.ended(is_good=True)
    assert read.left(0) == [[104, 105], [200, 201]]


def test_a_source_that_began_anew_is_read_anew() -> None:
    read = EarlyRead([local_blocks(6, 0)], 6)
    read.heard(0, [source_blocks(0, 3)])
    assert read.next() is not None
    read.heard(1, [source_blocks(1, 2)])
    assert read.next() is None  # what was read of the first life may still be written
    read.ended(is_good=True)
    read.heard(0, [source_blocks(0, 4)])  # late news of the first
    assert read.next() == Piece([[100, 101]], [[2000, 2001]])
    read.ended(is_good=True)
    assert read.left(1) == [local_blocks(6, 2)]


@pytest.mark.parametrize("life", [0, 2])
def test_the_last_word_of_another_life_makes_all_of_it_void(life: int) -> None:
    read = EarlyRead([local_blocks(4, 0)], 4)
    read.heard(1, [source_blocks(1, 2)])
    assert read.next() is not None
    read.ended(is_good=True)
    assert read.left(life) == [local_blocks(4, 0)]


def test_after_a_failure_the_rest_is_read_at_the_end() -> None:
    read = EarlyRead([local_blocks(6, 0)], 6)
    read.heard(0, [source_blocks(0, 2)])
    read.next()
    read.ended(is_good=True)
    read.heard(0, [source_blocks(0, 4)])
    read.next()
    read.ended(is_good=False)
    read.heard(0, [source_blocks(0, 5)])
    assert read.next() is None
    assert read.left(0) == [local_blocks(6, 2)]


def test_news_of_other_groups_than_there_are_is_no_news() -> None:
    read = EarlyRead([local_blocks(6, 0)], 6)
    read.heard(0, [source_blocks(0, 4), source_blocks(0, 4)])
    assert read.next() is None


@given(data=st.data())
def test_in_the_end_every_block_is_of_the_last_life(data: st.DataObject) -> None:
    """A source's blocks change hands when it begins anew: what the reader has at the end is right."""
    prompt = data.draw(st.integers(1, 12), label="blocks")
    cached = data.draw(st.integers(0, prompt - 1), label="cached")
    read = EarlyRead([local_blocks(prompt, cached)], prompt)
    memory: dict[int, tuple[int, int]] = {}  # ours -> (life, position) of what is there
    life, there = 0, 0
    piece: Piece | None = None
    piece_life = 0

    def arrive() -> None:
        assert piece is not None
        for mine, theirs in zip(piece.local[0], piece.remote[0], strict=True):
            held = theirs // 1000 - 1 == life
            memory[mine] = (life if held else -1, theirs % 1000)

    for _ in range(data.draw(st.integers(0, 15), label="events")):
        event = data.draw(st.sampled_from(["chunk", "preempt", "read", "arrive", "fail"]))
        if event == "chunk":
            there = data.draw(st.integers(there, prompt))
            read.heard(life, [source_blocks(life, there)])
        elif event == "preempt":
            life, there = life + 1, 0
        elif event == "read" and piece is None:
            piece, piece_life = read.next(), life
        elif event in ("arrive", "fail") and piece is not None:
            if event == "arrive":
                arrive()
            read.ended(is_good=event == "arrive")
            piece = None
    if piece is not None:
        arrive()
        read.ended(is_good=True)
    assert piece_life <= life
    left = read.left(life)
    assert left[0]
    for mine in left[0]:
        memory[mine] = life, mine - 100
    assert memory == {100 + position: (life, position) for position in range(cached, prompt)}
