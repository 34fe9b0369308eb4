"""From the streams of a server to the costs of its engines, its front end and its hand-over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from urllib.parse import urlsplit

from cluster.latency import Batch, LatencyProfile
from cluster.latency_fit import Sample, fit_decode, fit_decode_levels, residuals_of, summarise
from deploy.profiler.engine import Measured
from deploy.profiler.fit import DECODE, SEGMENT_GAIN, Fit, fit_costs, medians, model_of, table, too_few
from deploy.profiler.machine import machine, versions
from deploy.profiler.streams import (
    PointStreams,
    burst_s,
    decode_segments,
    fixed_part_s,
    handover,
    split_fixed_part,
)
from deploy.profiler.url import PROMPTS_BESIDE

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
    bursts: list[Measured] = []
    decodes: list[Measured] = []
    beside: list[Measured] = []
    for visit in visits:
        if visit.point.kind == "prefill":
            bursts += _bursts(visit, visit.point.requests)
            continue
        for segment in decode_segments(visit.streams):
            measured = Measured(point=visit.point, batch=segment.batch, seconds=segment.seconds)
            if not segment.beside:
                decodes.append(measured)
            elif visit.point.kind == "mixed":
                beside.append(measured)
    # Seen through a network and a front end, so few batches do not bear more than one segment.
    decode_samples = medians(decodes, least_repeats=1)
    try:
        again_s = fixed_part_s(fit_decode(decode_samples, 1)[0])
    except ValueError as error:
        raise too_few((), decode_samples, error) from None
    samples = medians((_one_iteration(burst, again_s) for burst in bursts), least_repeats=1)
    samples = sorted(samples + decode_samples)
    fit = _with_levels(fit_costs(samples, max_segments=1), decodes, decode_samples)
    together = model_of(fit.prefill, fit.decode)
    slowed_decodes = [m.seconds / together.iteration_s(m.batch) for m in beside]
    slowed_prompts = [
        burst.seconds / (together.iteration_s(burst.batch) + again_s)
        for visit in visits
        if visit.point.kind == "mixed"
        for burst in _bursts(visit, PROMPTS_BESIDE)
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


def _with_levels(fit: Fit, decodes: Sequence[Measured], samples: Sequence[Sample]) -> Fit:
    """The fit with a level for each size of decoding batches, if that says more of visits it did not see."""
    seen, unseen = medians(decodes[::2], least_repeats=1), medians(decodes[1::2], least_repeats=1)
    try:
        line = residuals_of(model_of(fit.prefill, fit_decode(seen, 1)[0]), unseen)
        levels = residuals_of(model_of(fit.prefill, fit_decode_levels(seen)), unseen)
    except ValueError:  # too few for halves
        return fit
    if levels.median > (1 - SEGMENT_GAIN) * line.median:
        return fit
    return replace(fit, decode=fit_decode_levels(samples), residuals={**fit.residuals, DECODE: levels})


def paces(profile: LatencyProfile, visits: Sequence[PointStreams]) -> tuple[float, float]:
    """How many times as long as a profile says prompts, and decodes, took: medians over points, 1 without."""
    model, again_s = model_of(profile.prefill, profile.decode), fixed_part_s(profile.decode)
    prompts, decodes = [], []
    for visit in visits:
        if visit.point.kind == "prefill":
            for burst in _bursts(visit, visit.point.requests):
                expected_s = model.iteration_s(burst.batch) + profile.frontend_s
                prompts.append(_one_iteration(burst, again_s).seconds / expected_s)
        else:
            segments = [segment for segment in decode_segments(visit.streams) if not segment.beside]
            decodes += [segment.seconds / model.iteration_s(segment.batch) for segment in segments]
    return median(prompts or [1.0]), median(decodes or [1.0])


def profile_of(found: UrlFit, model: str, url: str, visits: Sequence[PointStreams]) -> LatencyProfile:
    """The profile of a server at `url`; what it runs on is known only where that is this machine."""
    here = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    return LatencyProfile(
        model=model,
        machine=machine() if here else "unknown: measured over the network",
        versions=versions() if here else {},
        source=f"pdserve profile --url: {sum(len(visit.streams) for visit in visits):,} streams, client "
        + ("on the same machine" if here else "on another machine"),
        prefill=found.fit.prefill,
        decode=found.fit.decode,
        region=found.fit.region._asdict(),
        residuals=found.fit.residuals,
        frontend_s=found.frontend_s,
        handoff_s=found.handoff_s,
        handoff_token_s=found.handoff_token_s,
        prefill_contention=max(1.0, found.prompt_slowdown),
        decode_contention=max(1.0, found.decode_slowdown),
    )


def table_of(found: UrlFit, profile: LatencyProfile) -> str:
    """The fit for people."""
    notes = {
        "front end": f"{found.frontend_s * 1e3:.2f} ms, not in the prefill costs above",
        "hand-over": f"{found.handoff_s * 1e3:.2f} ms, {found.handoff_token_s * 1e6:.2f} us per prompt token",
        "beside the other phase": f"decodes take {found.decode_slowdown:.2f} x, time to first token "
        f"{found.prompt_slowdown:.2f} x (a prompt always under way)",
    }
    return table(profile, found.samples, notes, frontend_s=found.frontend_s)


def _bursts(visit: PointStreams, size: int) -> list[Measured]:
    """The time of each burst, as if it were one batch."""
    measured = []
    for burst in visit.bursts(size):
        lengths = [stream.prompt_tokens for stream in burst]
        batch = Batch(
            prefill_tokens=sum(lengths),
            prefill_attention=sum(length**2 for length in lengths),
            prefill_requests=len(lengths),
        )
        measured.append(Measured(point=visit.point, batch=batch, seconds=burst_s(burst)))
    return measured


def _one_iteration(burst: Measured, again_s: float) -> Measured:
    """What it had taken in one iteration: of several prompts the first has one for itself."""
    if burst.batch.prefill_requests == 1:
        return burst
    return replace(burst, seconds=max(burst.seconds - again_s, burst.seconds / 2))


def _lone(context_tokens: int) -> Batch:
    return Batch(decode_requests=1, decode_context_tokens=context_tokens)
