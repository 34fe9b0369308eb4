"""What streams of tokens tell of the engines behind a server: estimators over arrival times, pure.

Prefill. A burst is `k` prompts of `n` tokens, sent at once, that ask for one token each; the time until the
last of them has come is frontend_s + the cost of what the engine computed. That is one iteration for a lone
prompt and two for several: an idle engine begins with the first and takes the others, which came meanwhile,
next. Over lengths and numbers that gives the cost of a token, of attention and of a request, and one fixed
part, which holds the front end and the engine's own fixed part. An engine's iteration has about the same
fixed part whatever it computes, and decodes show it: what is left is the front end's, which does not keep the
engine busy.

Decode. Between two moments at which a stream begins or ends, the same requests are in the batch. An iteration
gives one token to each, so the time between the moments, times the requests, over the tokens that came, is
the time of an iteration. A stream decodes from its second token on.

Hand-over. The gap between the first and the second token of a lone request, less one decode iteration; over
prompt lengths a fixed part and a part per token. Where the decode instance decodes already, it takes the rest
of the iteration that runs, one in which the KV is read, and one with the request in it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from cluster.latency import Batch, DecodeCost, PrefillCost
from cluster.latency_fit import nonnegative_fit, usual
from deploy.profiler.grid import Point

# A segment shorter than this many iterations says more of the network's jitter than of the engine.
LEAST_ITERATIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One answer as it came in; times in seconds of one clock.

    Attributes:
        prompt_tokens: length of the prompt.
        sent_s: when the request was sent.
        times_s: when each token came; tokens that came together have the same.
        decodes: whether it is one of the requests whose decoding is measured.
        burst: number of the burst that it was sent in; prompts only.
    """

    prompt_tokens: int
    sent_s: float
    times_s: tuple[float, ...]
    decodes: bool = True
    burst: int = 0

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.sent_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PointStreams:
    """All streams of one visit to a point."""

    point: Point
    streams: tuple[Stream, ...]

    def bursts(self, size: int) -> list[list[Stream]]:
        """The prompts by burst; one that was cut short is left out."""
        by_number: dict[int, list[Stream]] = {}
        for stream in self.streams:
            if not stream.decodes:
                by_number.setdefault(stream.burst, []).append(stream)
        return [burst for burst in by_number.values() if len(burst) == size]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSegment:
    """A stretch of time with the same decoding requests.

    Attributes:
        batch: what an iteration in its middle computed.
        seconds: of an iteration.
        beside: for how much of it, 0 to 1, a prompt was under way.
    """

    batch: Batch
    seconds: float
    beside: float


def burst_s(streams: Sequence[Stream]) -> float:
    """From the sending of prompts to the last one's first token, in seconds."""
    return max(s.times_s[0] for s in streams) - min(s.sent_s for s in streams)


def decode_segments(streams: Sequence[Stream]) -> list[DecodeSegment]:
    """The stretches of a point in which the same requests decode, long ones only."""
    decoding = [s for s in streams if s.decodes and len(s.times_s) > 2]
    moments = sorted({t for s in decoding for t in (s.times_s[1], s.times_s[-1])})
    segments = []
    for from_s, to_s in pairwise(moments):
        active = [s for s in decoding if s.times_s[1] <= from_s and to_s <= s.times_s[-1]]
        if not active:
            continue
        before = [bisect_right(s.times_s, from_s) for s in active]
        came = sum(bisect_right(s.times_s, to_s) - b for s, b in zip(active, before, strict=True))
        iterations = came / len(active)
        if iterations < LEAST_ITERATIONS:
            continue
        context = sum(s.prompt_tokens + b + iterations / 2 for s, b in zip(active, before, strict=True))
        segments.append(
            DecodeSegment(
                batch=Batch(decode_requests=len(active), decode_context_tokens=round(context)),
                seconds=(to_s - from_s) / iterations,
                beside=_overlap_s(streams, from_s, to_s) / (to_s - from_s),
            )
        )
    return segments


def _overlap_s(streams: Sequence[Stream], from_s: float, to_s: float) -> float:
    """How much of an interval some prompt was under way."""
    covered, at_s = 0.0, from_s
    for stream in sorted(streams, key=lambda s: s.sent_s):
        end_s = min(stream.times_s[0], to_s)
        if end_s > at_s:
            covered += max(0.0, end_s - max(at_s, stream.sent_s))
            at_s = max(at_s, end_s)
    return covered


