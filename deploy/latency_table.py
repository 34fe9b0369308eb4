"""Distributions of measured times, and the table that shows them to people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from cluster.request import Slo
from deploy.workload import percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Mean, percentiles and maximum of some values, in their unit."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Distribution | None:
        """Of the values that exist; None when none does."""
        known = sorted(value for value in values if value is not None)
        if not known:
            return None
        p50, p90, p99 = (percentile(known, percent) for percent in (50, 90, 99))
        return cls(mean=math.fsum(known) / len(known), p50=p50, p90=p90, p99=p99, max=known[-1])


def latencies_to_json(latencies: Mapping[str, Distribution | None]) -> dict[str, object]:
    """Plain JSON values under the same names; null where nothing was measured."""
    return {name: None if row is None else asdict(row) for name, row in latencies.items()}


def latency_lines(rows: Iterable[tuple[str, Distribution | None]], name_width: int = 10) -> list[str]:
    """A header and one line per (name, distribution in seconds), in milliseconds."""
    columns = Distribution.__slots__
    lines = [f"{'time in ms':<{name_width}}" + "".join(f"{column:>10}" for column in columns)]
    for name, row in rows:
        cells = ["-" if row is None else milliseconds(getattr(row, column)) for column in columns]
        lines.append(f"{name:<{name_width}}" + "".join(f"{cell:>10}" for cell in cells))
    return lines


def milliseconds(time_s: float) -> str:
    """Milliseconds with about three digits."""
    time_ms = time_s * 1000
    return f"{time_ms:,.0f}" if time_ms >= 100 else f"{time_ms:.1f}" if time_ms >= 10 else f"{time_ms:.2f}"


def slo_to_json(slo: Slo) -> dict[str, float | None]:
    """The bounds in seconds; null for an infinite one, which JSON doesn't have."""
    bounds_s = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}
    return {name: bound_s if math.isfinite(bound_s) else None for name, bound_s in bounds_s.items()}
