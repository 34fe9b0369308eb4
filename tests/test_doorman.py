"""Who is let in at a prefill instance."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine import tell_doorman
from cluster.spec import ClusterSpec, parse_spec
from cluster.wire import Offer
from prefill_worker.doorman import LEAST_STRETCHES, LearningDoorman
from prefill_worker.phase import SATURATING_TOKENS, doorman_of

BATCH = 1000
# A trained doorman's instance computes so many tokens in a second.
SPEED = 10_000


def offer(name: str, tokens: int = 500, due_in_s: float | None = None, *, must_take: bool = False) -> Offer:
    return Offer(name, tokens, due_in_s, must_take)


def new(longest_s: float = 60.0, *, by_deadline: bool = False) -> LearningDoorman:
    return LearningDoorman(longest_s, batch_tokens=BATCH, by_deadline=by_deadline)


def teach(doorman: LearningDoorman, *, speed: float = SPEED, stretches: int = 9, now_s: float = 0.0) -> float:
    """Full iterations, one after the other, at that speed; returns when they have ended."""
    for number in range(stretches):
        assert doorman.asked(offer(f"taught-{number}", 2 * BATCH, must_take=True), now_s) is None
        now_s += 2 * BATCH / speed
        doorman.answered([f"taught-{number}"], now_s)
    return now_s


def fill(doorman: LearningDoorman, tokens: int, now_s: float, due_in_s: float | None = None) -> None:
    for number in range(tokens // 500):
        assert doorman.asked(offer(f"ahead-{number}", 500, due_in_s, must_take=True), now_s) is None


def test_a_prompt_that_would_be_late_is_refused_and_told_the_wait() -> None:
    doorman = new()
    now_s = teach(doorman)
    fill(doorman, 20_000, now_s)
    assert doorman.asked(offer("late", due_in_s=1.0), now_s) == pytest.approx(2.0)
    assert doorman.asked(offer("in-time", due_in_s=2.5), now_s) is None
    # What was refused is not there.
    assert doorman.tokens == 20_500


def test_a_prompt_without_a_bound_is_refused_where_no_prompt_may_wait_for_so_long() -> None:
    doorman = new(longest_s=1.0)
    now_s = teach(doorman)
    fill(doorman, 20_000, now_s)
    assert doorman.asked(offer("r"), now_s) == pytest.approx(2.0)


def test_its_own_length_counts() -> None:
    doorman = new()
    now_s = teach(doorman)
    fill(doorman, 5000, now_s)
    assert doorman.asked(offer("long", 20_000, 1.0), now_s) is not None
    assert doorman.asked(offer("short", 1000, 1.0), now_s) is None


def test_nobody_is_refused_before_something_was_learned() -> None:
    doorman = new()
    teach(doorman, stretches=LEAST_STRETCHES - 1)
    fill(doorman, 1_000_000, 99.0)
    assert doorman.asked(offer("r", due_in_s=0.001), 99.0) is None


def test_few_short_prompts_teach_nothing() -> None:
    # Alone, they take as long as many of them together.
    doorman = new()
    for number in range(100):
        doorman.asked(offer(f"r{number}", 10), float(number))
        doorman.answered([f"r{number}"], number + 0.5)
    fill(doorman, 100_000, 200.0)
    assert doorman.asked(offer("r", due_in_s=0.001), 200.0) is None


def test_who_must_be_taken_is() -> None:
    doorman = new()
    now_s = teach(doorman)
    fill(doorman, 50_000, now_s)
    assert doorman.asked(offer("r", due_in_s=0.001, must_take=True), now_s) is None


def test_time_that_passes_shortens_the_wait() -> None:
    doorman = new()
    now_s = teach(doorman)
    fill(doorman, 20_000, now_s)
    doorman.answered(["ahead-0", "ahead-1"], now_s + 0.1)
    assert doorman.asked(offer("r", due_in_s=0.1), now_s + 0.15) == pytest.approx(1.85)
    doorman.left([f"ahead-{number}" for number in range(20, 40)], now_s + 0.15)
    assert doorman.asked(offer("r", due_in_s=0.1), now_s + 0.15) == pytest.approx(0.85)


def test_an_instance_that_stalls_is_found_slow_before_it_ends_anything() -> None:
    doorman = new()
    now_s = teach(doorman)
    fill(doorman, 5000, now_s)
    assert doorman.asked(offer("a", due_in_s=3.0), now_s) is None
    # A whole iteration should have taken 0.1 s.
    # It may stand still for as long again; no pause of a machine makes it 20 times as slow.
    assert doorman.asked(offer("b", due_in_s=2.0), now_s + 2.0) == pytest.approx(0.55 - 0.1 + 2.0)
    assert doorman.asked(offer("c", due_in_s=4.0), now_s + 2.0) is None


def test_it_learns_a_new_speed() -> None:
    doorman = new()
    now_s = teach(doorman)
    now_s = teach(doorman, speed=SPEED / 4, stretches=20, now_s=now_s)
    fill(doorman, 20_000, now_s)
    assert doorman.asked(offer("r", due_in_s=0.1), now_s) == pytest.approx(8.0, rel=0.1)


def test_an_instance_that_was_slow_and_takes_one_at_a_time_is_found_to_be_fast_again() -> None:
    doorman = new()
    now_s = teach(doorman, speed=SPEED / 10)
    for number in range(60):
        assert doorman.asked(offer(f"r{number}", 300), now_s) is None
        now_s += 300 / SPEED
        doorman.answered([f"r{number}"], now_s)
    fill(doorman, 20_000, now_s)
    assert doorman.asked(offer("r", due_in_s=0.1), now_s) == pytest.approx(2.0, rel=0.1)


def test_from_those_that_leave_before_their_token_it_learns_how_slow_it_is_at_least() -> None:
    for by_deadline in (False, True):
        doorman = new(by_deadline=by_deadline)
        now_s = teach(doorman)
        for _ in range(20):
            fill(doorman, 2000, now_s)
            now_s += 1.0
            doorman.left([f"ahead-{number}" for number in range(4)], now_s)
        fill(doorman, 2000, now_s)
        # In 1 s it has not computed a thousand. By deadline it goes on with an iteration's, at most.
        wait_s = doorman.asked(offer("r", due_in_s=0.1), now_s)
        assert wait_s == pytest.approx(1.0 if by_deadline else 2.0, rel=0.1)
        # Who leaves in time tells nothing.
        quick = new(by_deadline=by_deadline)
        now_s = teach(quick)
        for _ in range(20):
            fill(quick, 2000, now_s)
            quick.left([f"ahead-{number}" for number in range(4)], now_s + 0.05)
        fill(quick, 2000, now_s)
        assert quick.asked(offer("r", due_in_s=0.1), now_s) == pytest.approx(0.1 if by_deadline else 0.2)


def test_by_deadline_who_leaves_tells_of_those_that_went_before_it_until_it_was_due() -> None:
    doorman = new(by_deadline=True)
    now_s = teach(doorman)
    assert doorman.asked(offer("loose", 1000, 2.0, must_take=True), now_s) is None
    for number in range(7):  # they come later, and go first
        now_s += 0.25
        assert doorman.asked(offer(f"tight-{number}", 2000, 0.1, must_take=True), now_s) is None
        doorman.answered([f"tight-{number}"], now_s + 0.2)
    doorman.left(["loose"], now_s + 0.25)
    # 15,000 in less than 2 s: no slower than it is.
    assert doorman.asked(offer("first", 1000), now_s + 0.25) is None
    assert doorman.asked(offer("next", 1000, 0.05), now_s + 0.25) == pytest.approx(0.1, rel=0.3)


def test_by_deadline_only_those_that_are_due_sooner_are_ahead() -> None:
    doorman = new(by_deadline=True)
    now_s = teach(doorman)
    fill(doorman, 20_000, now_s, due_in_s=5.0)
    # Whoever is computed is computed to the end of the iteration.
    assert doorman.asked(offer("urgent", 500, due_in_s=0.2), now_s) is None
    assert doorman.asked(offer("later", 500, due_in_s=0.01), now_s) == pytest.approx(0.1)
    assert doorman.asked(offer("none", 500), now_s) is None
    # Whoever is late is computed last.
    assert doorman.asked(offer("after", 500, due_in_s=0.5), now_s + 5.5) is not None  # stalled, too
    assert new(by_deadline=True).asked(offer("r"), 0.0) is None


def test_outputs_without_tokens_are_ends() -> None:
    doorman = new()
    for name in ("a", "b", "c"):
        doorman.asked(offer(name), 0.0)
    outputs = [
        SimpleNamespace(request_id="a", new_token_ids=[1], finish_reason=None),
        SimpleNamespace(request_id="b", new_token_ids=[], finish_reason=2),
        SimpleNamespace(request_id="c", new_token_ids=[], finish_reason=None),
    ]
    tell_doorman(doorman, outputs, 1.0)
    assert (len(doorman), doorman.tokens) == (1, 500)


event = st.one_of(
    st.tuples(st.just("offer"), st.integers(1, 5000), st.one_of(st.none(), st.floats(-1, 20)), st.booleans()),
    st.tuples(st.just("answer"), st.integers(0, 9)),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.just("pass"), st.floats(0, 3)),
)


def run(doorman: LearningDoorman, events: list[Any], now_s: float) -> tuple[dict[str, int], float]:
    """The prompts that are there, by name with their tokens, and the time."""
    there: dict[str, int] = {}
    for number, (what, *rest) in enumerate(events):
        if what == "offer":
            tokens, due_in_s, must_take = rest
            was_empty = not there
            wait_s = doorman.asked(offer(f"r{number}", tokens, due_in_s, must_take=must_take), now_s)
            if wait_s is None:
                there[f"r{number}"] = tokens
            else:
                assert not was_empty
                assert not must_take
                assert 0 <= wait_s < math.inf
        elif what == "pass":
            now_s += rest[0]
        else:
            names = list(there)[: rest[0]]
            (doorman.answered if what == "answer" else doorman.left)([*names, "unknown"], now_s)
            for name in names:
                del there[name]
        assert (len(doorman), doorman.tokens) == (len(there), sum(there.values()))
    return there, now_s


@given(st.lists(event, max_size=60), st.booleans(), st.booleans())
def test_it_knows_what_is_there_and_an_empty_instance_refuses_nobody(
    events: list[Any], by_deadline: bool, is_taught: bool
) -> None:
    doorman = new(longest_s=5.0, by_deadline=by_deadline)
    now_s = teach(doorman) if is_taught else 0.0
    there, now_s = run(doorman, events, now_s)
    doorman.left(list(there), now_s)
    assert doorman.tokens == 0
    assert doorman.asked(offer("last", 10**9, 0.001), now_s) is None


@given(
    st.lists(event, max_size=30),
    st.integers(1, 20_000),
    st.floats(0, 2),
    st.one_of(st.none(), st.floats(0.01, 20)),
    st.booleans(),
)
def test_a_longer_queue_is_no_shorter_wait(
    events: list[Any], more: int, later_s: float, due_in_s: float | None, by_deadline: bool
) -> None:
    waits: list[float | None] = []
    for extra in (0, more):
        doorman = new(longest_s=5.0, by_deadline=by_deadline)
        there, now_s = run(doorman, events, teach(doorman))
        if not there:
            return
        if extra:
            doorman.asked(offer("extra", extra, due_in_s, must_take=True), now_s)
        waits.append(doorman.asked(offer("r", 500, due_in_s), now_s + later_s))
    if waits[0] is not None:
        assert waits[1] is not None
        assert waits[1] >= waits[0] - 1e-9


def spec(**keys: Any) -> ClusterSpec:
    return parse_spec({"model": "m", "device": "cpu", "engine": "sim", **keys})


def test_what_the_spec_says_of_it() -> None:
    assert doorman_of(spec(prefill_queue="open")) is None
    assert doorman_of(spec(policy="unsplit")) is None
    found = doorman_of(spec(prefill_order="deadline", deadlines={"prefill_s": 7.0}))
    assert found is not None
    assert (found._longest_s, found._batch_tokens, found._by_deadline) == (7.0, SATURATING_TOKENS, True)
    options = {"engine_options": {"max_num_batched_tokens": 512}, "pipeline_parallel_size": 2}
    found = doorman_of(spec(prefill=options))
    assert found is not None
    assert found._batch_tokens == 1024
