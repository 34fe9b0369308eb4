"""S-EDF in vLLM's own scheduler: who goes first, who gives way, and that nobody is lost by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_sim_scheduler_vllm import BLOCK, Case, Theirs, model  # noqa: F401

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def case_of(*, blocks: int = 1000, reserve: bool = False, max_loras: int = 0, caching: bool = False) -> Case:
    return Case(
        blocks=blocks,
        budget=16,
        max_num_seqs=8,
        chunked=True,
        caching=caching,
        threshold=0,
        reserve=reserve,
        stages=1,
        arrivals=(),
        max_loras=max_loras,
    )


class ByDeadline(Theirs):
    """The same with our scheduler in vLLM's place."""

    @staticmethod
    def scheduler_class() -> Any:
        from prefill_worker.deadline_scheduler_vllm import DeadlineScheduler

        return DeadlineScheduler

    def step(self) -> dict[str, int]:
        """One iteration: tokens by request."""
        decided, tokens, _ = self.schedule(0)
        self.complete(decided)
        return tokens


def test_a_long_prompt_gives_way_between_two_chunks_and_goes_on(model: Path) -> None:  # noqa: F811
    theirs = ByDeadline(model, case_of())
    theirs.add("long", [1] * 60, 1, due_in_s=1000.0)
    assert theirs.step() == {"long": 16}
    theirs.add("short", [2] * 10, 1, due_in_s=100.0)
    theirs.add("later", [3] * 4, 1, due_in_s=2000.0)
    theirs.add("any", [4] * 4, 1, due_in_s=math.inf)
    assert theirs.step() == {"short": 10}  # and not those that rank behind the one that gives way
    assert theirs.step() == {"long": 16}
    assert theirs.step() == {"long": 16}
    assert theirs.step() == {"long": 12, "later": 4}
    assert theirs.step() == {"any": 4}
    assert not theirs.scheduler.has_unfinished_requests()


def test_who_is_too_late_goes_last(model: Path) -> None:  # noqa: F811
    theirs = ByDeadline(model, case_of())
    theirs.add("late", [1] * 30, 1, due_in_s=-1.0)
    theirs.add("none", [2] * 10, 1, due_in_s=math.inf)
    theirs.add("soon", [3] * 10, 1, due_in_s=100.0)
    assert theirs.step() == {"soon": 10, "none": 6}
    assert theirs.step() == {"none": 4, "late": 12}


def test_those_that_hold_the_memory_go_on_when_the_first_finds_none(model: Path) -> None:  # noqa: F811
    theirs = ByDeadline(model, case_of(blocks=8, reserve=True))
    theirs.add("long", [1] * 32, 1, due_in_s=1000.0)
    assert theirs.step() == {"long": 16}
    theirs.add("short", [2] * 20, 1, due_in_s=100.0)  # of 32 tokens' room, 16 are taken
    assert theirs.step() == {}
    assert theirs.step() == {"long": 16}
    assert theirs.step() == {"short": 16}
    assert theirs.step() == {"short": 4}
    assert not theirs.scheduler.has_unfinished_requests()


def test_who_gives_way_keeps_its_adapters_slot(model: Path) -> None:  # noqa: F811
    theirs = ByDeadline(model, case_of(max_loras=1))
    theirs.add("long", [1] * 40, 1, due_in_s=1000.0, adapter=1)
    assert theirs.step() == {"long": 16}
    theirs.add("other", [2] * 10, 1, due_in_s=100.0, adapter=2)
    theirs.add("same", [3] * 10, 1, due_in_s=200.0, adapter=1)
    theirs.add("none", [4] * 5, 1, due_in_s=300.0)
    assert theirs.step() == {"none": 5}  # a second adapter has no slot, and the first waits for no iteration
    for _ in range(12):
        theirs.step()
    assert not theirs.scheduler.has_unfinished_requests()


arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.integers(1, 60),
        st.sampled_from([-1.0, 50.0, 100.0, 200.0, math.inf]),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(arrivals, st.integers(20, 60), st.booleans(), st.sampled_from([0, 0, 1, 2]))
def test_everybody_ends_whatever_the_deadlines(
    model: Path,  # noqa: F811
    asked: list[tuple[int, int, float, int]],
    blocks: int,
    reserve: bool,
    max_loras: int,
) -> None:
    theirs = ByDeadline(model, case_of(blocks=blocks, reserve=reserve, max_loras=max_loras))
    started = 0
    for step in range(600):
        for number, (at, prompt, due_in_s, limit) in enumerate(asked):
            if at == step:
                adapter = number % 4 if max_loras else 0
                theirs.add(f"r{number}", [number] * prompt, limit, due_in_s=due_in_s, adapter=adapter)
                started += 1
        theirs.step()
        if started == len(asked) and not theirs.scheduler.has_unfinished_requests():
            break
    assert started == len(asked)
    assert not theirs.scheduler.has_unfinished_requests()
    pool = theirs.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not theirs.scheduler._due_s
    assert max(prompt + limit for _, prompt, _, limit in asked) <= blocks * BLOCK
