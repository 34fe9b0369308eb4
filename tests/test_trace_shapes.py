"""Steady arrivals, lengths, and the fit of the conversation trace."""

import math
import statistics
from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.trace_shapes import (
    CONVERSATION_INPUT,
    CONVERSATION_OUTPUT,
    conversation_lengths,
    conversation_like,
    empirical_lengths,
    fixed_lengths,
    steady_arrivals_s,
    with_lengths,
)


def arrivals(rate_rps: float, cv: float, count: int, seed: int = 1) -> list[float]:
    return list(islice(steady_arrivals_s(rate_rps, cv, Random(seed)), count))


@pytest.mark.parametrize("cv", [0.25, 1.0, 2.5, 5.0])
def test_gaps_have_their_rate_and_variation(cv: float) -> None:
    times = arrivals(20.0, cv, 60_000)
    gaps = [after - before for before, after in pairwise(times)]
    assert times[0] == 0.0
    # Four standard errors of a renewal process' mean gap.
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=4 * cv / math.sqrt(len(gaps)))
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.07)


def test_a_metronome_does_not_drift() -> None:
    assert arrivals(10.0, 0.0, 1001)[-1] == 100.0


@settings(max_examples=30)
@given(st.floats(1e-3, 1e4), st.sampled_from([0.0, 0.5, 1.0, 3.0, 1000.0]), st.integers(0, 9))
def test_times_never_fall_and_another_rate_only_stretches_them(rate_rps: float, cv: float, seed: int) -> None:
    times = arrivals(rate_rps, cv, 50, seed)
    assert times == sorted(times)
    assert [t * rate_rps for t in times] == pytest.approx(arrivals(1.0, cv, 50, seed))


@pytest.mark.parametrize(
    ("rate_rps", "cv"), [(0.0, 1.0), (0.0, 0.0), (math.inf, 1.0), (1.0, -1.0), (1.0, 1e-9), (1.0, math.nan)]
)
def test_impossible_processes_are_refused(rate_rps: float, cv: float) -> None:
    with pytest.raises(ValueError, match=r"rate_rps|cv"):
        arrivals(rate_rps, cv, 1)


def test_fixed_and_empirical_lengths() -> None:
    pairs = [(10, 1), (20, 2), (30, 3)]
    requests = with_lengths(range(3000), empirical_lengths(pairs), Random(2))
    drawn = [(r.input_tokens, r.output_tokens) for r in requests]
    assert [r.arrival_s for r in requests] == list(range(3000))
    assert set(drawn) == set(pairs), "pairs stay together"
    assert all(drawn.count(pair) == pytest.approx(1000, abs=110) for pair in pairs)
    assert fixed_lengths(7, 8)(Random(0)) == (7, 8)


def test_conversation_lengths_have_the_medians_of_their_fit() -> None:
    rng = Random(3)
    inputs, outputs = zip(*(conversation_lengths(rng) for _ in range(20_000)), strict=True)
    assert statistics.median(inputs) == pytest.approx(math.exp(CONVERSATION_INPUT[0]), rel=0.05)
    assert statistics.median(outputs) == pytest.approx(math.exp(CONVERSATION_OUTPUT[0]), rel=0.05)
    assert min(*inputs, *outputs) >= 1


def test_conversation_like_fits_the_model_and_repeats() -> None:
    requests = conversation_like(500, rate_rps=5.0, max_input=300, max_output=40, rng=Random(4))
    assert len(requests) == 500
    assert requests[-1].arrival_s == pytest.approx(100, rel=0.2)
    assert max(r.input_tokens for r in requests) == 300
    assert max(r.output_tokens for r in requests) == 40
    assert requests == conversation_like(500, rate_rps=5.0, max_input=300, max_output=40, rng=Random(4))
