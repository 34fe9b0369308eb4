"""Costs from streams that were made with known costs."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest

from cluster.latency import Batch, DecodeCost, PrefillCost
from deploy.profiler.fit import TooFewPoints, model_of
from deploy.profiler.grid import Limits, Point, grid
from deploy.profiler.streams import PointStreams, Stream
from deploy.profiler.url import PROMPTS_BESIDE
from deploy.profiler.url_fit import (
    DECODE_BESIDE,
    PROMPT_BESIDE,
    fit_streams,
    paces,
    profile_of,
    slowdown_levels,
)

PREFILL = PrefillCost(base_s=0.003, token_s=40e-6, attention_s=20e-9, request_s=200e-6)
DECODE = DecodeCost(base_s=0.0027, request_s=300e-6, context_s=0.3e-6)
TRUE = model_of((PREFILL,), (DECODE,))
FRONTEND_S, HANDOFF_S, HANDOFF_TOKEN_S = 0.005, 0.002, 1e-6
SLOWED = 2.0
TOKENS = 50


def burst_ends_s(sent_s: float, tokens: int, requests: int) -> float:
    """When the last of some prompts has its token: an idle engine takes the first one alone."""
    end_s = sent_s + FRONTEND_S + TRUE.iteration_s(Batch(tokens, tokens**2, 1))
    if others := requests - 1:
        end_s += TRUE.iteration_s(Batch(tokens * others, tokens**2 * others, others))
    return end_s


def burst(sent_s: float, end_s: float, tokens: int, requests: int, number: int) -> list[Stream]:
    one = Stream(prompt_tokens=tokens, sent_s=sent_s, times_s=(end_s,), decodes=False, burst=number)
    return [one] * requests


def visit(point: Point, *, handoff_s: float = HANDOFF_S) -> PointStreams:
    """A point as a server with these costs and a noiseless network would answer it."""
    if point.kind == "prefill":
        end_s = burst_ends_s(0.0, point.tokens, point.requests)
        return PointStreams(point=point, streams=tuple(burst(0.0, end_s, point.tokens, point.requests, 0)))
    slow = SLOWED if point.beside else 1.0
    now_s = FRONTEND_S + TRUE.iteration_s(Batch(point.tokens, point.tokens**2, 1))
    times = [now_s]
    for generated in range(1, TOKENS):
        context = point.requests * (point.tokens + generated)
        batch = Batch(decode_requests=point.requests, decode_context_tokens=context)
        now_s += slow * TRUE.iteration_s(batch)
        if generated == 1 and handoff_s:
            now_s += handoff_s + point.tokens * HANDOFF_TOKEN_S
        times.append(now_s)
    streams = [Stream(prompt_tokens=point.tokens, sent_s=0.0, times_s=tuple(times))] * point.requests
    if point.beside:
        sent_s, number = times[0], 0
        while sent_s < times[-1]:
            end_s = sent_s + slow * burst_ends_s(0.0, point.beside, PROMPTS_BESIDE)
            streams += burst(sent_s, end_s, point.beside, PROMPTS_BESIDE, number)
            sent_s, number = end_s, number + 1
    return PointStreams(point=point, streams=tuple(streams))


POINTS = grid(Limits(max_prompt=1024, max_requests=16, kv_tokens=100_000))


def test_the_costs_of_a_server_are_found() -> None:
    found = fit_streams([visit(point) for point in POINTS])
    (prefill,), (decode,) = found.fit.prefill, found.fit.decode
    assert prefill.token_s == pytest.approx(PREFILL.token_s, rel=0.01)
    assert prefill.attention_s == pytest.approx(PREFILL.attention_s, rel=0.01)
    assert prefill.request_s == pytest.approx(PREFILL.request_s, rel=0.01)
    assert decode.base_s == pytest.approx(DECODE.base_s, rel=0.01)
    assert decode.request_s == pytest.approx(DECODE.request_s, rel=0.01)
    assert decode.context_s == pytest.approx(DECODE.context_s, rel=0.01)


def test_fixed_time_is_divided_between_engine_and_front_end() -> None:
    """DECODE's fixed part of a lone request is as large as PREFILL's base, as in one engine."""
    found = fit_streams([visit(point) for point in POINTS])
    assert found.frontend_s == pytest.approx(FRONTEND_S, rel=0.02)
    assert found.fit.prefill[0].base_s == pytest.approx(PREFILL.base_s, rel=0.02)
    lone = Batch(256, 256**2, 1)
    model = model_of(found.fit.prefill, found.fit.decode)
    assert found.frontend_s + model.iteration_s(lone) == pytest.approx(
        FRONTEND_S + TRUE.iteration_s(lone), rel=0.01
    )


def test_a_handover_is_found_where_there_is_one() -> None:
    split = fit_streams([visit(point) for point in POINTS])
    assert split.handoff_s == pytest.approx(HANDOFF_S, rel=0.05)
    assert split.handoff_token_s == pytest.approx(HANDOFF_TOKEN_S, rel=0.05)
    unsplit = fit_streams([visit(point, handoff_s=0.0) for point in POINTS])
    assert unsplit.handoff_s < 2e-5


def test_what_slows_one_phase_beside_the_other_is_told_and_not_fitted() -> None:
    found = fit_streams([visit(point) for point in POINTS])
    assert found.fit.residuals[DECODE_BESIDE].bias == pytest.approx(1 / SLOWED - 1, abs=0.02)
    assert found.fit.residuals[PROMPT_BESIDE].bias == pytest.approx(1 / SLOWED - 1, abs=0.02)
    usual = round(fmean(point.requests for point in POINTS if point.kind == "mixed"))
    assert found.decode_slowdown == ((usual, pytest.approx(SLOWED, rel=0.03)),)
    assert found.prompt_slowdown == pytest.approx(SLOWED, rel=0.03)
    assert found.fit.residuals["decode, held out"].p90 < 0.01


def test_nothing_is_slowed_where_nothing_was_beside() -> None:
    found = fit_streams([visit(point) for point in POINTS if point.kind != "mixed"])
    assert (found.decode_slowdown, found.prompt_slowdown) == ((), 1.0)
    assert DECODE_BESIDE not in found.fit.residuals


def test_a_burst_that_was_cut_short_tells_nothing() -> None:
    whole = visit(Point("mixed", 4, 128, 64))
    late = Stream(prompt_tokens=64, sent_s=9.0, times_s=(9.001,), decodes=False, burst=99)
    points = [visit(point) for point in POINTS if point.kind != "mixed"]
    one, other = (
        fit_streams([*points, found]) for found in (whole, replace(whole, streams=(*whole.streams, late)))
    )
    assert one == other


def test_too_few_visits() -> None:
    with pytest.raises(TooFewPoints):
        fit_streams([visit(Point("prefill", 1, 16)), visit(Point("decode", 1, 16))])


def test_a_batch_size_that_is_faster_than_smaller_ones_gets_its_own_level() -> None:
    """As where a library has one kernel for up to two rows and a better one for more."""
    at = {1: 0.0030, 2: 0.0035, 3: 0.0025, 4: 0.0026, 6: 0.0030, 8: 0.0034, 12: 0.0042, 16: 0.0050}

    def with_kernels(found: PointStreams) -> PointStreams:
        if found.point.kind != "decode":
            return found
        step_s = at[found.point.requests]
        first = found.streams[0].times_s[0]
        times = (first, *(first + step_s * (n + 1) for n in range(TOKENS)))
        streams = [Stream(prompt_tokens=found.point.tokens, sent_s=0.0, times_s=times)] * found.point.requests
        return PointStreams(point=found.point, streams=tuple(streams))

    found = fit_streams([with_kernels(visit(point)) for point in POINTS for _ in range(2)])
    model = model_of(found.fit.prefill, found.fit.decode)
    for requests, seconds in {**at, 10: 0.0038}.items():
        assert model.iteration_s(Batch(decode_requests=requests)) == pytest.approx(seconds, rel=0.02)
    assert found.fit.residuals["decode, held out"].p90 < 0.02


def test_the_pace_of_points_is_told_beside_a_profile() -> None:
    points = [visit(point) for point in POINTS]
    profile = profile_of(fit_streams(points), "m", "http://elsewhere", points)
    assert paces(profile, points) == pytest.approx((1.0, 1.0), rel=0.01)
    assert paces(profile, [found for found in points if found.point.kind == "mixed"])[0] == 1.0

    def slower(stream: Stream) -> Stream:
        times = tuple(stream.sent_s + 1.5 * (at_s - stream.sent_s) for at_s in stream.times_s)
        return replace(stream, times_s=times)

    late = [replace(found, streams=tuple(map(slower, found.streams))) for found in points]
    assert paces(profile, late) == pytest.approx((1.5, 1.5), rel=0.02)


def test_what_slows_a_lone_decode_more_than_a_batch_is_told_by_size() -> None:
    lone, few, many = [(1, 1.4), (1, 1.2)] * 3, [(3, 1.1), (4, 1.2), (4, 1.2)] * 2, [(16, 1.1), (16, 9.0)]
    # Two of sixteen say little by themselves, and nine times as long was a disturbance.
    levels = slowdown_levels([*many, *lone, *few])
    assert levels == ((1, pytest.approx(1.3)), (7, pytest.approx((2 * 3.5 + 1.1) / 7)))
    assert slowdown_levels([(1, 0.9), (1, 0.8)]) == ((1, 1.0),)
    assert slowdown_levels([]) == ()
