"""A search for the roofline's factors, and how errors are told in tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median

from cluster.latency_fit import summarise
from cluster.roofline import Efficiency

# Where a search starts; what a fit doesn't name stays.
START = Efficiency(
    gemm=0.7,
    saturation_tokens=30.0,
    weight_bandwidth=0.8,
    elementwise_bandwidth=0.6,
    # FlashAttention-2 (arXiv 2307.08691, figure 5): 150 to 190 of 312 TFLOPS, causal, on A100.
    # FlashAttention-3 (arXiv 2407.08608, figure 5): 500 to 600 of 989 TFLOPS, causal, on H100.
    attention=0.55,
    kv_bandwidth=0.6,
    link_bandwidth=0.7,
    link_s=4e-6,
    link_s_per_gpu=2e-6,
    layer_s=20e-6,
    launch_s=0.0,
    iteration_s=1e-3,
    request_s=20e-6,
    stage_s=1e-3,  # simdistserve adds 1 ms for each stage
    source="",
)
_FACTORS = {
    "gemm",
    "weight_bandwidth",
    "elementwise_bandwidth",
    "attention",
    "kv_bandwidth",
    "link_bandwidth",
}


Loss = Callable[[Efficiency], float]


def search(start: Efficiency, names: Sequence[str], loss: Loss) -> Efficiency:
    """Coordinate descent on the factors' logarithms, with steps that shrink from 40 % to 1 %."""
    best, least, step = start, loss(start), 1.4
    while step > 1.01:
        improved = False
        for name in names:
            for ratio in (step, 1 / step):
                value = getattr(best, name) * ratio
                if name in _FACTORS and value > 1:
                    continue
                candidate = replace(best, **{name: value})
                if (error := loss(candidate)) < least * (1 - 1e-6):
                    best, least, improved = candidate, error, True
        if not improved:
            step = math.sqrt(step)
    return best


def percent(found: Iterable[float]) -> str:
    """Median of absolute values."""
    return f"{100 * median(map(abs, found)):.1f} %"


def residual_cells(found: Sequence[float]) -> str:
    """Median, 90th percentile, mean with sign."""
    residuals = summarise(found)
    return f"{100 * residuals.median:.1f} % | {100 * residuals.p90:.0f} % | {100 * residuals.bias:+.0f} %"