def fixed_part_s(decode: Sequence[DecodeCost]) -> float:
    """Seconds of an engine's iteration that hardly computes anything."""
    smallest = min(decode, key=lambda cost: cost.up_to_requests or float("inf"))
    return smallest.base_s + smallest.requests_s(1)


def split_fixed_part(
    costs: Sequence[PrefillCost], decode: Sequence[DecodeCost]
) -> tuple[tuple[PrefillCost, ...], float]:
    """(the engine's prefill costs, frontend_s) of costs whose fixed part holds the front end's, too."""
    engine_s = fixed_part_s(decode)
    frontend_s = min(max(0.0, cost.base_s - engine_s) for cost in costs)
    return tuple(c.model_copy(update={"base_s": c.base_s - frontend_s}) for c in costs), frontend_s


# Prompts of one iteration have their tokens within this; requests of one iteration of decodes do, too.
TOGETHER_S = 0.008


def joined_at_once(streams: Sequence[Stream]) -> tuple[int, float] | None:
    """(requests, seconds from the first token to the second) of the prompts that were handed over first and
    decoded together from the beginning, on an instance that had nothing to do; None for less than two."""
    came_s = min((s.times_s[0] for s in streams), default=0.0)
    gaps = sorted(s.times_s[1] - s.times_s[0] for s in streams if s.times_s[0] <= came_s + TOGETHER_S)
    joined = [gap_s for gap_s in gaps if gap_s <= gaps[0] + TOGETHER_S]
    return (len(joined), fmean(joined)) if len(joined) > 1 else None


def handover_each(
    visits: Iterable[PointStreams],
    handoff_s: Callable[[int], float],
    iteration_s: Callable[[int, int], float],
) -> float:
    """By how much each further hand-over at one time is later than the one before: they go through one front
    end. 0 where none came together.

    Args:
        handoff_s: of a lone one of so many tokens.
        iteration_s: of so many decodes with so many tokens of context in all.
    """
    late_s, others = 0.0, 0
    for visit in visits:
        found = joined_at_once([s for s in visit.streams if s.decodes and len(s.times_s) > 1])
        if found is not None:
            requests, gap_s = found
            # One that was disturbed is no more than twice as late as its iteration is long.
            tokens = visit.point.tokens
            expected_s = iteration_s(requests, requests * tokens) + handoff_s(tokens)
            late_s += min(gap_s, 2 * expected_s) - expected_s
            others += requests - 1
    return max(0.0, late_s / others) if others else 0.0


# Iterations from a hand-over's coming to an instance that decodes to its first token there, on average.
ITERATIONS_TO_JOIN = 2.5


def handover_beside(visits: Iterable[PointStreams]) -> float:
    """What a hand-over takes while both phases compute, beside the iterations that it takes part in; 0 where
    none was seen, or it takes no longer than these."""
    rests = []
    for visit in visits:
        decoding = [s for s in visit.streams if s.decodes and len(s.times_s) > 2]
        gaps = [s.times_s[1] - s.times_s[0] for s in visit.streams if not s.decodes and len(s.times_s) > 1]
        if decoding and gaps:
            # As these iterations were, with what slowed them and with who joined them.
            tokens = sum(len(s.times_s) - 2 for s in decoding)
            iteration_s = sum(s.times_s[-1] - s.times_s[1] for s in decoding) / tokens
            rests.append(usual(gaps) - ITERATIONS_TO_JOIN * iteration_s)
    return max(0.0, usual(rests)) if rests else 0.0


def handover(gaps: Iterable[tuple[int, float]], iteration_s: Callable[[int], float]) -> tuple[float, float]:
    """(handoff_s, seconds per prompt token) of (prompt tokens, seconds from the first token to the second).

    Lengths of which the gap is no longer than an iteration count as none: (0, 0) when all are.

    Args:
        iteration_s: of a lone decode with a context of so many tokens.
    """
    by_length: dict[int, list[float]] = {}
    for tokens, gap_s in gaps:
        by_length.setdefault(tokens, []).append(gap_s)
    # Of whole gaps: what is usual of their small differences to an iteration, nobody could say.
    points = [(tokens, usual(gaps_s) - iteration_s(tokens)) for tokens, gaps_s in sorted(by_length.items())]
    points = [(tokens, gap_s) for tokens, gap_s in points if gap_s > 0]
    if not points:
        return 0.0, 0.0
    fixed_s, token_s = nonnegative_fit([(1.0, float(t)) for t, _ in points], [gap_s for _, gap_s in points])
    return fixed_s, token_s
