"""Curves over the time of a simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.simulator.result import STAGES, IterationSpan, SimulatedRequest, SimulationResult
from deploy.simulator.series import (
    MAX_BINS,
    Bins,
    Presence,
    arrival_rates,
    attainment_over_time,
    computing,
    cumulative,
    requests_in_stages,
)
from tests import simulated
from tests.simulated import request, result

TEN = Bins(start_s=0.0, width_s=10.0, count=10)


def test_bins_cover_the_simulation() -> None:
    bins = Bins.of(result(request((1.0,), arrival_s=5.0), request((95.0,), arrival_s=10.0)))
    assert bins.start_s == 5.0
    assert bins.end_s == pytest.approx(105.0)
    assert (bins.place(0.0), bins.place(5.0), bins.place(999.0)) == (0, 0, bins.count - 1)
    many = result(*[request((1.0,))] * 20_000)
    assert Bins.of(many).count == MAX_BINS
    assert Bins.of(result(duration_s=0.0)).width_s > 0, "nothing happened, yet it can be drawn"


def test_arrivals_and_attainment() -> None:
    requests = [
        request((0.1,), arrival_s=1.0),
        request((9.0,), arrival_s=2.0),
        request((), arrival_s=3.0, status="cancelled"),
        request((), arrival_s=99.0, status="rejected"),
    ]
    assert arrival_rates(requests, TEN) == [0.3, *[0.0] * 8, 0.1]
    assert attainment_over_time(requests, TEN) == [0.5, *[None] * 8, 0.0]


def test_presence_is_averaged_over_each_bin() -> None:
    presence = Presence(TEN)
    presence.add(5.0, 25.0)
    presence.add(12.0, 14.0)
    assert presence.means() == pytest.approx([0.5, 1.2, 0.5, *[0.0] * 7])


def test_a_request_is_in_one_stage_after_the_other() -> None:
    stages = requests_in_stages([request((10.0, 5.0, 0.0, 5.0, 0.0, 20.0), arrival_s=10.0)], TEN)
    assert list(stages) == list(STAGES)
    assert stages["prefill_queue"] == pytest.approx([0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    assert stages["prefill"] == pytest.approx([0, 0, 0.5, 0, 0, 0, 0, 0, 0, 0])
    assert stages["transfer"] == pytest.approx([0, 0, 0.5, 0, 0, 0, 0, 0, 0, 0])
    assert stages["decode"] == pytest.approx([0, 0, 0, 1, 1, 0, 0, 0, 0, 0])
    assert not any(stages["transfer_queue"])


def test_what_an_instance_computed() -> None:
    spans = [
        IterationSpan("p", 0.0, 5.0, "prefill", 1, 64, 0),
        IterationSpan("p", 5.0, 15.0, "decode", 9, 0, 4),
        IterationSpan("d", 90.0, 100.0, "decode", 9, 0, 4),
    ]
    ran = computing(spans, TEN)
    assert ran["p"]["prefill"] == pytest.approx([0.5, *[0.0] * 9])
    assert ran["p"]["decode"] == pytest.approx([0.5, 0.5, *[0.0] * 8])
    assert ran["d"] == {"decode": pytest.approx([*[0.0] * 9, 1.0])}


def test_a_cumulative_curve_of_few_values_has_them_all() -> None:
    assert cumulative([3.0, 1.0, 2.0, 2.0]) == [(1.0, 0.25), (2.0, 0.5), (2.0, 0.75), (3.0, 1.0)]
    assert cumulative([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(min_value=0, max_value=1e6), min_size=1, max_size=2000))
def test_a_cumulative_curve_rises_to_one_in_few_points(values: Sequence[float]) -> None:
    curve = cumulative(values)
    assert len(curve) <= 202
    assert curve == sorted(curve)
    assert curve[-1] == (max(values), 1.0)
    for value, share in curve:
        assert sum(one <= value for one in values) >= round(share * len(values))


@settings(deadline=None)
@given(simulated.results())
def test_curves_are_in_range_and_lose_nothing(found: SimulationResult) -> None:
    bins = Bins.of(found)
    requests: Sequence[SimulatedRequest] = found.requests
    assert sum(arrival_rates(requests, bins)) * bins.width_s == pytest.approx(len(requests))
    assert all(part is None or 0 <= part <= 1 for part in attainment_over_time(requests, bins))
    in_stages = requests_in_stages(requests, bins)
    for place, stage in enumerate(STAGES):
        spent_s = math.fsum(one.stages[place] for one in requests)
        assert sum(in_stages[stage]) * bins.width_s == pytest.approx(spent_s, abs=1e-6)
    for kinds in computing(found.spans, bins).values():
        assert all(0 <= share <= 1 for shares in kinds.values() for share in shares)
