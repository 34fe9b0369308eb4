"""Blocks of the twin against an oracle that has a list for everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.block_names import BlockChanges
from cluster.sim_blocks import BlockPool, BlockTable

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 4


def table_of(pool: BlockPool, tokens: list[int]) -> BlockTable:
    return BlockTable(hashes=pool.hashes(tokens), spans=pool.spans(tokens))


def fill(pool: BlockPool, tokens: list[int]) -> BlockTable:
    """A request that has computed all its prompt."""
    table = table_of(pool, tokens)
    found = pool.find(table, len(tokens))
    pool.share(table, found)
    assert pool.take(pool.blocks_for(len(tokens)) - found)
    table.private += pool.blocks_for(len(tokens)) - found
    pool.commit(table, len(tokens))
    return table


def check(pool: BlockPool, tables: list[BlockTable]) -> None:
    """Blocks in use are those that the tables hold, each once."""
    held = {block for table in tables for block in table.shared}
    assert pool.used == len(held) + sum(table.private for table in tables)
    assert pool.used + pool.free == pool.blocks
    assert 0 <= pool.used <= pool.blocks


class Oracle:
    """The cached blocks that nobody uses, as a list: the first is evicted first."""

    def __init__(self) -> None:
        self.idle: list[int] = []
        self.users: dict[int, int] = {}

    def use(self, blocks: list[int]) -> None:
        for block in blocks:
            self.users[block] = self.users.get(block, 0) + 1
            if block in self.idle:
                self.idle.remove(block)

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.users[block] -= 1
            if not self.users[block]:
                del self.users[block]
                self.idle.append(block)

    def evict(self, count: int) -> None:
        del self.idle[:count]

    @property
    def known(self) -> set[int]:
        return {*self.idle, *self.users}


prompts = st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(1, 3), st.integers(0, 3)).map(
    # A shared beginning, then one's own rest, then tokens that fill no block.
    lambda parts: [1] * (BLOCK * parts[0]) + [10 + parts[1]] * (BLOCK * parts[2]) + [2] * parts[3]
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), prompts),
        st.tuples(st.just("end"), st.integers(0, 20)),
        st.tuples(st.just("grow"), st.integers(0, 20)),
    ),
    max_size=60,
)


def cached_blocks(pool: BlockPool, tokens: list[int]) -> int:
    return pool.find(table_of(pool, tokens), len(tokens))


def test_what_is_kept_is_evicted_last_and_of_that_the_latest_first() -> None:
    pool = BlockPool(8, BLOCK, caching=True)
    prompts = [[number] * 2 * BLOCK for number in range(3)]
    tables = [fill(pool, prompt) for prompt in prompts]
    for table, keep_s in zip(tables, (10.0, 20.0, 0.0), strict=True):
        pool.release(table, keep_s=keep_s)
    assert (pool.used, pool.free) == (0, 8)
    assert pool.take(4)
    assert [cached_blocks(pool, prompt) for prompt in prompts] == [2, 2, 0]
    assert pool.take(1)
    assert [cached_blocks(pool, prompt) for prompt in prompts] == [2, 1, 0]
    assert pool.take(3)
    assert not pool.take(1)
    assert pool.used == 8


def test_what_was_kept_for_long_enough_goes_after_what_was_left_before() -> None:
    pool = BlockPool(8, BLOCK, caching=True)
    kept, left, late = ([number] * 2 * BLOCK for number in range(3))
    tables = [fill(pool, prompt) for prompt in (kept, left, late)]
    pool.release(tables[0], keep_s=10.0)
    pool.release(tables[1])
    pool.now_s = 10.0
    assert pool.take(2)  # there were plain ones
    assert pool.take(1)
    assert [cached_blocks(pool, prompt) for prompt in (kept, left)] == [2, 1]
    pool.release(tables[2])
    assert pool.take(2)
    assert [cached_blocks(pool, prompt) for prompt in (kept, left, late)] == [1, 0, 2]


def test_what_is_kept_can_be_used_and_kept_again() -> None:
    pool = BlockPool(8, BLOCK, caching=True)
    prompt = [1] * 2 * BLOCK
    pool.release(fill(pool, prompt), keep_s=10.0)
    longer = prompt + [2] * BLOCK
    again = fill(pool, longer)
    check(pool, [again])
    pool.release(again, keep_s=10.0)
    assert pool.take(6)
    assert cached_blocks(pool, longer) == 2
    pool.now_s = 11.0
    assert pool.take(2)
    assert pool.used == 8


@settings(max_examples=300, deadline=None)
@given(operations, st.integers(4, 24), st.sampled_from([1, 2]))
def test_the_pool_does_as_the_oracle(asked: list[tuple[str, object]], blocks: int, span: int) -> None:
    """1: in use is what tables hold. 2: found are the leading blocks that the oracle knows. 3: evicted is who
    was released first, of a prompt its last blocks first. 4: whoever is told the changes knows what can be
    found."""
    pool, oracle, live = BlockPool(blocks, BLOCK, caching=True), Oracle(), []
    pool.changes = BlockChanges()
    pool.span_blocks = span
    ends: dict[int, int] = {}
    told: set[int] = set()
    for what, facts in asked:
        if what == "begin":
            assert isinstance(facts, list)
            table = table_of(pool, facts)
            ends |= {table.hashes[(n + 1) * span - 1]: name for n, name in enumerate(table.spans)}
            found = pool.find(table, len(facts) - 1)
            leading = table.hashes[: (len(facts) - 1) // BLOCK]
            known = [block in oracle.known for block in leading]
            assert found == (known.index(False) if False in known else len(known))
            fresh = pool.blocks_for(len(facts)) - found
            unused = sum(block in oracle.idle for block in table.hashes[:found])
            assert pool.available(table, found) == pool.free - unused
            if fresh > pool.available(table, found):
                continue
            pool.share(table, found)
            oracle.use(table.hashes[:found])
            plain = pool.blocks - pool.used - len(oracle.idle)
            assert pool.take(fresh)
            oracle.evict(max(0, fresh - plain))
            table.private += fresh
            pool.commit(table, len(facts))
            oracle.use(table.shared[found:])
            live.append(table)
        elif live and what == "end":
            assert isinstance(facts, int)
            table = live.pop(facts % len(live))
            oracle.release(table.shared)
            pool.release(table)
            assert table.count == 0
        elif live:
            assert isinstance(facts, int)
            plain = pool.blocks - pool.used - len(oracle.idle)
            had = pool.free
            taken = pool.take(1)
            assert taken == (had > 0)
            if taken:
                oracle.evict(max(0, 1 - plain))
                live[facts % len(live)].private += 1
        check(pool, live)
        for table in live:
            assert set(table.shared) <= oracle.known
        changes = pool.changes.take()
        assert not set(changes.removed) - told
        told = told.difference(changes.removed).union(changes.stored)
        assert told == {ends[block] for block in oracle.known if block in ends}
    for table in live:
        pool.release(table)
    assert pool.used == 0


tokens = st.lists(st.integers(0, 2), max_size=24)


@given(tokens, tokens)
def test_hashes_are_equal_where_all_before_is_equal(left: list[int], right: list[int]) -> None:
    pool = BlockPool(1, BLOCK, caching=True)
    ours, theirs = pool.hashes(left), pool.hashes(right)
    assert len(ours) == len(left) // BLOCK
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
        assert (one == other) == (left[: number * BLOCK] == right[: number * BLOCK])


@given(tokens, st.integers(0, 6))
def test_known_leading_hashes_give_the_same_list(prompt: list[int], known: int) -> None:
    pool = BlockPool(1, BLOCK, caching=True)
    hashes = pool.hashes(prompt)
    assert pool.hashes(prompt, hashes[:known]) == hashes


def test_hashes_are_the_same_in_every_process() -> None:
    code = (
        "from cluster.sim_blocks import BlockPool\n"
        "print(BlockPool(1, 4, caching=True).hashes(list(range(64))))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1


def test_nothing_is_found_without_caching() -> None:
    pool = BlockPool(8, BLOCK, caching=False)
    pool.release(fill(pool, [1] * 16), 16)
    table = table_of(pool, [1] * 16)
    assert table.hashes == []
    assert pool.find(table, 15) == 0
    assert pool.used == 0


def test_blocks_are_shared_and_the_last_user_frees_them() -> None:
    pool = BlockPool(8, BLOCK, caching=True)
    first = fill(pool, [1] * 16)
    second = fill(pool, [1] * 16 + [2] * 4)
    assert pool.used == 5
    pool.release(first)
    assert pool.used == 5
    pool.release(second)
    assert pool.used == 0
    assert pool.find(table_of(pool, [1] * 16 + [2] * 4), 20) == 5


def test_the_oldest_prompt_goes_first_and_of_it_the_last_blocks() -> None:
    pool = BlockPool(8, BLOCK, caching=True)
    old, new = [1] * 16, [2] * 16
    tables = [fill(pool, old), fill(pool, new)]
    for table in tables:
        pool.release(table)
    assert pool.take(3)
    assert pool.find(table_of(pool, old), 16) == 1
    assert pool.find(table_of(pool, new), 16) == 4


def test_more_than_there_is_cannot_be_taken_and_nothing_is_lost() -> None:
    pool = BlockPool(4, BLOCK, caching=True)
    pool.release(fill(pool, [1] * 8))
    assert not pool.take(5)
    assert pool.find(table_of(pool, [1] * 8), 8) == 2


def test_two_that_fill_equal_blocks_at_once_hold_a_copy_each() -> None:
    pool = BlockPool(8, BLOCK, caching=True)
    first, second = (table_of(pool, [1] * 8) for _ in range(2))
    for table in (first, second):
        assert pool.take(2)
        table.private = 2
    for table in (first, second):
        pool.commit(table, 8)
    check(pool, [first, second])
    assert pool.used == 4
    pool.release(first)
    pool.release(second)
    assert pool.used == 0
    assert pool.find(table_of(pool, [1] * 8), 8) == 2


@pytest.mark.parametrize(("filled", "found"), [(8, 2), (11, 2), (12, 3), (17, 4)])
def test_full_blocks_of_output_stay_for_the_one_that_lost_them(filled: int, found: int) -> None:
    pool = BlockPool(8, BLOCK, caching=True)
    table = fill(pool, [1] * 8)
    grown = pool.blocks_for(filled) - 2
    assert pool.take(grown)
    table.private += grown
    before = list(table.hashes)
    pool.release(table, filled)
    assert pool.used == 0
    assert table.hashes[:2] == before
    assert pool.find(table, filled) == found
    # Nobody else's prompt has them.
    assert pool.find(table_of(pool, [1] * 20), 20) == 2
