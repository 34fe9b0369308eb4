"""Twins of a data-parallel group on virtual time: one iteration for all, as long as the slowest takes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.latency import EMPTY_BATCH, Batch, group_s
from cluster.sim_group import SimGroup
from deploy.virtual_time import run_virtual
from prefill_worker.length_batching import LengthBatching
from tests.test_sim_engine import Bent, Seen, options_of, request


class Shared(Bent):
    """That adds something for all tokens of the group."""

    def group_s(self, batches: Sequence[Batch]) -> float:
        tokens = sum(batch.prefill_tokens + batch.decode_requests for batch in batches)
        return max(self.iteration_s(batch) for batch in batches) + 1e-5 * tokens


LATENCY = Shared()


async def serve(
    asked: Sequence[tuple[float, int, int, int]], quiet_s: float, size: int = 2
) -> list[tuple[float, float]]:
    """First and last token of each request: (time, instance, prompt tokens, output tokens)."""
    loop = asyncio.get_running_loop()
    group = SimGroup(LATENCY, size)
    members = [Seen(options_of(LATENCY), quiet_s=quiet_s, group=group) for _ in range(size)]
    serving = [member.start() for member in members]
    for member in members:
        group.join(member.engine)
    began_s = loop.time()
    for number, (at_s, place, prompt, limit) in enumerate(sorted(asked)):
        await asyncio.sleep(began_s + at_s - loop.time())
        members[place].engine.submit(request(f"r{number}", [7] * prompt, limit))
    while sum(len(member.end_s) for member in members) < len(asked):
        await asyncio.sleep(0.5)
    for task in serving:
        task.cancel()
    first = {name: at for member in members for name, at in member.first_s.items()}
    last = {name: at for member in members for name, at in member.end_s.items()}
    return [(first[f"r{n}"] - began_s, last[f"r{n}"] - began_s) for n in range(len(asked))]


def test_one_computes_while_the_others_wait_for_it() -> None:
    """A request comes while another instance computes a prompt: it begins when that iteration ends."""
    long, short = run_virtual(serve([(0.0, 0, 1500, 1), (0.01, 1, 10, 2)], 0.0))[0]
    prompt_s = LATENCY.group_s([Batch(1500, 1500**2, 1), EMPTY_BATCH])
    assert long[1] == pytest.approx(prompt_s)
    assert short[0] == pytest.approx(prompt_s + LATENCY.group_s([EMPTY_BATCH, Batch(10, 100, 1)]))


def test_a_decode_is_as_slow_as_the_prompt_beside_it() -> None:
    decode, long = run_virtual(serve([(0.0, 0, 10, 3), (0.001, 1, 1000, 1)], 0.0))[0]
    first_s = LATENCY.group_s([Batch(10, 100, 1), EMPTY_BATCH])
    both_s = LATENCY.group_s([Batch(0, 0, 0, 1, 10), Batch(1000, 1000**2, 1)])
    assert long[1] == pytest.approx(first_s + both_s)
    assert decode[1] == pytest.approx(
        first_s + both_s + LATENCY.group_s([Batch(0, 0, 0, 1, 11), EMPTY_BATCH])
    )


def test_a_model_that_knows_of_no_group_is_as_slow_as_its_slowest() -> None:
    slow, fast = Batch(1000, 1000**2, 1), Batch(0, 0, 0, 3, 100)
    assert group_s(Bent(), [slow, fast, EMPTY_BATCH]) == Bent().iteration_s(slow)
    assert group_s(Bent(), [EMPTY_BATCH]) == 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 2), st.integers(0, 2), st.integers(1, 300), st.integers(1, 60)),
        min_size=1,
        max_size=8,
    )
)
def test_many_iterations_as_one_event_change_no_time(asked: list[tuple[float, int, int, int]]) -> None:
    step_by_step, at_once = (run_virtual(serve(asked, quiet_s, size=3))[0] for quiet_s in (0.0, 100.0))
    for one, other in zip(at_once, step_by_step, strict=True):
        assert one == pytest.approx(other, abs=1e-9)


def test_no_iterations_are_decided_ahead_while_a_prompt_waits_for_others() -> None:
    """Else it would wait for the end of all of them."""

    async def story() -> float:
        loop = asyncio.get_running_loop()
        group = SimGroup(LATENCY, 2)
        batching = LengthBatching(LATENCY, full_tokens=64, window_s=0.02)
        holding = Seen(options_of(LATENCY), quiet_s=100.0, group=group, batching=batching)
        decoding = Seen(options_of(LATENCY), quiet_s=100.0, group=group)
        serving = [holding.start(), decoding.start()]
        for member in (holding, decoding):
            group.join(member.engine)
        decoding.engine.submit(request("long", [7] * 10, 400))
        await asyncio.sleep(0.5)
        came_s = loop.time()
        holding.engine.submit(request("short", [7] * 10, 1))
        while not holding.end_s:
            await asyncio.sleep(0.01)
        for task in serving:
            task.cancel()
        return holding.end_s["short"] - came_s

    assert run_virtual(story())[0] < 0.06


def test_nothing_is_computed_without_all_of_them() -> None:
    async def story() -> tuple[int, int]:
        group = SimGroup(LATENCY, 2)
        first, second = (Seen(options_of(LATENCY), group=group) for _ in range(2))
        serving = [first.start(), second.start()]
        group.join(first.engine)
        first.engine.submit(request("early", [7] * 10, 2))
        await asyncio.sleep(5.0)
        before = len(first.end_s)
        group.join(second.engine)
        await asyncio.sleep(5.0)
        after = len(first.end_s)
        serving[1].cancel()
        await second.engine.stop()
        first.engine.submit(request("late", [7] * 10, 2))
        await asyncio.sleep(5.0)
        serving[0].cancel()
        return after - before, len(first.end_s)

    assert run_virtual(story())[0] == (1, 1)
