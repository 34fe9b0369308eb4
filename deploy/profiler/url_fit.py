"""From the streams of a server to the costs of its engines, its front end and its hand-over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from urllib.parse import urlsplit

from cluster.latency import Batch, LatencyProfile, Levels
from cluster.latency_fit import Sample, fit_decode, fit_decode_levels, residuals_of, summarise, usual
from deploy.profiler.engine import Measured
from deploy.profiler.fit import (
    DECODE,
    SEGMENT_GAIN,
    Fit,
    averages,
    fit_costs,
    model_of,
    table,
    too_few,
)
from deploy.profiler.machine import machine, versions
from deploy.profiler.streams import (
    PointStreams,
    burst_s,
    decode_segments,
    fixed_part_s,
    handover,
    handover_beside,
    handover_each,
    split_fixed_part,
)
from deploy.profiler.url import PROMPTS_BESIDE

# Up to this share of its time beside prompts a stretch of decodes is taken for undisturbed; from the other
# one on it tells how much they are slowed.
LEAST_BESIDE, MOSTLY_BESIDE = 0.1, 0.5
# Measured factors that make a level; each by itself is off by a fifth.
LEAST_FACTORS = 5
DECODE_BESIDE, PROMPT_BESIDE = "decode beside prompts", "prompt beside decodes"


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlFit:
    """What was found out about a server.

    Attributes:
        fit: costs of the engines. Its residuals also say what decodes beside prompts, and prompts beside
            decodes, take more than each alone: processes that share cores or a GPU slow each other.
        samples: what it was fitted to and checked on; prefill ones hold `frontend_s`.
        decode_slowdown: factor of the same by the requests that decode; empty without any such measurement.
        prompt_slowdown: factor of the same, 1 without any.
        frontend_s: part of the time to first token that keeps no engine busy.
        handoff_s, handoff_token_s: of a hand-over, fixed and per prompt token; 0 where one engine does both.
        handoff_beside_s: of one while both phases compute.
        handoff_each_s: of each further one at the same time.
    """

    fit: Fit
    samples: list[Sample]
    decode_slowdown: Levels
    prompt_slowdown: float
    frontend_s: float
    handoff_s: float
    handoff_token_s: float
    handoff_beside_s: float
    handoff_each_s: float


def fit_streams(visits: Sequence[PointStreams]) -> UrlFit:
    """Raises `fit.TooFewPoints`."""
    bursts: list[Measured] = []
    decodes: list[Measured] = []
    beside: list[tuple[Measured, float]] = []
    for visit in visits:
        if visit.point.kind == "prefill":
            bursts += _bursts(visit, visit.point.requests)
            continue
        for segment in decode_segments(visit.streams):
            measured = Measured(point=visit.point, batch=segment.batch, seconds=segment.seconds)
            if segment.beside <= LEAST_BESIDE:
                decodes.append(measured)
            elif segment.beside >= MOSTLY_BESIDE and segment.batch.decode_requests == visit.point.requests:
                # With fewer, others are handed over just then, which slows them too.
                beside.append((measured, segment.beside))
    # Seen through a network and a front end, so few batches do not bear more than one segment.
    decode_samples = averages(decodes, least_repeats=1)
    try:
        again_s = fixed_part_s(fit_decode(decode_samples, 1)[0])
    except ValueError as error:
        raise too_few((), decode_samples, error) from None
    samples = averages((_one_iteration(burst, again_s) for burst in bursts), least_repeats=1)
    samples = sorted(samples + decode_samples)
    fit = _with_levels(fit_costs(samples, max_segments=1), decodes, decode_samples)
    together = model_of(fit.prefill, fit.decode)
    slowed_decodes = [
        # Of the time in which no prompt was under way, nothing was slowed.
        (m.batch.decode_requests, 1 + (m.seconds / together.iteration_s(m.batch) - 1) / share)
        for m, share in beside
    ]
    slowed_prompts = [
        burst.seconds / (together.iteration_s(burst.batch) + again_s)
        for visit in visits
        if visit.point.kind == "mixed"
        for burst in _bursts(visit, PROMPTS_BESIDE)
    ]
    residuals = dict(fit.residuals)
    for name, factors in ((DECODE_BESIDE, [f for _, f in slowed_decodes]), (PROMPT_BESIDE, slowed_prompts)):
        if factors:
            residuals[name] = summarise([1 / factor - 1 for factor in factors])
    prefill, frontend_s = split_fixed_part(fit.prefill, fit.decode)
    handoff_s, handoff_token_s = handover(
        (
            (stream.prompt_tokens, stream.times_s[1] - stream.times_s[0])
            for visit in visits
            if visit.point.kind != "mixed" and visit.point.requests == 1
            for stream in visit.streams
            if len(stream.times_s) > 1
        ),
        lambda tokens: together.iteration_s(Batch(decode_requests=1, decode_context_tokens=tokens)),
    )
    return UrlFit(
        fit=replace(fit, prefill=prefill, residuals=residuals),
        samples=samples,
        decode_slowdown=slowdown_levels(slowed_decodes),
        prompt_slowdown=usual(slowed_prompts or [1.0]),
        frontend_s=frontend_s,
        handoff_s=handoff_s,
        handoff_token_s=handoff_token_s,
        handoff_beside_s=handover_beside(visit for visit in visits if visit.point.kind == "mixed"),
        handoff_each_s=handover_each(
            (visit for visit in visits if visit.point.kind == "decode" and visit.point.requests > 1),
            lambda tokens: handoff_s + tokens * handoff_token_s,
            lambda requests, context: together.iteration_s(Batch(0, 0, 0, requests, context)),
        ),
    )


def slowdown_levels(factors: Iterable[tuple[int, float]]) -> Levels:
    """The factor by the requests that decode, of (requests, factor): a level for each octave of sizes, or for
    as many of them as it takes for a few measurements; what is left beyond the last counts to it.

    An engine that reads all weights for one request shares the memory's bandwidth in another way than one
    that reads them for eight.
    """
    octaves: dict[int, list[tuple[int, float]]] = {}
    for requests, factor in factors:
        octaves.setdefault((requests - 1).bit_length(), []).append((requests, factor))
    levels: list[list[tuple[int, float]]] = [[]]
    for _, some in sorted(octaves.items()):
        if len(levels[-1]) >= LEAST_FACTORS:
            levels.append([])
        levels[-1] += some
    if len(levels) > 1 and len(levels[-1]) < LEAST_FACTORS:
        rest = levels.pop()
        levels[-1] += rest
    return tuple(
        (round(fmean(requests for requests, _ in some)), max(1.0, usual([factor for _, factor in some])))
        for some in levels
        if some
    )


def _with_levels(fit: Fit, decodes: Sequence[Measured], samples: Sequence[Sample]) -> Fit:
    """The fit with a level for each size of decoding batches, if that says more of visits it did not see."""
    seen, unseen = averages(decodes[::2], least_repeats=1), averages(decodes[1::2], least_repeats=1)
    try:
        line = residuals_of(model_of(fit.prefill, fit_decode(seen, 1)[0]), unseen)
        levels = residuals_of(model_of(fit.prefill, fit_decode_levels(seen)), unseen)
    except ValueError:  # too few for halves
        return fit
    if levels.median > (1 - SEGMENT_GAIN) * line.median:
        return fit
    return replace(fit, decode=fit_decode_levels(samples), residuals={**fit.residuals, DECODE: levels})


def paces(profile: LatencyProfile, visits: Sequence[PointStreams]) -> tuple[float, float]:
    """How many times as long as a profile says prompts, and decodes, took: means over points, 1 without."""
    model, again_s = model_of(profile.prefill, profile.decode), fixed_part_s(profile.decode)
    prompts, decodes = [], []
    for visit in visits:
        if visit.point.kind == "prefill":
            for burst in _bursts(visit, visit.point.requests):
                expected_s = model.iteration_s(burst.batch) + profile.frontend_s
                expected_s += again_s if burst.batch.prefill_requests > 1 else 0.0
                prompts.append(burst.seconds / expected_s)
        else:
            decodes += [
                segment.seconds / model.iteration_s(segment.batch)
                for segment in decode_segments(visit.streams)
                if segment.beside <= LEAST_BESIDE
            ]
    return usual(prompts or [1.0]), usual(decodes or [1.0])


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
        handoff_beside_s=found.handoff_beside_s,
        handoff_each_s=found.handoff_each_s,
        prefill_contention=max(1.0, found.prompt_slowdown),
        decode_contention=found.decode_slowdown,
    )


def table_of(found: UrlFit, profile: LatencyProfile) -> str:
    """The fit for people."""
    notes = {
        "front end": f"{found.frontend_s * 1e3:.2f} ms, not in the prefill costs above",
        "hand-over": f"{found.handoff_s * 1e3:.2f} ms, {found.handoff_token_s * 1e6:.2f} us per prompt token"
        f"; {found.handoff_beside_s * 1e3:.2f} ms while both phases compute; "
        f"each further one at a time {found.handoff_each_s * 1e3:.2f} ms later",
        "beside the other phase": f"time to first token {found.prompt_slowdown:.2f} x; iterations of decodes "
        + (", ".join(f"{size}: {factor:.2f} x" for size, factor in found.decode_slowdown) or "1 x"),
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
