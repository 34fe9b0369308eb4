"""Costs from streams that were made with known costs."""

from __future__ import annotations

import pytest

from cluster.latency import Batch, DecodeCost, PrefillCost
from deploy.profiler.fit import TooFewPoints, model_of
from deploy.profiler.grid import Limits, Point, grid
from deploy.profiler.streams import PointStreams, Stream
from deploy.profiler.url_fit import DECODE_BESIDE, PROMPT_BESIDE, fit_streams

PREFILL = PrefillCost(base_s=0.003, token_s=40e-6, attention_s=20e-9, request_s=200e-6)
DECODE = DecodeCost(base_s=0.0027, request_s=300e-6, context_s=0.3e-6)
TRUE = model_of((PREFILL,), (DECODE,))
FRONTEND_S, HANDOFF_S, HANDOFF_TOKEN_S = 0.005, 0.002, 1e-6
SLOWED = 2.0
TOKENS = 50


def visit(point: Point, *, handoff_s: float = HANDOFF_S) -> PointStreams:
    """A point as a server with these costs and a noiseless network would answer it."""
    if point.kind == "prefill":
        batch = Batch(
            point.tokens * point.requests, point.tokens**2 * point.requests, prefill_requests=point.requests
        )
        first_s = FRONTEND_S + TRUE.iteration_s(batch)
        one = Stream(prompt_tokens=point.tokens, sent_s=0.0, times_s=(first_s,), decodes=False)
        return PointStreams(point=point, streams=(one,) * point.requests)
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
        first_s = slow * (FRONTEND_S + TRUE.iteration_s(Batch(point.beside, point.beside**2, 1)))
        at_s = times[0]
        while at_s < times[-1]:
            end_s = at_s + first_s
            streams.append(Stream(prompt_tokens=point.beside, sent_s=at_s, times_s=(end_s,), decodes=False))
            at_s = end_s
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
    assert found.decode_slowdown == pytest.approx(SLOWED, rel=0.03)
    assert found.prompt_slowdown == pytest.approx(SLOWED, rel=0.03)
    assert found.fit.residuals["decode, held out"].p90 < 0.01


def test_nothing_is_slowed_where_nothing_was_beside() -> None:
    found = fit_streams([visit(point) for point in POINTS if point.kind != "mixed"])
    assert (found.decode_slowdown, found.prompt_slowdown) == (1.0, 1.0)
    assert DECODE_BESIDE not in found.fit.residuals


def test_too_few_visits() -> None:
    with pytest.raises(TooFewPoints):
        fit_streams([visit(Point("prefill", 1, 16)), visit(Point("decode", 1, 16))])
