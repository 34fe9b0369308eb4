"""Policies against each other, live: twins in Ray actors behind vLLM's front end (Markdown).

python -m benchmarks.policies_live --model .cache/models/tiny
python -m benchmarks.policies_live --policies goodput mooncake least_tokens --rounds 2

Two prefill and two decode instances of Llama-3-70B on H100s, conversations of three SLO classes whose bounds
go along in headers, at a load that the policies differ at. The last column is the simulator's answer for the
same requests. Every policy has a cluster of its own, one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from random import Random
from statistics import fmean

from benchmarks.parity import PORT, WARM_UP_COUNT, WARM_UP_RPS, parity_spec, workload
from benchmarks.policies import MIXED
from cluster.spec import ClusterSpec
from deploy.ray_up import serving
from deploy.replay import ReplayOptions, replay
from deploy.replay_report import ReplayReport
from deploy.simulator.run import Simulation
from deploy.slo_classes import SloClass, assign_slo_classes
from deploy.workload import WorkloadRequest
from router.policies import POLICIES

URL = f"http://127.0.0.1:{PORT}"


def spec_of(model: str, policy: str, order: str) -> ClusterSpec:
    spec = parity_spec(model, Path(tempfile.gettempdir()) / "unused")
    ingress = spec.ingress.model_copy(update={"decision_log": None})
    return spec.model_copy(update={"policy": policy, "prefill_order": order, "ingress": ingress})


async def send(
    requests: list[WorkloadRequest], classes: tuple[SloClass, ...] | None, seed: int
) -> ReplayReport:
    return await replay(URL, requests, ReplayOptions(seed=seed, classes=classes))


def simulated(spec: ClusterSpec, requests: list[WorkloadRequest], classes: tuple[SloClass, ...]) -> float:
    found = Simulation(spec, requests, classes).run().requests
    return sum(request.met for request in found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name in POLICIES if name != "unsplit"]
    parser.add_argument("--model", default=".cache/models/tiny", help="checkpoint, for its tokenizer")
    parser.add_argument("--policies", nargs="+", choices=known, default=known)
    parser.add_argument("--order", choices=["arrival", "deadline"], default="deadline", help="of prompts")
    parser.add_argument("--rate", type=float, default=24.0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    print("| policy | within SLO live, by round | mean | rejected | simulated |\n|---|---|---|---|---|")
    for policy in args.policies:
        spec = spec_of(args.model, policy, args.order)
        rounds, rejected, twins = [], [], []
        with serving(spec, say=lambda line: print(line, file=sys.stderr)):
            asyncio.run(send(workload(WARM_UP_RPS, WARM_UP_COUNT, 999), None, 999))
            for seed in range(args.rounds):
                requests = workload(args.rate, args.count, seed)
                classes = assign_slo_classes(requests, MIXED, Random(seed))
                report = asyncio.run(send(requests, classes, seed))
                rounds.append(report.met / len(requests))
                rejected.append(report.counts["rejected"] / len(requests))
                twins.append(simulated(spec, requests, classes))
        by_round = ", ".join(f"{share:.1%}" for share in rounds)
        print(
            f"| {policy} | {by_round} | {fmean(rounds):.1%} | {fmean(rejected):.1%} | {fmean(twins):.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
