"""What `prefill_batching: by_length` is worth: SLO attainment and TTFT at given rates, simulated (Markdown).

python -m benchmarks.prefill_batching                         # all traffic, orders and rates, 2 seeds
python -m benchmarks.prefill_batching --traffic two_points --seeds 1

The cluster and the traffic of `benchmarks.policies` on 32 GPUs; and "two_points": nine of ten prompts have
100 tokens, the others 8,000, Poisson. Needs the shared traces.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from random import Random
from statistics import fmean, quantiles

from benchmarks.latency_data import TRACES
from benchmarks.policies import MIXED, TRAFFIC, Setting, requests_of, spec_of
from deploy.simulator.run import Simulation
from deploy.slo_classes import SloClass, assign_slo_classes
from deploy.workload import WorkloadRequest, rescale

GPUS = 32
TWO_POINTS = "two_points"
# Requests/s: about half of what the cluster keeps SLOs of, as much as that, and more.
RATES = {"conversation": (30, 60, 75), "mixed": (30, 60, 75), "code": (4, 7, 10), TWO_POINTS: (40, 60, 80)}


def two_points(seed: int) -> tuple[list[WorkloadRequest], tuple[SloClass, ...]]:
    rng = Random(f"{seed}/two points")
    at_s, found = 0.0, []
    for _ in range(2000):
        at_s += rng.expovariate(1.0)
        tokens = 100 if rng.random() < 0.9 else 8000
        found.append(WorkloadRequest(arrival_s=at_s, input_tokens=tokens, output_tokens=64))
    return found, assign_slo_classes(found, MIXED, Random(f"{seed}/classes"))


def measure(name: str, rate: float, seed: int, policy: str, order: str, batching: str) -> tuple[float, ...]:
    """Share of SLOs kept; median and 99th percentile of the TTFT of short prompts, and of the others."""
    requests, classes = two_points(seed) if name == TWO_POINTS else requests_of(TRAFFIC[name], GPUS, seed)
    spec = spec_of(GPUS, policy, Setting(order=order)).model_copy(update={"prefill_batching": batching})
    result = Simulation(spec, rescale(requests, rate_rps=rate), classes).run()
    kept = fmean(request.met for request in result.requests)
    times: tuple[list[float], list[float]] = ([], [])
    for request in result.requests:
        if request.ttft_s is not None:
            times[request.input_tokens > 150].append(request.ttft_s)
    cuts = [quantiles(some, n=100) if len(some) > 1 else [float("nan")] * 99 for some in times]
    return kept, cuts[0][49], cuts[0][98], cuts[1][49], cuts[1][98]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traffic", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--policy", default="goodput")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    if not TRACES.is_dir():
        sys.exit(f"{TRACES.name}: the shared traces are needed beside the checkout")
    print(
        "| traffic | requests/s | order | batching | SLOs kept | TTFT, short: p50, p99 | others: p50, p99 |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in args.traffic:
        for rate, order, batching in product(RATES[name], ("arrival", "deadline"), ("mixed", "by_length")):
            seeds = [measure(name, rate, seed, args.policy, order, batching) for seed in range(args.seeds)]
            kept, *times = (fmean(column) for column in zip(*seeds, strict=True))
            short, short_tail, others, others_tail = (f"{1e3 * time_s:.0f} ms" for time_s in times)
            print(
                f"| {name} | {rate} | {order} | {batching} | {kept:.1%} | {short}, {short_tail} | "
                f"{others}, {others_tail} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
