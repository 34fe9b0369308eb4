"""Overload: what is kept of a cluster's goodput at three times what it can do, simulated (Markdown).

python -m benchmarks.overload                          # ten minutes of virtual time at each load
python -m benchmarks.overload --loads 3 --seconds 60 --shadows 100   # whether rejections were right

Lengths of the Azure 2023 conversation trace, Poisson arrivals, 32 H100s (as `benchmarks.policies`). And was a
rejection right? Some of the rejected requests are let in after all, each in a run of its own that is the same
up to there. Of those that had no chance it is counted how many miss their SLO; of those that would have cost
others more, after how many no more requests are kept in all. Needs the shared traces.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from random import Random
from statistics import fmean, stdev
from typing import NamedTuple

from benchmarks.latency_data import TRACES
from benchmarks.policies import CONVERSATION, MIXED, USUAL, Setting, spec_of, trace
from cluster.request import ServeRequest
from cluster.spec import ClusterSpec
from deploy.simulator.result import SimulatedRequest
from deploy.simulator.run import Simulation
from deploy.slo_classes import SloClass, assign_slo_classes
from deploy.workload import WorkloadRequest
from router.admission import LEAST_CHANCE
from router.policy import Decision, Policy
from router.view import View

LOADS = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
GPUS = 32
# Rejections of this time are checked, in runs that go on for long enough for answers.
CHECKED_S, SHADOW_S = (10.0, 30.0), 60.0


class LetIn:
    """A policy under which one request is admitted whatever its chance.

    Attributes:
        hopeless: requests that had next to none.
    """

    def __init__(self, policy: Policy, name: str) -> None:
        self._policy = policy
        self._name = name
        self.hopeless: set[str] = set()

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        decision = self._policy.decide(request, view, now_s)
        if decision.predicted is None:
            return decision
        if decision.predicted.chance < LEAST_CHANCE:
            self.hopeless.add(request.request_id)
        if request.request_id != self._name:
            return decision
        return replace(decision, predicted=replace(decision.predicted, chance=1.0, harm=0.0))


def poisson(rate_rps: float, seconds: float, rng: Random) -> list[WorkloadRequest]:
    """Requests with lengths of the trace."""
    lengths = [r for r in trace(CONVERSATION) if r.input_tokens + r.output_tokens <= 8192]
    requests = []
    now_s = rng.expovariate(rate_rps)
    while now_s < seconds:
        requests.append(replace(rng.choice(lengths), arrival_s=now_s))
        now_s += rng.expovariate(rate_rps)
    return requests


def run(
    spec: ClusterSpec, requests: Sequence[WorkloadRequest], classes: Sequence[SloClass], let_in: str = ""
) -> tuple[tuple[SimulatedRequest, ...], set[str]]:
    """What became of the requests, and which of them had no chance."""
    policies: list[LetIn] = []

    def wrap(policy: Policy) -> Policy:
        policies.append(LetIn(policy, let_in))
        return policies[-1]

    found = Simulation(spec, requests, classes, wrap=wrap).run().requests
    return found, policies[-1].hopeless


def kept(found: Sequence[SimulatedRequest]) -> int:
    return sum(request.met for request in found)


class Shadow(NamedTuple):
    """A run in which a rejected request is let in, and the same without.

    Attributes:
        is_met: whether it kept its SLO.
        gained: requests kept more than without it.
    """

    name: str
    is_met: bool
    gained: int


World = tuple[ClusterSpec, Sequence[WorkloadRequest], Sequence[SloClass]]


def shadow(world: World, without: int, index: int) -> Shadow:
    """Let one in; `without` is how many are kept where it is not."""
    found, _ = run(*world, f"r{index}")
    return Shadow(f"r{index}", found[index].met, kept(found) - without)


def check_rejections(world: World, most: int, seed: int) -> Iterator[str]:
    """Lines that say how many of the rejections were right."""
    spec, requests, classes = world
    until = sum(request.arrival_s < SHADOW_S for request in requests)
    world = spec, requests[:until], classes[:until]
    found, hopeless = run(*world)
    first_s, last_s = CHECKED_S
    early = [one.index for one in found if one.status == "rejected" and first_s <= one.arrival_s < last_s]
    for kind, indexes in (
        ("had no chance", [index for index in early if f"r{index}" in hopeless]),
        ("cost others more", [index for index in early if f"r{index}" not in hopeless]),
    ):
        chosen = Random(seed).sample(indexes, min(most, len(indexes)))
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            calls = [pool.submit(shadow, world, kept(found), index) for index in chosen]
            shadows = [call.result() for call in calls]
        missed = sum(not one.is_met for one in shadows)
        useless = sum(one.gained <= 0 for one in shadows)
        mean = fmean(gained := [one.gained for one in shadows]) if shadows else 0.0
        error = stdev(gained) / math.sqrt(len(gained)) if len(shadows) > 1 else math.nan
        yield f"{len(indexes)} of {len(early)} rejected ones {kind}; of {len(chosen)} let in after all"
        yield (
            f"{missed} missed their SLO, and {useless} had no more kept in all "
            f"({mean:+.2f} on average, +- {error:.2f})."
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="goodput")
    parser.add_argument("--order", choices=["arrival", "deadline"], default="arrival", help="of prompts")
    parser.add_argument("--classes", choices=["usual", "mixed"], default="usual")
    parser.add_argument("--capacity", type=float, default=1.3, help="requests/s and GPU that are load 1")
    parser.add_argument(
        "--loads", type=float, nargs="+", default=LOADS, help="the last one's rejections are checked"
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--shadows", type=int, default=30, help="rejections of a kind to check")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not TRACES.is_dir():
        sys.exit(f"{TRACES.name}: the shared traces are needed beside the checkout")
    spec = spec_of(GPUS, args.policy, Setting(order=args.order))
    kinds = USUAL if args.classes == "usual" else MIXED
    print("| load | requests | kept | kept/s | rejected | let in and missed | longest TTFT of a bound |")
    print("|---|---|---|---|---|---|---|")
    for load in args.loads:
        requests = poisson(load * args.capacity * GPUS, args.seconds, Random(f"{args.seed}/{load}"))
        classes = assign_slo_classes(requests, kinds, Random(args.seed))
        found, _ = run(spec, requests, classes)
        met = kept(found)
        rejected = [request for request in found if request.status == "rejected"]
        late = max(r.ttft_s / r.slo.ttft_s for r in found if r.ttft_s is not None)
        missed = len(found) - met - len(rejected)
        print(
            f"| {load:g} | {len(found)} | {met / len(found):.1%} | {met / args.seconds:.1f} "
            f"| {len(rejected) / len(found):.1%} | {missed / len(found):.1%} | {late:.2f} |",
            flush=True,
        )
    print(f"\nAt load {args.loads[-1]:g}:")
    for line in check_rejections((spec, requests, classes), args.shadows, args.seed):
        print(line, flush=True)


if __name__ == "__main__":
    main()
