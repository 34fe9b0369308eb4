"""Policies against each other: goodput at 90 % attainment on real traces, simulated, as ratios (Markdown).

python -m benchmarks.policies                                     # all policies, traces and sizes, 3 seeds
python -m benchmarks.policies --gpus 32 --traces mixed --seeds 1 --policies goodput least_tokens
python -m benchmarks.policies --jobs 2                            # on two cores, the same figures
python -m benchmarks.policies --nic-gbps 3 --colocate             # a slow network, both pools on every node

Llama-3-70B on H100s by the roofline, instances of 4 GPUs, half of them for each phase. A seed picks the part
of the trace and who is in which class; every policy gets the same requests. Needs the shared traces.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from benchmarks.latency_data import TRACES
from benchmarks.simulator_speed import SPECS
from cluster.request import Slo
from cluster.spec import ClusterSpec, load_spec
from deploy.goodput_search import find_goodput
from deploy.simulator.run import Simulation
from deploy.slo_classes import SloClass, assign_slo_classes
from deploy.trace_files import load_trace
from deploy.workload import WorkloadRequest, from_zero, rescale
from router.policies import POLICIES

SPEC = SPECS / "h100-70b-8p8d.yaml"
GPUS_PER_NODE = 8
TARGET = 0.9
TOLERANCE = 0.02
# Around what was found before: seeds and sizes differ by less, mostly.
STRIDE = 1.2
# Enough that the run is long beside an answer, few enough for a search in half a minute.
REQUESTS_PER_GPU = 60
CONVERSATION = TRACES / "azure2023" / "AzureLLMInferenceTrace_conv.csv.gz"
MOONCAKE = TRACES / "mooncake" / "conversation_trace_first6000.jsonl.gz"
CODE = TRACES / "azure2023" / "AzureLLMInferenceTrace_code.csv.gz"
USUAL = (SloClass(name="all", slo=Slo(ttft_s=1.0, tpot_s=0.04), share=1.0),)
# The paper's conversations are long, and so were its bounds.
LONG = (SloClass(name="all", slo=Slo(ttft_s=10.0, tpot_s=0.1), share=1.0),)
MIXED = (
    SloClass(name="interactive", slo=Slo(ttft_s=0.4, tpot_s=0.025), share=0.3),
    SloClass(name="usual", slo=Slo(ttft_s=2.0, tpot_s=0.06), share=0.4),
    SloClass(name="background", slo=Slo(ttft_s=20.0, tpot_s=0.2), share=0.3),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """A trace and its classes; `start_rps` is a rate per GPU at which the search begins, and
    `max_model_len` the longest of its requests that are served."""

    path: Path
    classes: tuple[SloClass, ...]
    start_rps: float
    max_model_len: int = 16_384


TRAFFIC = {
    "conversation": Traffic(path=CONVERSATION, classes=USUAL, start_rps=0.4),
    "code": Traffic(path=CODE, classes=USUAL, start_rps=0.2),
    "mixed": Traffic(path=CONVERSATION, classes=MIXED, start_rps=0.3),
    "mooncake": Traffic(path=MOONCAKE, classes=LONG, start_rps=0.1, max_model_len=131_072),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for all policies.

    Attributes:
        order: of prompts.
        nic_gbps: between nodes, per GPU; None for the hardware's.
        colocate: whether each node has instances of both pools.
    """

    order: str = "arrival"
    nic_gbps: float | None = None
    colocate: bool = False


