"""What the router believes of an instance: its prompts and its decodes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.decode_batch import DecodeBatch
from router.prompt_queue import PromptPool, PromptQueue


def test_the_first_to_come_is_the_first_to_be_served() -> None:
    queue = PromptQueue()
    assert queue.wait_s(1.0, 0.0) == 0.0
    queue.add("a", 2.0, deadline_s=9.0, now_s=0.0)
    queue.add("b", 3.0, deadline_s=1.0, now_s=0.5)
    assert queue.wait_s(0.1, now_s=1.0) == pytest.approx(4.0)
    assert list(queue.behind(0.1, now_s=1.0)) == []
    assert queue.remove("a", 2.5) == pytest.approx(2.5)
    assert queue.wait_s(0.1, now_s=3.0) == pytest.approx(2.5)
    assert queue.wait_s(0.1, now_s=99.0) == 0.0  # late, but not before now
    assert queue.remove("b", 5.5) == pytest.approx(3.0)
    assert len(queue) == 0
    assert queue.work_s == 0.0


def test_who_leaves_the_end_of_the_queue_takes_no_work_that_was_done() -> None:
    queue = PromptQueue()
    queue.add("a", 5.0, deadline_s=9.0, now_s=0.0)
    queue.add("b", 1.0, deadline_s=9.0, now_s=1.0)
    queue.remove("b", 4.9, is_served=False)
    assert queue.wait_s(9.0, 4.9) == pytest.approx(0.1)
    queue.add("c", 2.0, deadline_s=9.0, now_s=4.9)
    queue.remove("a", 4.9, is_served=False)
    assert queue.wait_s(9.0, 4.9) == pytest.approx(2.0)


def test_by_deadline_those_with_later_ones_are_delayed() -> None:
    queue = PromptQueue(by_deadline=True)
    queue.add("running", 2.0, deadline_s=3.0, now_s=0.0)
    queue.add("late", 1.0, deadline_s=9.0, now_s=0.0)
    queue.add("soon", 1.0, deadline_s=4.0, now_s=0.0)
    assert queue.wait_s(5.0, now_s=1.0) == pytest.approx(2.0)  # the rest of "running", and "soon"
    assert [(p.name, end_s) for p, end_s in queue.behind(5.0, now_s=1.0)] == [("late", pytest.approx(4.0))]
    assert [p.name for p, _ in queue.behind(3.5, now_s=1.0)] == ["soon", "late"]


def test_what_an_instance_tells_of_its_queue_counts_until_it_is_over() -> None:
    queue = PromptQueue()
    queue.add("mine", 1.0, deadline_s=9.0, now_s=0.0)
    queue.add("refused", 2.0, deadline_s=9.0, now_s=0.0)
    queue.told("refused", 5.0, now_s=0.0)
    queue.remove("refused", 0.1, is_served=False)
    assert queue.wait_s(9.0, 0.1) == pytest.approx(4.9)
    assert queue.wait_s(9.0, 3.0) == pytest.approx(2.0)
    queue.add("next", 1.5, deadline_s=9.0, now_s=3.0)
    assert queue.wait_s(9.0, 3.0) == pytest.approx(3.5)
    queue.remove("mine", 4.0)  # it was there before others, perhaps
    assert queue.wait_s(9.0, 4.0) == pytest.approx(2.5)
    queue.remove("next", 4.5)  # all that was told of is done
    assert queue.wait_s(9.0, 4.5) == 0.0


def test_what_is_told_to_one_that_has_time_is_not_true_of_one_that_has_none() -> None:
    queue = PromptQueue(by_deadline=True)
    queue.add("refused", 1.0, deadline_s=5.0, now_s=0.0)
    queue.told("refused", 4.0, now_s=0.0)
    queue.remove("refused", 0.0, is_served=False)
    assert [queue.wait_s(deadline_s, 0.0) for deadline_s in (4.0, 5.0, math.inf)] == [0.0, 4.0, 4.0]
    queue.told("unknown", 50.0, now_s=0.0)
    assert queue.wait_s(math.inf, 0.0) == 4.0


def test_removing_what_is_not_there() -> None:
    assert PromptQueue().remove("a", 1.0) is None


@given(
    st.lists(st.tuples(st.floats(0.01, 5), st.floats(0, 50)), max_size=20), st.floats(0, 50), st.booleans()
)
def test_a_wait_is_never_negative_nor_more_than_all_the_work(
    prompts: list[tuple[float, float]], deadline_s: float, by_deadline: bool
) -> None:
    queue = PromptQueue(by_deadline=by_deadline)
    for number, (work_s, due_s) in enumerate(prompts):
        queue.add(str(number), work_s, due_s, now_s=0.0)
    assert 0 <= queue.wait_s(deadline_s, 0.5) <= sum(work_s for work_s, _ in prompts)
    for number in range(len(prompts)):
        queue.remove(str(number), 1.0)
    assert queue.work_s == 0.0


def test_a_batch_is_the_sum_of_its_requests() -> None:
    batch = DecodeBatch()
    batch.add("a", 100, 50, 0.05)
    batch.add("b", 1000, 200, math.inf)
    batch.add("c", 10, 10, 0.05)
    assert len(batch) == 3
    assert batch.context_tokens == 125 + 1100 + 15
    assert batch.peak_tokens == 150 + 1200 + 20
    assert batch.bounds == {0.05: 2, math.inf: 1}
    for name in ("a", "b", "c", "c"):
        batch.remove(name)
    assert (len(batch), batch.context_tokens, batch.peak_tokens, batch.bounds) == (0, 0, 0, {})


def test_who_is_too_late_is_computed_last_and_delays_nobody() -> None:
    queue = PromptQueue(by_deadline=True)
    queue.add("late", 5.0, deadline_s=2.0, now_s=0.0)
    queue.add("running", 2.0, deadline_s=3.0, now_s=0.0)
    queue.add("next", 1.0, deadline_s=2.5, now_s=0.0)  # can't be made any more behind it
    assert queue.wait_s(5.0, now_s=1.0) == pytest.approx(2.0)
    queue.remove("next", 1.0, is_served=False)
    assert queue.wait_s(5.0, now_s=1.0) == pytest.approx(1.0)
    assert list(queue.behind(1.0, now_s=1.0)) == []


def test_a_pool_has_the_prompts_of_all_its_queues() -> None:
    pool = PromptPool()
    one, other = PromptQueue(pool), PromptQueue(pool)
    one.add("a", 1.0, 9.0, 0.0, bound_s=0.4)
    one.add("b", 2.0, 9.0, 0.0, bound_s=20.0)
    other.add("c", 4.0, 9.0, 0.0, bound_s=0.4)
    assert (pool.bounds, pool.work_s) == ({0.4: 2, 20.0: 1}, 7.0)
    one.remove("a", 1.0)
    assert (pool.bounds, pool.work_s) == ({0.4: 1, 20.0: 1}, 6.0)
    other.leave_pool()
    other.remove("c", 1.0)
    assert (pool.bounds, pool.work_s) == ({20.0: 1}, 2.0)
    one.remove("b", 1.0)
    assert (pool.bounds, pool.work_s) == ({}, 0.0)


def _one_by_one(
    prompts: list[tuple[float, float]], deadline_s: float, now_s: float
) -> tuple[float, list[tuple[str, float]]]:
    """Wait and those behind, of prompts (work, deadline) that came at 0 s: as S-EDF says it."""
    in_time, begun_s = [], 0.0
    for number, (work_s, due_s) in sorted(enumerate(prompts), key=lambda entry: (entry[1][1], entry[0])):
        if begun_s + work_s <= due_s:
            in_time.append((str(number), work_s, due_s))
            begun_s = now_s
    ahead_s, end_s, behind = 0.0, 0.0, []
    for position, (name, work_s, due_s) in enumerate(in_time):
        end_s = max(end_s + work_s, now_s)
        if position and due_s > deadline_s:
            behind.append((name, end_s))
        else:
            ahead_s += work_s
    return max(0.0, ahead_s - now_s), behind


def _times_s(least: float, most: float) -> st.SearchStrategy[float]:
    """Of a clock with exact sums: who is just in time is so however it is reckoned."""
    return st.integers(round(least * 64), round(most * 64)).map(lambda ticks: ticks / 64)


@given(
    st.lists(st.tuples(_times_s(0.02, 5), _times_s(0, 20)), max_size=8),
    st.lists(st.tuples(_times_s(0, 20), _times_s(0, 10)), min_size=1, max_size=5),
)
def test_an_order_by_deadline_is_kept_up_as_time_passes(
    prompts: list[tuple[float, float]], asked: list[tuple[float, float]]
) -> None:
    queue = PromptQueue(by_deadline=True)
    for number, (work_s, due_s) in enumerate(prompts):
        queue.add(str(number), work_s, due_s, now_s=0.0)
    for deadline_s, now_s in asked:
        wait_s, behind = _one_by_one(prompts, deadline_s, now_s)
        if prompts:
            assert queue.wait_s(deadline_s, now_s) == pytest.approx(wait_s)
        found = [(prompt.name, end_s) for prompt, end_s in queue.behind(deadline_s, now_s)]
        assert [name for name, _ in found] == [name for name, _ in behind]
        assert [end_s for _, end_s in found] == pytest.approx([end_s for _, end_s in behind])
