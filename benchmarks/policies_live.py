"""Policies against each other, live: in Ray actors behind vLLM's front end (Markdown).

python -m benchmarks.policies_live --model .cache/models/tiny
python -m benchmarks.policies_live --policies goodput mooncake least_tokens --rounds 2
python -m benchmarks.policies_live --engine vllm --rate 20

Two prefill and two decode instances, conversations of three SLO classes whose bounds go along in headers, at
a load that the policies differ at; every policy has a cluster of its own, by turns in each round. Twins are
of Llama-3-70B on H100s, and the last column is the simulator's answer for the same requests. vLLM's engines
compute the tiny model on this machine's CPUs, with nothing to predict from but what the router learns, and
bounds that are multiples of what it takes alone.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import fmean

from benchmarks.parity import PORT, WARM_UP_COUNT, WARM_UP_RPS, parity_spec, workload
from benchmarks.policies import MIXED
from cluster.instance import Role
from cluster.request import Slo
from cluster.spec import ClusterSpec, load_spec
from deploy.ray_up import serving
from deploy.replay import ReplayOptions, replay
from deploy.replay_report import ReplayReport
from deploy.simulator.run import Simulation
from deploy.slo_classes import SloClass, assign_slo_classes
from deploy.status import read_metric
from deploy.trace_shapes import conversation_like
from deploy.workload import WorkloadRequest
from router.policies import POLICIES

ROOT = Path(__file__).resolve().parent.parent
# Of the times alone: TTFT and TPOT of the three classes.
MULTIPLES = ((8.0, 3.0), (25.0, 6.0), (200.0, 20.0))
ALONE_RPS, ALONE_COUNT = 1.0, 20
VLLM_MAX_INPUT, VLLM_MAX_OUTPUT = 1500, 64
URL = f"http://127.0.0.1:{PORT}"


def spec_of(model: str, policy: str, order: str) -> ClusterSpec:
    spec = parity_spec(model, Path(tempfile.gettempdir()) / "unused")
    ingress = spec.ingress.model_copy(update={"decision_log": None})
    return spec.model_copy(update={"policy": policy, "prefill_order": order, "ingress": ingress})


def conversations(rate_rps: float, count: int, seed: int) -> list[WorkloadRequest]:
    """As long as two cores serve them."""
    return conversation_like(
        count, rate_rps=rate_rps, max_input=VLLM_MAX_INPUT, max_output=VLLM_MAX_OUTPUT, rng=Random(seed)
    )


async def send(
    requests: list[WorkloadRequest], classes: tuple[SloClass, ...] | None, seed: int
) -> ReplayReport:
    return await replay(URL, requests, ReplayOptions(seed=seed, classes=classes))


def vllm_spec(model: str, policy: str, order: str) -> ClusterSpec:
    """`cpu.yaml` with two instances of each phase."""
    spec = load_spec(ROOT / "deploy" / "specs" / "cpu.yaml", {"model": model, "policy": policy})
    two = {str(role): spec.pool(role).model_copy(update={"count": 2, "cpus": 0.5}) for role in Role}
    ingress = spec.ingress.model_copy(update={"port": PORT})
    return spec.model_copy(update={"prefill_order": order, "ingress": ingress, **two})


def bounds_of(alone: ReplayReport) -> tuple[SloClass, ...]:
    """Three classes, in multiples of the median times of requests that were alone."""
    ttft, tpot = alone.latencies["ttft_s"], alone.latencies["tpot_s"]
    assert ttft is not None
    assert tpot is not None
    return tuple(
        replace(one, slo=Slo(ttft_s=first * ttft.p50, tpot_s=each * tpot.p50))
        for one, (first, each) in zip(MIXED, MULTIPLES, strict=True)
    )


PREDICTIONS = tuple((what, kind) for what in ("ttft", "tpot") for kind in ("predicted", "actual"))


def predictions() -> list[tuple[float, float]]:
    """Sum and count of what was predicted and of what came, in the order of `PREDICTIONS`."""
    return [
        (
            read_metric(URL, f'pdserve_prediction_seconds_sum{{kind="{kind}",what="{what}"}}'),
            read_metric(URL, f'pdserve_prediction_seconds_count{{kind="{kind}",what="{what}"}}'),
        )
        for what, kind in PREDICTIONS
    ]


@dataclass(slots=True)
class Found:
    """Of one policy, by round: shares kept and rejected, mean times predicted and come, and the simulator's
    share."""

    kept: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    times_ms: list[tuple[float, ...]] = field(default_factory=list)
    twins: list[float] = field(default_factory=list)

    def add(
        self, report: ReplayReport, before: list[tuple[float, float]], after: list[tuple[float, float]]
    ) -> None:
        requests = sum(report.counts.values())
        self.kept.append(report.met / requests)
        self.rejected.append(report.counts["rejected"] / requests)
        spent = [
            (total - total_then, count - count_then)
            for (total_then, count_then), (total, count) in zip(before, after, strict=True)
        ]
        self.times_ms.append(tuple(1e3 * total / count if count else 0.0 for total, count in spent))

    def __str__(self) -> str:
        ttft, ttft_came, tpot, tpot_came = (fmean(column) for column in zip(*self.times_ms, strict=True))
        times = f"{ttft:.0f}, {ttft_came:.0f}; {tpot:.1f}, {tpot_came:.1f}" if ttft else "-"
        cells = [", ".join(f"{share:.1%}" for share in self.kept), f"{fmean(self.kept):.1%}"]
        cells += [f"{fmean(self.rejected):.1%}", times, f"{fmean(self.twins):.1%}" if self.twins else "-"]
        return " | ".join(cells)


def simulated(spec: ClusterSpec, requests: list[WorkloadRequest], classes: tuple[SloClass, ...]) -> float:
    found = Simulation(spec, requests, classes).run().requests
    return sum(request.met for request in found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for name in POLICIES if name != "unsplit"]
    parser.add_argument("--model", default=".cache/models/tiny", help="checkpoint, for its tokenizer")
    parser.add_argument("--engine", choices=["sim", "vllm"], default="sim")
    parser.add_argument("--policies", nargs="+", choices=known, default=known)
    parser.add_argument("--order", choices=["arrival", "deadline"], default="deadline", help="of prompts")
    parser.add_argument("--rate", type=float, default=24.0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    made = spec_of if args.engine == "sim" else vllm_spec
    load = workload if args.engine == "sim" else conversations
    mixed: tuple[SloClass, ...] = MIXED
    found = {policy: Found() for policy in args.policies}
    for seed in range(args.rounds):
        for policy in args.policies:
            spec = made(args.model, policy, args.order)
            with serving(spec, say=lambda line: print(line, file=sys.stderr)):
                asyncio.run(send(load(WARM_UP_RPS, WARM_UP_COUNT, 999), None, 999))
                if args.engine == "vllm" and mixed is MIXED:  # the same bounds for all policies
                    mixed = bounds_of(asyncio.run(send(load(ALONE_RPS, ALONE_COUNT, 998), None, 998)))
                    told = ", ".join(
                        f"{1e3 * c.slo.ttft_s:.0f} and {1e3 * c.slo.tpot_s:.0f} ms" for c in mixed
                    )
                    print(f"bounds: {told}", file=sys.stderr)
                requests = load(args.rate, args.count, seed)
                classes = assign_slo_classes(requests, mixed, Random(seed))
                before = predictions()
                report = asyncio.run(send(requests, classes, seed))
                found[policy].add(report, before, predictions())
                if args.engine == "sim":
                    found[policy].twins.append(simulated(spec, requests, classes))
            print(f"round {seed + 1}, {policy}: {found[policy].kept[-1]:.1%}", file=sys.stderr)
    print("| policy | within SLO live, by round | mean | rejected "
          "| TTFT as predicted, as it came; TPOT (ms) | simulated |\n|---|---|---|---|---|---|")  # fmt: skip
    for policy, one in found.items():
        print(f"| {policy} | {one} |")


if __name__ == "__main__":
    main()
