"""From measured iterations to costs: means, fit, held-out residuals, and the table for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from cluster.latency import (
    Batch,
    DecodeCost,
    LatencyProfile,
    PrefillCost,
    ProfiledLatency,
    Residuals,
)
from cluster.latency_fit import MAX_SEGMENTS, Sample, fit_decode, fit_prefill, residuals_of, usual
from deploy.latency_table import milliseconds
from deploy.profiler.engine import Measured

HOLD_OUT_EVERY = 4
# What was seen once came from a race at the edge of a point, or was disturbed, and nothing would show it.
LEAST_REPEATS = 2
# What further segments must take away of the error on batches that were not fitted.
SEGMENT_GAIN = 0.25
PREFILL, DECODE, MIXED = "prefill, held out", "decode, held out", "mixed, held out"


class TooFewPoints(ValueError):
    """Too little was measured for a fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Costs, how far they are off on what they were not fitted to, and how far was measured."""

    prefill: tuple[PrefillCost, ...]
    decode: tuple[DecodeCost, ...]
    residuals: dict[str, Residuals]
    region: Batch


def averages(measured: Iterable[Measured], least_repeats: int = LEAST_REPEATS) -> list[Sample]:
    """One sample for each batch that was measured often enough, sorted: its usual time.

    Decoding batches differ from one iteration to the next, as contexts grow; those of one point and one
    number of requests are one, with their mean context.
    """
    groups: dict[Hashable, list[tuple[Batch, float]]] = defaultdict(list)
    for one in measured:
        batch = one.batch
        key = batch._replace(decode_context_tokens=0)
        groups[key, one.point if batch.decode_requests else None].append((batch, one.seconds))
    samples = []
    for group in groups.values():
        if len(group) >= least_repeats:
            context_tokens = fmean(batch.decode_context_tokens for batch, _ in group)
            batch = group[0][0]._replace(decode_context_tokens=round(context_tokens))
            samples.append((batch, usual([seconds for _, seconds in group])))
    return sorted(samples)


def by_kind(samples: Iterable[Sample]) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Samples with prompts only, with decodes only, and with both."""
    prefill: list[Sample] = []
    decode: list[Sample] = []
    mixed: list[Sample] = []
    for sample in samples:
        batch, _ = sample
        kind = decode if not batch.prefill_tokens else mixed if batch.decode_requests else prefill
        kind.append(sample)
    return prefill, decode, mixed


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(to fit, held out): every fourth is held out, never the first or the last in order of size."""
    held = [n % HOLD_OUT_EVERY == 2 and n < len(samples) - 1 for n in range(len(samples))]
    return (
        [sample for sample, out in zip(samples, held, strict=True) if not out],
        [sample for sample, out in zip(samples, held, strict=True) if out],
    )


def fit_costs(samples: Sequence[Sample], max_segments: int = MAX_SEGMENTS) -> Fit:
    """Fit to three quarters of the batches and check on the rest; mixed batches are never fitted.

    Costs have as many segments as pay, up to `max_segments`. Raises TooFewPoints for too few sizes of prompts
    or of decoding batches.
    """
    prefill, decode, mixed = by_kind(sorted(samples))
    fitted_prefill, held_prefill = split(prefill)
    fitted_decode, held_decode = split(decode)
    try:
        prefill_costs = _fit_prefill(fitted_prefill, max_segments)
        decode_costs = _fit_decode(fitted_decode, max_segments)
    except ValueError as error:
        raise too_few(prefill, decode, error) from None
    model = model_of(prefill_costs, decode_costs)
    held = {PREFILL: held_prefill, DECODE: held_decode, MIXED: mixed}
    return Fit(
        prefill=prefill_costs,
        decode=decode_costs,
        residuals={name: residuals_of(model, rest) for name, rest in held.items() if rest},
        region=Batch(*(max(column) for column in zip(*(batch for batch, _ in samples), strict=True))),
    )


def too_few(prefill: Sequence[Sample], decode: Sequence[Sample], why: object) -> TooFewPoints:
    """The error, in words for whoever started the measurement."""
    return TooFewPoints(
        f"not enough was measured ({len(prefill)} prefill and {len(decode)} decode batches: {why}); "
        "raise --max-prompt, --max-concurrency or --seconds"
    )


def _fit_prefill(samples: Sequence[Sample], max_segments: int) -> tuple[PrefillCost, ...]:
    def fit(some: Sequence[Sample], segments: int) -> ProfiledLatency:
        return model_of(fit_prefill(some, segments)[0], (DecodeCost(base_s=0),))

    return fit_prefill(samples, segments_that_pay(samples, max_segments, fit))[0]


def _fit_decode(samples: Sequence[Sample], max_segments: int) -> tuple[DecodeCost, ...]:
    def fit(some: Sequence[Sample], segments: int) -> ProfiledLatency:
        return model_of((PrefillCost(base_s=0, token_s=0),), fit_decode(some, segments)[0])

    return fit_decode(samples, segments_that_pay(samples, max_segments, fit))[0]


def segments_that_pay(
    samples: Sequence[Sample],
    max_segments: int,
    fit: Callable[[Sequence[Sample], int], ProfiledLatency],
) -> int:
    """Fewest segments with about the least error on samples that the fit did not see.

    What is held out here is part of what the final fit sees; on noise, segments help only the samples that
    they were fitted to.
    """
    seen, unseen = split(samples)
    if not unseen:
        return 1
    errors: list[float] = []
    for segments in range(1, max_segments + 1):
        model = fit(seen, segments)
        errors.append(sum(abs(model.iteration_s(batch) / seconds - 1) for batch, seconds in unseen))
    return next(n for n, error in enumerate(errors, 1) if error <= min(errors) * (1 + SEGMENT_GAIN))


def model_of(prefill: tuple[PrefillCost, ...], decode: tuple[DecodeCost, ...]) -> ProfiledLatency:
    """Iteration times after these costs."""
    bare = LatencyProfile(
        model="", machine="", source="", prefill=prefill, decode=decode, region=Batch()._asdict()
    )
    return ProfiledLatency(bare)


def table(
    profile: LatencyProfile, samples: Sequence[Sample], notes: Mapping[str, str], frontend_s: float = 0.0
) -> str:
    """The fit for people: costs, held-out errors, notes, and the fitted batches beside what the fit says.

    `frontend_s` is part of the measured time of batches with prompts.
    """
    lines = [f"{profile.model} on {profile.machine}", ""]
    lines.append(f"{'iteration':<28}{'base':>9}{'per token':>12}{'per token^2':>14}{'per request':>13}")
    for prompt in profile.prefill:
        name = "prefill" + (f" up to {prompt.up_to_tokens:,} tokens" if prompt.up_to_tokens else "")
        cells = (prompt.base_s, prompt.token_s, prompt.attention_s, prompt.request_s)
        lines.append(_cost_line(name, cells))
    for decode in profile.decode:
        name = "decode" + (f" up to {decode.up_to_requests:,} requests" if decode.up_to_requests else "")
        lines.append(_cost_line(name, (decode.base_s, decode.context_s, None, decode.request_s)))
        if decode.levels:
            levels = ", ".join(f"{size}: {milliseconds(seconds)}" for size, seconds in decode.levels)
            lines.append(f"  and by requests, ms: {levels}")
    lines += ["", f"{'error of the fit':<28}{'batches':>9}{'median':>9}{'p90':>9}{'bias':>9}"]
    for name, residuals in profile.residuals.items():
        lines.append(
            f"{name:<28}{residuals.samples:>9}{residuals.median:>9.1%}{residuals.p90:>9.1%}{residuals.bias:>+9.1%}"
        )
    if notes:
        lines += ["", *(f"{name:<28}{value}" for name, value in notes.items())]
    model = ProfiledLatency(profile)
    lines += ["", f"{'batch':<48}{'measured':>12}{'fitted':>10}  ms"]
    prompts_only, decodes_only, _ = by_kind(samples)
    for batch, seconds in [*prompts_only, *decodes_only]:
        fitted_s = model.iteration_s(batch) + (frontend_s if batch.prefill_tokens else 0.0)
        lines.append(f"{_batch_words(batch):<48}{milliseconds(seconds):>12}{milliseconds(fitted_s):>10}")
    return "\n".join(lines)


def _cost_line(name: str, cells: tuple[float, float, float | None, float]) -> str:
    base_s, token_s, attention_s, request_s = cells
    square = "" if attention_s is None else f"{attention_s * 1e9:.3g} ns"
    first, token = f"{milliseconds(base_s)} ms", f"{token_s * 1e6:.3g} us"
    return f"{name:<28}{first:>9}{token:>12}{square:>14}{f'{request_s * 1e6:.4g} us':>13}"


def _batch_words(batch: Batch) -> str:
    parts = []
    if batch.prefill_tokens:
        parts.append(f"{batch.prefill_requests} prompts, {batch.prefill_tokens:,} tokens")
    if batch.decode_requests:
        parts.append(f"{batch.decode_requests} decodes, {batch.decode_context_tokens:,} of context")
    return "; ".join(parts)
