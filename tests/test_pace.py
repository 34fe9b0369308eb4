"""The factor on predictions, and the chance to keep a bound."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.pace import FIRST_SPREAD, LEAST_SPREAD, WINDOW_S, Pace, PromptPace, chance


def test_it_finds_how_much_longer_things_take() -> None:
    pace, rng = Pace(), Random(1)
    for _ in range(200):
        pace.learn(1.0, 1.4 * math.exp(rng.gauss(0, 0.1)))
    assert pace.factor == pytest.approx(1.4, rel=0.05)
    assert pace.spread == pytest.approx(0.08, rel=0.4)  # mean absolute value of a normal deviate of 0.1


def test_it_follows_a_change() -> None:
    pace = Pace()
    for took_s in [1.0] * 50 + [1.8] * 60:
        pace.learn(1.0, took_s)
    assert pace.factor == pytest.approx(1.8, rel=0.1)


def test_one_stall_hardly_moves_it() -> None:
    pace = Pace()
    for took_s in [1.0] * 50 + [100.0]:
        pace.learn(1.0, took_s)
    assert pace.factor < 1.03


def test_what_took_no_time_tells_nothing() -> None:
    pace = Pace()
    pace.learn(0.0, 1.0)
    pace.learn(1.0, 0.0)
    assert (pace.factor, pace.spread) == (1.0, FIRST_SPREAD)


@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)), max_size=50))
def test_it_is_bounded(seen: list[tuple[float, float]]) -> None:
    pace = Pace(most=2.0)
    for predicted_s, actual_s in seen:
        pace.learn(predicted_s, actual_s)
    assert 0.5 * (1 - 1e-9) <= pace.factor <= 2.0 * (1 + 1e-9)
    assert pace.spread >= LEAST_SPREAD


def test_prompts_are_judged_by_what_is_done_in_a_while() -> None:
    """One that ends with others in an iteration seems to take nothing, the first of them all of it."""
    pace = PromptPace()
    for _ in range(100):
        for took_s in (WINDOW_S * 1.2, 0.0):
            pace.worked(WINDOW_S / 2, took_s)
    assert pace.factor == pytest.approx(1.2, rel=0.02)
    alone = PromptPace()
    alone.worked(WINDOW_S / 2, WINDOW_S)
    assert alone.factor == 1.0  # too little to tell


def test_what_comes_on_top_of_a_queue_is_of_one_length() -> None:
    pace, rng = PromptPace(), Random(1)
    for _ in range(500):
        pace.worked(WINDOW_S, WINDOW_S)
        queue_s = rng.uniform(0.2, 2.0)
        pace.came(queue_s + pace.late_s, queue_s + 0.08 + rng.gauss(0, 0.02))
    assert pace.late_s == pytest.approx(0.08, abs=0.01)
    # So the error that is left weighs less in a long wait.
    assert pace.spread(0.2, 0.1) == pytest.approx(0.016 / 0.2, rel=0.4)
    assert pace.spread(2.0, 1.9) == LEAST_SPREAD


@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(0, 1e6)), min_size=1, max_size=50))
def test_lateness_is_bounded(seen: list[tuple[float, float]]) -> None:
    pace = PromptPace()
    for predicted_s, actual_s in seen:
        pace.came(predicted_s, actual_s)
    predicted_s, _ = seen[-1]
    assert -predicted_s / 2 <= pace.late_s <= predicted_s
    assert 0 < pace.spread(predicted_s, predicted_s) <= 0.6


def test_chances() -> None:
    assert chance(1.0, 1.0, 0.1) == pytest.approx(0.5)
    assert chance(1.0, 0.9, 0.1) == pytest.approx(0.857, abs=0.01)
    assert chance(math.inf, 1e9, 0.1) == 1.0
    assert chance(0.0, 0.1, 0.1) == 0.0
    assert chance(1.0, 0.0, 0.1) == 1.0
    assert chance(1.0, 1e9, 0.1) == 0.0


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0.05, 0.6))
def test_a_longer_wait_is_no_better_chance(bound: float, one: float, other: float, spread: float) -> None:
    assert chance(bound, min(one, other), spread) >= chance(bound, max(one, other), spread)
