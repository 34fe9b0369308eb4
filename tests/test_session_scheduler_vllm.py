"""Kept sessions in vLLM's own scheduler: what is held stays, and nobody has less room by it."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.spec import parse_spec
from prefill_worker.phase import phase_options
from tests.test_deadline_scheduler_vllm import case_of
from tests.test_sim_scheduler_vllm import Theirs, model  # noqa: F401

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


class Keeping(Theirs):
    """The same with our scheduler in vLLM's place."""

    @staticmethod
    def scheduler_class() -> Any:
        from prefill_worker import session_scheduler_vllm

        return session_scheduler_vllm.KeepingScheduler

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool


def computed(theirs: Theirs, name: str, prompt: list[int], keep_s: float = 0.0) -> int:
    """Tokens of a prompt that had to be computed."""
    theirs.add(name, prompt, 1, keep_s=keep_s)
    total = 0
    while theirs.scheduler.has_unfinished_requests():
        decided, tokens, _ = theirs.schedule(0)
        theirs.complete(decided)
        assert tokens
        total += tokens[name]
    return total


def prompt_of(number: int, tokens: int) -> list[int]:
    return [1000 * number + position for position in range(tokens)]


@pytest.mark.parametrize(("kind", "again"), [(Theirs, 20), (Keeping, 4)])
def test_what_is_kept_is_there_for_the_next_turn(
    model: Path,  # noqa: F811
    kind: type[Theirs],
    again: int,
) -> None:
    theirs = kind(model, case_of(blocks=10, caching=True))
    assert computed(theirs, "first", prompt_of(1, 16), keep_s=1000.0) == 16
    for number in range(2, 5):
        computed(theirs, f"other-{number}", prompt_of(number, 20))
    assert computed(theirs, "next", prompt_of(1, 20)) == again


def test_it_is_let_go_before_anybody_is_refused(model: Path) -> None:  # noqa: F811
    theirs = Keeping(model, case_of(blocks=10, caching=True, reserve=True))
    computed(theirs, "first", prompt_of(1, 16), keep_s=1000.0)
    computed(theirs, "second", prompt_of(2, 16), keep_s=1000.0)
    assert theirs.pool.get_num_free_blocks() == 2
    computed(theirs, "large", prompt_of(3, 24))
    assert computed(theirs, "first again", prompt_of(1, 20)) == 4  # the latest went first
    computed(theirs, "all", prompt_of(4, 40))
    assert theirs.pool.get_num_free_blocks() == 10
    assert not theirs.scheduler._held


def test_it_is_let_go_when_its_time_is_over(model: Path) -> None:  # noqa: F811
    theirs = Keeping(model, case_of(blocks=10, caching=True))
    computed(theirs, "first", prompt_of(1, 16), keep_s=1000.0)
    ((_, blocks),) = theirs.scheduler._held
    theirs.scheduler._held = [(0.0, blocks)]
    computed(theirs, "other", prompt_of(2, 4))
    assert theirs.pool.get_num_free_blocks() == 10
    assert computed(theirs, "next", prompt_of(1, 20)) == 4  # until it is evicted


def test_it_is_let_go_at_a_reset_and_at_the_end(model: Path) -> None:  # noqa: F811
    theirs = Keeping(model, case_of(blocks=10, caching=True))
    computed(theirs, "first", prompt_of(1, 16), keep_s=1000.0)
    assert theirs.scheduler.reset_prefix_cache()
    assert theirs.pool.get_num_free_blocks() == 10
    computed(theirs, "second", prompt_of(1, 16), keep_s=1000.0)
    theirs.scheduler.shutdown()
    assert theirs.pool.get_num_free_blocks() == 10


def test_who_was_aborted_has_no_next_turn(model: Path) -> None:  # noqa: F811
    from vllm.v1.request import RequestStatus

    theirs = Keeping(model, case_of(blocks=10, caching=True))
    theirs.add("first", prompt_of(1, 30), 1, keep_s=1000.0)
    decided, _, _ = theirs.schedule(0)
    theirs.complete(decided)
    theirs.scheduler.finish_requests("first", RequestStatus.FINISHED_ABORTED)
    assert theirs.pool.get_num_free_blocks() == 10
    assert not theirs.scheduler._until_s


def test_every_scheduler_of_a_spec_is_there() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    for device, order, batching in product(("cpu", "gpu"), ("arrival", "deadline"), ("mixed", "by_length")):
        keys: dict[str, Any] = {"device": device, "prefill_order": order, "prefill_batching": batching}
        if device == "gpu":
            keys |= {role: {"attention_backend": "FLASH_ATTN"} for role in ("prefill", "decode")}
        options = phase_options(parse_spec({"model": "m", "keep_sessions": True, **keys}))
        name = options["scheduler_cls"].rsplit(".", 1)[1]
        assert resolve_obj_by_qualname(options["scheduler_cls"]).__name__ == name
        assert ("Async" in name, "Deadline" in name, "Length" in name) == (
            device == "gpu",
            order == "deadline",
            batching == "by_length",
        )
    with pytest.raises(AttributeError):
        resolve_obj_by_qualname("prefill_worker.session_scheduler_vllm.KeepingNothing")


turns = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.integers(1, 3),
        st.integers(1, 60),
        st.integers(1, 3),
        st.sampled_from([0, 99.0]),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=60, deadline=None)
@given(turns, st.integers(20, 40), st.booleans())
def test_everybody_ends_and_nothing_leaks(
    model: Path,  # noqa: F811
    asked: list[tuple[int, int, int, int, float]],
    blocks: int,
    reserve: bool,
) -> None:
    theirs = Keeping(model, case_of(blocks=blocks, reserve=reserve, caching=True))
    started = 0
    for step in range(600):
        for number, (at, session, prompt, limit, keep_s) in enumerate(asked):
            if at == step:
                theirs.add(f"r{number}", prompt_of(session, prompt), limit, keep_s=keep_s)
                started += 1
        decided, _, _ = theirs.schedule(0)
        theirs.complete(decided)
        if started == len(asked) and not theirs.scheduler.has_unfinished_requests():
            break
    assert started == len(asked)
    assert not theirs.scheduler.has_unfinished_requests()
    assert not theirs.scheduler._until_s
    theirs.scheduler.shutdown()
    assert theirs.pool.get_num_free_blocks() == theirs.pool.num_gpu_blocks - 1
