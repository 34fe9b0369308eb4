"""The largest rate at which enough requests meet their SLOs, found by trying rates.

It knows nothing of clusters: a rate goes into a function, and the share that met comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deploy.workload import require_positive

# Below this no deployment is worth a search: about one request in a quarter of an hour.
LOWEST_RPS = 1e-3
HIGHEST_RPS = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """What a search found.

    Attributes:
        rate_rps: the largest rate tried that met the target; 0 where none did.
        attainment: share of the requests that met their SLOs at that rate; at the lowest rate where none did.
        tried: (rate, attainment) of every rate tried, by rate.
    """

    rate_rps: float
    attainment: float
    tried: tuple[tuple[float, float], ...]


def find_goodput(
    attainment: Callable[[float], float],
    *,
    target: float = 0.9,
    start_rps: float = 1.0,
    tolerance: float = 0.02,
    lowest_rps: float = LOWEST_RPS,
    stride: float = 2.0,
) -> Goodput:
    """Go up or down from `start_rps` until the target lies between two rates, then halve their ratio.

    For an attainment that falls with the rate, the result is below the true goodput by at most `tolerance` of
    it. A simulation's is not quite monotone; then it is one of the rates at which the target is crossed.

    Args:
        attainment: share of the requests, 0 to 1, that meet their SLOs at a rate; called once for a rate.
        tolerance: the bracket's upper end over its lower end, minus one, at which the search stops.
        lowest_rps: where the target is missed here, or at less than `stride` times this, the goodput is 0.
        stride: from one rate to the next; less than 2 where `start_rps` is a good guess.

    Raises ValueError for a target, a rate or a tolerance that is none, and for an attainment that meets the
    target at any rate.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target is {target!r}, expected a share above 0, up to 1")
    for name, value in (("start_rps", start_rps), ("tolerance", tolerance), ("lowest_rps", lowest_rps)):
        require_positive(name, value)
    if stride <= 1:
        raise ValueError(f"stride is {stride!r}, expected more than 1")
    tried: dict[float, float] = {}

    def meets(rate_rps: float) -> bool:
        tried[rate_rps] = attainment(rate_rps)
        return tried[rate_rps] >= target

    low = high = start_rps
    if meets(start_rps):
        while meets(high := stride * low):
            low = high
            if low > HIGHEST_RPS:
                raise ValueError(f"the target is met at {low:g} requests/s still: this has no limit")
    else:
        while not meets(low := high / stride):
            high = low
            if low < stride * lowest_rps:
                return _found(0.0, tried)
    while high > low * (1 + tolerance):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if meets(middle) else (low, middle)
    return _found(low, tried)


def _found(rate_rps: float, tried: dict[float, float]) -> Goodput:
    return Goodput(
        rate_rps=rate_rps, attainment=tried[rate_rps or min(tried)], tried=tuple(sorted(tried.items()))
    )
