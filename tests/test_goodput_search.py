"""The search for the largest rate that meets a target."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.goodput_search import LOWEST_RPS, find_goodput

limits = st.floats(min_value=2 * LOWEST_RPS, max_value=1e4)
starts = st.floats(min_value=1e-2, max_value=1e3)
tolerances = st.sampled_from([0.005, 0.02, 0.3])
strides = st.sampled_from([1.1, 2.0])


def falls_at(limit_rps: float) -> Callable[[float], float]:
    return lambda rate_rps: 1.0 if rate_rps <= limit_rps else 0.5


@given(limits, starts, tolerances, strides)
def test_the_result_is_within_the_tolerance_below_the_limit(
    limit_rps: float, start_rps: float, tolerance: float, stride: float
) -> None:
    found = find_goodput(falls_at(limit_rps), start_rps=start_rps, tolerance=tolerance, stride=stride)
    assert found.attainment == 1.0
    assert limit_rps / (1 + tolerance) * (1 - 1e-9) <= found.rate_rps <= limit_rps


@given(limits, starts, tolerances)
def test_every_rate_is_tried_once_and_all_are_told(
    limit_rps: float, start_rps: float, tolerance: float
) -> None:
    asked: list[float] = []

    def attainment(rate_rps: float) -> float:
        asked.append(rate_rps)
        return falls_at(limit_rps)(rate_rps)

    found = find_goodput(attainment, start_rps=start_rps, tolerance=tolerance)
    assert len(set(asked)) == len(asked)
    assert found.tried == tuple((rate, falls_at(limit_rps)(rate)) for rate in sorted(asked))
    # To bracket takes a step per doubling, to halve a ratio of 2 down to the tolerance some more.
    doublings = abs(math.log2(limit_rps / start_rps)) + 2
    assert len(asked) <= doublings + 1 + math.log2(math.log(2) / math.log1p(tolerance))


@given(starts, st.lists(st.floats(0, 1), min_size=64, max_size=64))
def test_with_any_attainment_the_result_met_the_target_or_is_zero(
    start_rps: float, noise: list[float]
) -> None:
    def attainment(rate_rps: float) -> float:
        return 0.0 if rate_rps > 1e4 else noise[hash(rate_rps) % len(noise)]

    found = find_goodput(attainment, start_rps=start_rps)
    if found.rate_rps:
        assert dict(found.tried)[found.rate_rps] == found.attainment >= 0.9
        assert any(value < 0.9 and rate <= 1.02 * found.rate_rps for rate, value in found.tried)
    else:
        assert all(value < 0.9 for _, value in found.tried)


def test_a_target_that_no_rate_meets_is_a_goodput_of_zero() -> None:
    found = find_goodput(lambda rate_rps: 0.75, lowest_rps=0.1)
    assert (found.rate_rps, found.attainment) == (0.0, 0.75)
    assert found.tried[0][0] >= 0.1 / 2


def test_a_target_that_every_rate_meets_is_an_error() -> None:
    with pytest.raises(ValueError, match="no limit"):
        find_goodput(lambda rate_rps: 1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("target", 0.0), ("target", 1.5), ("start_rps", 0.0), ("tolerance", -0.1), ("lowest_rps", math.inf)],
)
def test_what_is_no_search_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        find_goodput(falls_at(1.0), **{name: value})
