"""From the streams of a server to the costs of its engines, its front end and its hand-over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from cluster.latency import Batch
from cluster.latency_fit import Sample, summarise
from deploy.profiler.engine import Measured
from deploy.profiler.fit import Fit, fit_costs, medians, model_of
from deploy.profiler.streams import (
    PointStreams,
    burst_s,
    decode_segments,
    handover,
    split_fixed_part,
)

DECODE_BESIDE, PROMPT_BESIDE = "decode beside prompts", "prompt beside decodes"


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlFit:
    """What was found out about a server.

    Attributes:
        fit: costs of the engines. Its residuals also say what decodes beside prompts, and prompts beside
            decodes, take more than each alone: processes that share cores or a GPU slow each other.
        samples: what it was fitted to and checked on; prefill ones hold `frontend_s`.
        decode_slowdown, prompt_slowdown: median factor of the same, 1 without any such measurement.
        frontend_s: part of the time to first token that keeps no engine busy.
        handoff_s, handoff_token_s: of a hand-over, fixed and per prompt token; 0 where one engine does both.
    """

    fit: Fit
    samples: list[Sample]
    decode_slowdown: float
    prompt_slowdown: float
    frontend_s: float
    handoff_s: float
    handoff_token_s: float


def fit_streams(visits: Sequence[PointStreams]) -> UrlFit:
    """Raises `fit.TooFewPoints`."""
    alone: list[Measured] = []
    beside: list[Measured] = []
    for visit in visits:
        if visit.point.kind == "prefill":
            alone.append(_burst(visit))
            continue
        for segment in decode_segments(visit.streams):
            measured = Measured(point=visit.point, batch=segment.batch, seconds=segment.seconds)
            if not segment.beside:
                alone.append(measured)
            elif visit.point.kind == "mixed":
                beside.append(measured)
    samples = medians(alone, least_repeats=1)
    # Seen through a network and a front end, so few batches do not bear more.
    fit = fit_costs(samples, max_segments=1)
    together = model_of(fit.prefill, fit.decode)
    slowed_decodes = [m.seconds / together.iteration_s(m.batch) for m in beside]
    slowed_prompts = [
        stream.ttft_s / together.iteration_s(_whole(stream.prompt_tokens))
        for visit in visits
        if visit.point.kind == "mixed"
        for stream in visit.streams
        if not stream.decodes
    ]
    residuals = dict(fit.residuals)
    for name, factors in ((DECODE_BESIDE, slowed_decodes), (PROMPT_BESIDE, slowed_prompts)):
        if factors:
            residuals[name] = summarise([1 / factor - 1 for factor in factors])
    prefill, frontend_s = split_fixed_part(fit.prefill, fit.decode)
    handoff_s, handoff_token_s = handover(
        (stream.prompt_tokens, second_s - first_s - together.iteration_s(_lone(stream.prompt_tokens)))
        for visit in visits
        if visit.point.kind == "decode" and visit.point.requests == 1
        for stream in visit.streams
        for first_s, second_s in [stream.times_s[:2]]
    )
    return UrlFit(
        fit=replace(fit, prefill=prefill, residuals=residuals),
        samples=samples,
        decode_slowdown=median(slowed_decodes or [1.0]),
        prompt_slowdown=median(slowed_prompts or [1.0]),
        frontend_s=frontend_s,
        handoff_s=handoff_s,
        handoff_token_s=handoff_token_s,
    )


def _burst(visit: PointStreams) -> Measured:
    lengths = [stream.prompt_tokens for stream in visit.streams]
    batch = Batch(
        prefill_tokens=sum(lengths),
        prefill_attention=sum(length**2 for length in lengths),
        prefill_requests=len(lengths),
    )
    return Measured(point=visit.point, batch=batch, seconds=burst_s(visit.streams))


def _whole(tokens: int) -> Batch:
    return Batch(prefill_tokens=tokens, prefill_attention=tokens**2, prefill_requests=1)


def _lone(context_tokens: int) -> Batch:
    return Batch(decode_requests=1, decode_context_tokens=context_tokens)
