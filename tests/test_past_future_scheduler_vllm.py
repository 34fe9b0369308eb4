"""Past-Future admission in vLLM's own scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_deadline_scheduler_vllm import case_of
from tests.test_sim_scheduler_vllm import Theirs, model  # noqa: F401

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


class ByPeak(Theirs):
    """The same with our scheduler in vLLM's place."""

    @staticmethod
    def scheduler_class() -> Any:
        from decode_worker.past_future_scheduler_vllm import PastFutureScheduler

        return PastFutureScheduler


def run(theirs: Theirs) -> tuple[int, int]:
    """To the end: iterations, and how many prompt tokens were computed."""
    prompts = steps = 0
    while theirs.scheduler.has_unfinished_requests():
        decided, tokens, _ = theirs.schedule(0)
        theirs.complete(decided)
        prompts += sum(count for count in tokens.values() if count > 1)
        steps += 1
        assert steps < 2000
    return steps, prompts


def test_nothing_is_evicted_later(model: Path) -> None:  # noqa: F811
    computed = {}
    for kind in (Theirs, ByPeak):
        theirs = kind(model, case_of(blocks=10))  # 40 tokens
        for number in range(4):
            theirs.add(f"r{number}", [number] * 10, 24)
        computed[kind] = run(theirs)[1]
    assert computed[Theirs] > 40  # some were computed again
    assert computed[ByPeak] == 40


def test_answers_that_are_short_let_more_in(model: Path) -> None:  # noqa: F811
    theirs = ByPeak(model, case_of(blocks=20))
    for number in range(200):  # all of them end with one token
        theirs.add(f"a{number}", [number] * 4, 1)
    run(theirs)
    theirs.add("long", [7] * 10, 60)
    theirs.add("other", [8] * 10, 60)
    decided, tokens, _ = theirs.schedule(0)
    assert tokens == {"long": 10, "other": 6}  # at their longest they would not fit together
    theirs.complete(decided)
    run(theirs)


asked = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=10)


@settings(max_examples=60, deadline=None)
@given(asked, st.integers(20, 60))
def test_everybody_ends(model: Path, requests: list[tuple[int, int]], blocks: int) -> None:  # noqa: F811
    theirs = ByPeak(model, case_of(blocks=blocks))
    for number, (prompt, limit) in enumerate(requests):
        theirs.add(f"r{number}", [number] * prompt, limit)
    run(theirs)
    pool = theirs.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
