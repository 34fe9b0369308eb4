"""Curves of a simulation: what happened in each stretch of its time, and distributions.

They have few points, whatever the number of requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deploy.simulator.result import STAGES, IterationSpan, SimulatedRequest, SimulationResult

MAX_BINS = 120
MIN_REQUESTS_PER_BIN = 25  # fewer, and a curve of attainment shows mostly chance
CURVE_POINTS = 160
TAIL_POINTS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Bins:
    """Equal stretches of time, from `start_s` on."""

    start_s: float
    width_s: float
    count: int

    @classmethod
    def of(cls, result: SimulationResult, count: int | None = None) -> Bins:
        """Over the whole simulation; by default so many that most of them have enough requests to judge."""
        start_s = min((request.arrival_s for request in result.requests), default=0.0)
        ends = [request.end_s for request in result.requests] + [span.end_s for span in result.spans]
        if count is None:
            count = min(MAX_BINS, max(8, len(result.requests) // MIN_REQUESTS_PER_BIN))
        length_s = max(max(ends, default=0.0) - start_s, result.duration_s)
        return cls(start_s=start_s, width_s=(length_s or 1.0) / count, count=count)

    @property
    def end_s(self) -> float:
        return self.start_s + self.width_s * self.count

    @property
    def middles_s(self) -> list[float]:
        return [self.start_s + (place + 0.5) * self.width_s for place in range(self.count)]

    def place(self, at_s: float) -> int:
        """The bin of a time; the first or last for one beyond the ends."""
        return min(self.count - 1, max(0, int((at_s - self.start_s) / self.width_s)))


@dataclass(slots=True)
class Presence:
    """How many of some intervals are open, averaged over each bin.

    Adding one takes the same time, however long it is.
    """

    bins: Bins
    _partly_s: list[float] = field(init=False)
    _changes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._partly_s = [0.0] * self.bins.count
        self._changes = [0] * (self.bins.count + 1)

    def add(self, start_s: float, end_s: float) -> None:
        """Count an interval."""
        bins = self.bins
        first, last = bins.place(start_s), bins.place(end_s)
        if first == last:
            self._partly_s[first] += end_s - start_s
            return
        self._partly_s[first] += bins.start_s + (first + 1) * bins.width_s - start_s
        self._partly_s[last] += end_s - bins.start_s - last * bins.width_s
        self._changes[first + 1] += 1
        self._changes[last] -= 1

    def means(self) -> list[float]:
        """The mean number of open intervals, bin by bin."""
        means, whole = [], 0
        for partly_s, change in zip(self._partly_s, self._changes, strict=False):
            whole += change
            # Rounding can leave a hair below zero.
            means.append(max(0.0, whole + partly_s / self.bins.width_s))
        return means


def arrival_rates(requests: Iterable[SimulatedRequest], bins: Bins) -> list[float]:
    """Arrivals per second, bin by bin."""
    counts = [0] * bins.count
    for request in requests:
        counts[bins.place(request.arrival_s)] += 1
    return [count / bins.width_s for count in counts]


def attainment_over_time(requests: Iterable[SimulatedRequest], bins: Bins) -> list[float | None]:
    """Share of the judged requests that met, by bin of their arrival; None for a bin without any."""
    judged, met = [0] * bins.count, [0] * bins.count
    for request in requests:
        if request.status != "cancelled":
            place = bins.place(request.arrival_s)
            judged[place] += 1
            met[place] += request.met
    return [met[place] / judged[place] if judged[place] else None for place in range(bins.count)]


def requests_in_stages(requests: Iterable[SimulatedRequest], bins: Bins) -> dict[str, list[float]]:
    """Requests in each stage, averaged over each bin."""
    presence = {stage: Presence(bins) for stage in STAGES}
    added = [one.add for one in presence.values()]
    for request in requests:
        now_s = request.arrival_s
        for add, time_s in zip(added, request.stages, strict=True):
            if time_s > 0:
                add(now_s, now_s + time_s)
                now_s += time_s
    return {stage: one.means() for stage, one in presence.items()}


def computing(spans: Iterable[IterationSpan], bins: Bins) -> dict[str, dict[str, list[float]]]:
    """By instance and kind of iteration the share of each bin it ran."""
    presence: dict[str, dict[str, Presence]] = {}
    for span in spans:
        kinds = presence.setdefault(span.instance_id, {})
        if span.what not in kinds:
            kinds[span.what] = Presence(bins)
        kinds[span.what].add(span.start_s, span.end_s)
    return {
        instance_id: {what: [min(1.0, share) for share in one.means()] for what, one in sorted(kinds.items())}
        for instance_id, kinds in presence.items()
    }


def cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    """(value, share of the values that are not larger), rising; denser in the slowest hundredth."""
    ordered = sorted(values)
    count = len(ordered)
    if not count:
        return []
    shares = [place / CURVE_POINTS for place in range(CURVE_POINTS)]
    shares += [1 - 0.01 * (1 - place / TAIL_POINTS) for place in range(TAIL_POINTS + 1)]
    ranks = sorted({max(1, math.ceil(share * count)) for share in shares})
    return [(ordered[rank - 1], rank / count) for rank in ranks]