def spec_of(gpus: int, policy: str, setting: Setting = Setting(), max_model_len: int = 16_384) -> ClusterSpec:
    """Half of the GPUs for each phase."""
    # What the policies themselves do, without the instances' refusals.
    keys: dict[str, Any] = {"policy": policy, "prefill_order": setting.order, "prefill_queue": "open"}
    keys["engine_options"] = {"max_model_len": max_model_len}
    if setting.colocate:
        keys["colocate"] = GPUS_PER_NODE
    spec = load_spec(SPEC, keys)
    if setting.nic_gbps is not None:
        network = spec.sim.network.model_copy(update={"nic_gbps": setting.nic_gbps})
        spec = spec.model_copy(update={"sim": spec.sim.model_copy(update={"network": network})})
    pools = {
        role: getattr(spec, role).model_copy(update={"count": gpus // 2 // spec.prefill.ranks})
        for role in ("prefill", "decode")
    }
    return spec.model_copy(update=pools)


@cache
def trace(path: Path) -> list[WorkloadRequest]:
    return load_trace(path)


def requests_of(traffic: Traffic, gpus: int, seed: int) -> tuple[list[WorkloadRequest], tuple[SloClass, ...]]:
    """A part of the trace, from a random place on, and the class of each request."""
    rng = Random(f"{seed}/part")
    count = REQUESTS_PER_GPU * gpus
    whole = trace(traffic.path)
    first = rng.randrange(max(1, len(whole) - count))
    longest = traffic.max_model_len
    part = [r for r in whole[first : first + count] if r.input_tokens + r.output_tokens <= longest]
    return from_zero(part), assign_slo_classes(part, traffic.classes, Random(f"{seed}/classes"))


def attainment(spec: ClusterSpec, requests: Sequence[WorkloadRequest], classes: Sequence[SloClass]) -> float:
    result = Simulation(spec, requests, classes).run()
    return sum(request.met for request in result.requests) / len(result.requests)


def goodput(
    name: str, traffic: Traffic, gpus: int, seed: int, setting: Setting, guess_rps: float | None
) -> float:
    """Requests/s and GPU; `guess_rps` is what another seed or size has found, if any has."""
    requests, classes = requests_of(traffic, gpus, seed)
    spec = spec_of(gpus, name, setting, traffic.max_model_len)
    found = find_goodput(
        lambda rate: attainment(spec, rescale(requests, rate_rps=rate), classes),
        target=TARGET,
        tolerance=TOLERANCE,
        start_rps=(guess_rps or traffic.start_rps) * gpus,
        stride=STRIDE if guess_rps else 2.0,
    )
    return found.rate_rps / gpus


def by_size(
    name: str, sizes: Sequence[int], seeds: int, setting: Setting, policy: str
) -> dict[int, list[float]]:
    """Of one policy on one trace: requests/s and GPU of every seed, by GPUs."""
    found: dict[int, list[float]] = {}
    guess: float | None = None
    for gpus in sizes:
        began_s = time.perf_counter()
        found[gpus] = []
        for seed in range(seeds):
            guess = goodput(policy, TRAFFIC[name], gpus, seed, setting, guess)
            found[gpus].append(guess)
        print(
            f"{name} {gpus} {policy}: {', '.join(f'{rate:.3f}' for rate in found[gpus])}, "
            f"{time.perf_counter() - began_s:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name in POLICIES if name != "unsplit"]
    parser.add_argument("--gpus", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--traces", nargs="+", choices=list(TRAFFIC), default=list(TRAFFIC))
    parser.add_argument("--policies", nargs="+", choices=known, default=known)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--order", choices=["arrival", "deadline"], default="deadline", help="of prompts")
    parser.add_argument("--nic-gbps", type=float, help="between nodes, per GPU; default: H100's 400")
    parser.add_argument("--colocate", action="store_true", help="instances of both pools on each node")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    if not TRACES.is_dir():
        sys.exit(f"{TRACES.name}: the shared traces are needed beside the checkout")
    print("| trace | GPUs | policy | requests/s and GPU, by seed | mean | goodput's ratio to it |")
    print("|---|---|---|---|---|---|")
    with ProcessPoolExecutor(args.jobs) as workers:
        for name in args.traces:
            setting = Setting(order=args.order, nic_gbps=args.nic_gbps, colocate=args.colocate)
            chain = partial(by_size, name, args.gpus, args.seeds, setting)
            found = dict(zip(args.policies, workers.map(chain, args.policies), strict=True))
            for gpus in args.gpus:
                best = fmean(found["goodput"][gpus]) if "goodput" in found else 0.0
                for policy in args.policies:
                    rates = found[policy][gpus]
                    by_seed = ", ".join(f"{rate:.3f}" for rate in rates)
                    print(
                        f"| {name} | {gpus} | {policy} | {by_seed} | {fmean(rates):.3f} "
                        f"| {best / fmean(rates):.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
