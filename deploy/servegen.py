"""Arrivals after the request rates of a real service over days: ServeGen's rate files.

A file says for each window how many requests came per second and how their gaps varied. Every window becomes
a stationary renewal process with Gamma gaps of that rate and variation, so the expected count is exact at
every moment, whatever the window's variation and wherever it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple, TextIO

from deploy.trace_files import TraceError, csv_columns, csv_records, field, first_line, number, read_rows
from deploy.trace_shapes import MAX_CV, MIN_CV, gamma_gap

# t_s,rate_rps,active_clients,rate_weighted_cv, summed over the clients of alibaba/ServeGen (arXiv 2505.09999)
_COLUMNS = ("t_s", "rate_rps", "rate_weighted_cv")
_LONE_WINDOW_S = 600.0  # ServeGen's window, for a file of one row
MIN_SHARE = 1e-9  # of the largest service, one request in six days


@dataclass(frozen=True, slots=True, kw_only=True)
class RateWindow:
    """A stretch of time with one rate.

    Attributes:
        start_s, end_s: in the file's own time.
        rate_rps: 0 for silence.
        cv: coefficient of variation of the gaps; of no meaning in silence.
    """

    start_s: float
    end_s: float
    rate_rps: float
    cv: float = 1.0


class _Row(NamedTuple):
    start_s: float
    rate_rps: float
    cv: float


def load_rates(path: Path) -> list[RateWindow]:
    """Read a rate file, plain or gzipped.

    A window lasts until the next begins, the last one as long as the one before it. Raises TraceError for a
    bad row, times that don't rise, another header or an empty file, OSError for an unreadable file.
    """
    rows = read_rows(path, _rate_rows)
    if not rows:
        raise TraceError(path, 1, "", f"at least one row under a CSV header with {','.join(_COLUMNS)}")
    starts_s = [row.start_s for row in rows]
    last_s = starts_s[-1] - starts_s[-2] if len(rows) > 1 else _LONE_WINDOW_S
    ends_s = [*starts_s[1:], starts_s[-1] + last_s]
    return [
        RateWindow(start_s=row.start_s, end_s=end_s, rate_rps=row.rate_rps, cv=row.cv)
        for row, end_s in zip(rows, ends_s, strict=True)
    ]


def clip(windows: Sequence[RateWindow], start_s: float, duration_s: float = math.inf) -> list[RateWindow]:
    """The part from `start_s` on, in the file's time; `start_s` becomes 0.

    Raises ValueError where nothing is left.
    """
    end_s = start_s + duration_s
    clipped = [
        RateWindow(
            start_s=max(window.start_s, start_s) - start_s,
            end_s=min(window.end_s, end_s) - start_s,
            rate_rps=window.rate_rps,
            cv=window.cv,
        )
        for window in windows
        if window.start_s < end_s and window.end_s > start_s
    ]
    if not clipped:
        raise ValueError(
            f"nothing from {start_s:.10g} s to {end_s:.10g} s; "
            f"the rates are of {windows[0].start_s:.10g} s to {windows[-1].end_s:.10g} s"
        )
    return clipped


def expected_requests(windows: Sequence[RateWindow]) -> float:
    """How many requests the windows bring on average."""
    return math.fsum(window.rate_rps * (window.end_s - window.start_s) for window in windows)


def arrivals_s(
    windows: Sequence[RateWindow], rng: Random, *, share: float = 1.0, cv: float | None = None
) -> Iterator[float]:
    """Arrival times in the windows' own time, never falling.

    Args:
        windows: in the order of their time.
        share: keeps each request with this probability, `MIN_SHARE` to 1: a cluster that gets a random part
            of the service's traffic. The rates shrink by it, and the squared variation of the gaps becomes
            1 + share * (cv^2 - 1): they come nearer to a Poisson process, as when real traffic is spread.
        cv: instead of the windows' own variation. A file's figure is the mean over its clients, weighted by
            rate: right for the load over minutes, while the gaps of many clients together are nearly those of
            a Poisson process.
    """
    if not MIN_SHARE <= share <= 1:
        raise ValueError(f"share is {share!r}, expected {MIN_SHARE:g} to 1")
    for window in windows:
        if window.rate_rps == 0.0:
            continue
        for since_s in _stationary_s(window.rate_rps, window.cv if cv is None else cv, share, rng):
            if window.start_s + since_s >= window.end_s:
                break
            yield window.start_s + since_s


def _stationary_s(rate_rps: float, cv: float, share: float, rng: Random) -> Iterator[float]:
    """Endless arrival times of a thinned Gamma renewal process that has been running for ever at 0 s.

    The wait for the first one is a uniform part of a gap that was picked in proportion to its length (Cox,
    Renewal Theory, 1962, on recurrence times): a gap's density times its length is again a Gamma density, of
    shape + 1. An arrival at 0 s instead would begin every window with (cv^2 + 1) / 2 requests too many.
    """
    shape, scale = gamma_gap(rate_rps, cv)
    lost_of_log = 0.0 if share == 1.0 else 1.0 / math.log1p(-share)

    def lost() -> int:
        # Requests dropped before the next kept one: geometric. Their gaps' sum is one Gamma of added shapes.
        return int(math.log(1.0 - rng.random()) * lost_of_log) if share < 1.0 else 0

    arrival_s = rng.random() * rng.gammavariate(shape + 1.0, scale)
    dropped = lost()
    if dropped:
        arrival_s += rng.gammavariate(shape * dropped, scale)
    while True:
        yield arrival_s
        arrival_s += rng.gammavariate(shape * (1 + lost()), scale)


def _rate_rows(path: Path, text: TextIO) -> Iterator[tuple[int, _Row]]:
    header_line, header = first_line(text)
    if header and not set(_COLUMNS) <= set(csv_columns(header)):
        raise TraceError(path, header_line, header.strip(), f"a CSV header with {','.join(_COLUMNS)}")
    before_s = -math.inf
    for line, row in csv_records(path, header_line, header, text):
        start_s = field(path, line, row, "t_s", number)
        if start_s <= before_s:
            raise TraceError(path, line, row["t_s"], f"t_s: more than the row before, {before_s:g}")
        before_s = start_s
        rate_rps = field(path, line, row, "rate_rps", _rate)
        # The source has no variation for a window without requests.
        cv = field(path, line, row, "rate_weighted_cv", _cv) if rate_rps else 1.0
        yield line, _Row(start_s, rate_rps, cv)


def _rate(value: object) -> float:
    rate_rps = number(value)
    if rate_rps < 0:
        raise ValueError("a number >= 0")
    return rate_rps


def _cv(value: object) -> float:
    cv = number(value)
    if not MIN_CV <= cv <= MAX_CV:
        raise ValueError(f"a number from {MIN_CV:g} to {MAX_CV:g}")
    return cv
