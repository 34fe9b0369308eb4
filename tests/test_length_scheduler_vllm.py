"""LAPS in vLLM's own scheduler: who shares an iteration, who waits, and that nobody is lost by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.latency import ConstantLatency
from prefill_worker.length_batching import LengthBatching
from tests.test_deadline_scheduler_vllm import arrivals, case_of
from tests.test_sim_scheduler_vllm import BLOCK, Case, Ours, Theirs, cases, model, steps  # noqa: F401

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

# A prompt of up to 19 tokens is short.
SPEED = ConstantLatency(step_s=1.0, prefill_s_per_token=0.05)


class ByLength(Theirs):
    """The same with our scheduler in vLLM's place."""

    def __init__(self, model: Path, case: Case, window_s: float = 0.0) -> None:  # noqa: F811
        super().__init__(model, case)
        self.scheduler._batching = LengthBatching(SPEED, 2048, window_s)

    @staticmethod
    def scheduler_class() -> Any:
        from prefill_worker.length_scheduler_vllm import LengthScheduler

        return LengthScheduler

    def step(self) -> dict[str, int]:
        """One iteration: tokens by request."""
        decided, tokens, _ = self.schedule(0)
        self.complete(decided)
        return tokens


class ByDeadlineAndLength(ByLength):
    """Both of ours."""

    @staticmethod
    def scheduler_class() -> Any:
        from prefill_worker.length_scheduler_vllm import DeadlineLengthScheduler

        return DeadlineLengthScheduler


def test_short_and_long_take_turns(model: Path) -> None:  # noqa: F811
    theirs = ByLength(model, case_of())
    theirs.add("long", [1] * 36, 1)
    assert theirs.step() == {"long": 16}
    theirs.add("later", [2] * 30, 1)
    theirs.add("short", [3] * 10, 1)
    theirs.add("other", [4] * 4, 1)
    assert theirs.step() == {"short": 10, "other": 4}
    assert theirs.step() == {"long": 16}
    theirs.add("third", [5] * 6, 1)
    assert theirs.step() == {"third": 6}
    assert theirs.step() == {"long": 4, "later": 12}
    assert theirs.step() == {"later": 16}
    assert theirs.step() == {"later": 2}
    assert not theirs.scheduler.has_unfinished_requests()


def test_the_order_says_who_goes_first(model: Path) -> None:  # noqa: F811
    theirs = ByDeadlineAndLength(model, case_of())
    theirs.add("long", [1] * 30, 1, due_in_s=1000.0)
    assert theirs.step() == {"long": 16}
    theirs.add("later", [2] * 10, 1, due_in_s=2000.0)
    assert theirs.step() == {"long": 14}  # with room for two more
    theirs.add("last", [3] * 30, 1, due_in_s=3000.0)
    assert theirs.step() == {"later": 10}
    assert theirs.step() == {"last": 16}
    theirs.add("soon", [4] * 5, 1, due_in_s=100.0)
    assert theirs.step() == {"soon": 5}
    assert theirs.step() == {"last": 14}


def test_an_idle_engine_waits_for_more(model: Path) -> None:  # noqa: F811
    theirs = ByLength(model, case_of(), window_s=1000.0)
    theirs.add("a", [1] * 5, 1)
    assert theirs.step() == {}
    assert theirs.scheduler.has_requests()  # so the engine asks again
    theirs.add("b", [2] * 5, 1)
    assert theirs.step() == {}
    theirs.add("c", [3] * 10, 1)
    assert theirs.step() == {"a": 5, "b": 5, "c": 6}
    assert theirs.step() == {"c": 4}
    theirs.add("d", [4] * 5, 1)
    assert theirs.step() == {}
    theirs.add("due", [5] * 5, 1, due_in_s=500.0)
    assert theirs.step() == {"d": 5, "due": 5}


def test_one_that_waits_can_be_aborted(model: Path) -> None:  # noqa: F811
    from vllm.v1.request import RequestStatus

    theirs = ByLength(model, case_of(), window_s=1000.0)
    theirs.add("a", [1] * 5, 1)
    assert theirs.step() == {}
    theirs.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert theirs.step() == {}
    assert not theirs.scheduler.has_requests()
    assert not theirs.scheduler._came_s


def test_those_that_hold_the_memory_go_on_when_the_others_find_none(model: Path) -> None:  # noqa: F811
    theirs = ByLength(model, case_of(blocks=8, reserve=True))
    theirs.add("long", [1] * 32, 1)
    assert theirs.step() == {"long": 16}
    theirs.add("short", [2] * 18, 1)  # of 32 tokens' room, 16 are taken
    assert theirs.step() == {}
    assert theirs.step() == {"long": 16}
    assert theirs.step() == {"short": 16}
    assert theirs.step() == {"short": 2}
    assert not theirs.scheduler.has_unfinished_requests()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_twin_decides_the_same(model: Path, case: Case) -> None:  # noqa: F811
    ours = Ours(case)
    ours.scheduler._batching = LengthBatching(SPEED, 2048, 0.0)
    assert steps(ours, case) == steps(ByLength(model, case), case)


@settings(max_examples=60, deadline=None)
@given(arrivals, st.integers(20, 60), st.booleans(), st.sampled_from([ByLength, ByDeadlineAndLength]))
def test_everybody_ends_whatever_the_lengths(
    model: Path,  # noqa: F811
    asked: list[tuple[int, int, float, int]],
    blocks: int,
    reserve: bool,
    kind: type[ByLength],
) -> None:
    theirs = kind(model, case_of(blocks=blocks, reserve=reserve))
    started = 0
    for step in range(600):
        for number, (at, prompt, due_in_s, limit) in enumerate(asked):
            if at == step:
                theirs.add(f"r{number}", [number] * prompt, limit, due_in_s=due_in_s)
                started += 1
        theirs.step()
        if started == len(asked) and not theirs.scheduler.has_unfinished_requests():
            break
    assert started == len(asked)
    assert not theirs.scheduler.has_unfinished_requests()
    pool = theirs.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not theirs.scheduler._due_s
    assert not theirs.scheduler._came_s
    assert max(prompt + limit for _, prompt, _, limit in asked) <= blocks * BLOCK
    assert math.isfinite(theirs.scheduler._batching.held_until_s)
