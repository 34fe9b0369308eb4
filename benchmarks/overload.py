"""Overload: what is kept of a cluster's goodput at three times what it can do, simulated (Markdown).

python -m benchmarks.overload                          # ten minutes of virtual time at each load
python -m benchmarks.overload --seconds 120 --shadows 40

Lengths of the Azure 2023 conversation trace, Poisson arrivals, 32 H100s (as `benchmarks.policies`). And was a
rejection right? Some of the rejected requests are let in after all, each in a run of its own that is the same
up to there, and it is counted how many of them miss their SLO. Needs the shared traces.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from benchmarks.latency_data import TRACES
from benchmarks.policies import CONVERSATION, MIXED, USUAL, spec_of, trace
from cluster.request import ServeRequest
from cluster.spec import ClusterSpec
from deploy.simulator.result import SimulatedRequest
from deploy.simulator.run import Simulation
from deploy.slo_classes import SloClass, assign_slo_classes
from deploy.workload import WorkloadRequest
from router.policy import Decision, Policy
from router.view import View

LOADS = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
GPUS = 32
# A shadow run goes on for so long after its request came: long enough for the answer.
SHADOW_S = 60.0


class LetIn:
    """A policy under which one request is admitted whatever its chance."""

    def __init__(self, policy: Policy, name: str) -> None:
        self._policy = policy
        self._name = name

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        decision = self._policy.decide(request, view, now_s)
        if request.request_id != self._name or decision.predicted is None:
            return decision
        return replace(decision, predicted=replace(decision.predicted, chance=1.0))


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
) -> tuple[SimulatedRequest, ...]:
    return Simulation(spec, requests, classes, wrap=lambda policy: LetIn(policy, let_in)).run().requests


def is_missed(
    spec: ClusterSpec,
    requests: Sequence[WorkloadRequest],
    classes: Sequence[SloClass],
    rejected: SimulatedRequest,
) -> bool:
    """Whether a rejected request misses its SLO when it is let in. Those that come after it come too: they
    may delay it."""
    last_s = requests[rejected.index].arrival_s + SHADOW_S
    until = sum(request.arrival_s < last_s for request in requests)
    found = run(spec, requests[:until], classes[:until], f"r{rejected.index}")[rejected.index]
    return not found.met


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="goodput")
    parser.add_argument("--order", choices=["arrival", "deadline"], default="arrival", help="of prompts")
    parser.add_argument("--classes", choices=["usual", "mixed"], default="usual")
    parser.add_argument("--capacity", type=float, default=1.3, help="requests/s and GPU that are load 1")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--shadows", type=int, default=30, help="rejections to check, at the highest load")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not TRACES.is_dir():
        sys.exit(f"{TRACES.name}: the shared traces are needed beside the checkout")
    spec = spec_of(GPUS, args.policy, args.order)
    kinds = USUAL if args.classes == "usual" else MIXED
    print("| load | requests | kept | kept/s | rejected | let in and missed | longest TTFT of a bound |")
    print("|---|---|---|---|---|---|---|")
    for load in LOADS:
        requests = poisson(load * args.capacity * GPUS, args.seconds, Random(f"{args.seed}/{load}"))
        classes = assign_slo_classes(requests, kinds, Random(args.seed))
        found = run(spec, requests, classes)
        kept = sum(request.met for request in found)
        rejected = [request for request in found if request.status == "rejected"]
        late = max(r.ttft_s / r.slo.ttft_s for r in found if r.ttft_s is not None)
        missed = len(found) - kept - len(rejected)
        print(
            f"| {load:g} | {len(found)} | {kept / len(found):.1%} | {kept / args.seconds:.1f} "
            f"| {len(rejected) / len(found):.1%} | {missed / len(found):.1%} | {late:.2f} |",
            flush=True,
        )
    early = [one for one in rejected if requests[one.index].arrival_s < 2 * SHADOW_S]
    chosen = Random(args.seed).sample(early, min(args.shadows, len(early)))
    right = sum(is_missed(spec, requests, classes, one) for one in chosen)
    print(f"\nOf {len(chosen)} rejections at load {LOADS[-1]:g}, {right} were right.")


if __name__ == "__main__":
    main()
