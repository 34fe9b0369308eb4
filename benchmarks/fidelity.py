"""Live against simulated: the same requests through a real cluster on this machine's CPUs, and simulated.

python -m benchmarks.fidelity                # a model whose engine, not the front end, has the work
python -m benchmarks.fidelity --size tiny    # the demo's model: here both compete for the same two cores

Starts `deploy/specs/cpu.yaml` (one prefill, one decode instance, real vLLM and NIXL), measures it with
`pdserve profile --url`, then sends a workload at three loads, several rounds of each, interleaved, and
simulates what was really sent: the lengths and the send times of the live run, with the profile that was just
measured. The cores are kept awake all the while.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from benchmarks.cluster import ROOT, URL, cluster, wait_serving
from cluster.request import Slo
from cluster.spec import ClusterSpec, load_spec
from deploy.model_store import tiny_model_ready
from deploy.replay import ReplayOptions, replay
from deploy.replay_report import ReplayReport
from deploy.simulator.result import SimulationResult
from deploy.simulator.run import Simulation
from deploy.slo_classes import SloClass
from deploy.trace_shapes import conversation_like
from deploy.workload import WorkloadRequest

SPEC = ROOT / "deploy" / "specs" / "cpu.yaml"
# Sizes over the tiny model's config, with its tokenizer; the weights are vLLM's dummies.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {},
    "small": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
}


@dataclass(frozen=True)
class Plan:
    """What is sent: requests per round, the longest prompt and answer, and the loads in requests/s."""

    requests: int
    max_input: int
    max_output: int
    rates: tuple[float, ...]
    max_prompt: int
    max_concurrency: int


PLANS = {
    "tiny": Plan(400, 1024, 128, (4.0, 20.0, 40.0), 1024, 64),
    "small": Plan(120, 160, 48, (1.0, 8.0, 16.0), 192, 16),
}


@dataclass(frozen=True)
class Pair:
    """One round at one load: what was measured, and what was simulated of it."""

    live: ReplayReport
    simulated: SimulationResult


def build_model(directory: Path, size: str) -> Path:
    """The tiny model's tokenizer with another config; the tiny model itself where nothing changes."""
    tiny = ROOT / ".cache" / "models" / "tiny"
    if not tiny_model_ready(tiny, seed=0):
        from deploy.tiny_model_torch import build_tiny_model

        build_tiny_model(tiny, seed=0)
    if not SIZES[size]:
        return tiny
    target = directory / size
    target.mkdir()
    for file in tiny.iterdir():
        if file.suffix not in (".safetensors",) and file.name != "pdserve_model.json":
            shutil.copy(file, target)
    config = json.loads((tiny / "config.json").read_text()) | SIZES[size]
    (target / "config.json").write_text(json.dumps(config))
    return target


def spec_for(directory: Path, model: Path, size: str) -> Path:
    """cpu.yaml with that model; and a seat for the profile."""
    raw: dict[str, Any] = yaml.safe_load(SPEC.read_text())
    raw["model"] = str(model)
    if SIZES[size]:
        raw["engine_options"]["load_format"] = "dummy"
    path = directory / "cpu.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@contextmanager
def profiled(spec: Path, out: Path, plan: Plan, seconds: float) -> Iterator[None]:
    """A running cluster, measured."""
    with cluster("", spec=str(spec)) as running:
        print(f"serving after {wait_serving(running):.1f} s", file=sys.stderr, flush=True)
        words = ["profile", "--url", URL, "--out", str(out), "--seconds", str(seconds)]
        words += ["--max-prompt", str(plan.max_prompt), "--max-concurrency", str(plan.max_concurrency)]
        subprocess.run([sys.executable, "-m", "deploy.cli", *words], cwd=ROOT, check=True)
        yield


@contextmanager
def awake() -> Iterator[None]:
    """Keep the cores from idling, by loops that give way to everything else (SCHED_IDLE).

    A virtual machine that idles between requests computes a fifth slower after the pause than one that does
    not, so a profile measured back to back would be of another machine than a lightly loaded cluster is.
    """
    code = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"
    spinning = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def workload(plan: Plan, rate: float, seed: int) -> list[WorkloadRequest]:
    return conversation_like(
        plan.requests,
        rate_rps=rate,
        max_input=plan.max_input,
        max_output=plan.max_output,
        rng=Random(seed),
    )


def one_round(spec: ClusterSpec, requests: list[WorkloadRequest], seed: int) -> Pair:
    """Live, then simulated with the send times that were kept."""
    live = asyncio.run(replay(URL, requests, ReplayOptions(seed=seed)))
    sent = [replace(requests[o.index], arrival_s=o.sent_s) for o in live.outcomes]
    order = sorted(sent, key=lambda request: request.arrival_s)
    return Pair(live, Simulation(spec, order).run())


def attainment(pair: Pair, slo: Slo) -> tuple[float, float]:
    """Shares of requests within the SLO, live and simulated."""
    live = sum(outcome.meets(slo) for outcome in pair.live.outcomes) / len(pair.live.outcomes)
    judged = SloClass(name="all", slo=slo)
    simulated = [replace(request, slo=judged.slo) for request in pair.simulated.requests]
    return live, sum(request.met for request in simulated) / len(simulated)


def mean(values: Sequence[float | None]) -> float:
    return statistics.fmean(value for value in values if value is not None)


def row(rate: float, pairs: list[Pair], slo: Slo) -> str:
    """One line of the table: means over all rounds."""
    cells = [f"{rate:g}", str(sum(len(pair.live.outcomes) for pair in pairs))]
    for name in ("ttft_s", "tpot_s"):
        live = mean([getattr(o, name) for pair in pairs for o in pair.live.outcomes])
        simulated = mean([getattr(r, name) for pair in pairs for r in pair.simulated.requests])
        per_round = [
            mean([getattr(r, name) for r in pair.simulated.requests])
            / mean([getattr(o, name) for o in pair.live.outcomes])
            - 1
            for pair in pairs
        ]
        spread = f"{min(per_round):+.0%} to {max(per_round):+.0%}"
        cells += [f"{live * 1e3:.1f}", f"{simulated * 1e3:.1f}", f"{simulated / live - 1:+.1%} ({spread})"]
    shares = [attainment(pair, slo) for pair in pairs]
    live_share, simulated_share = (statistics.fmean(share) for share in zip(*shares, strict=True))
    cells += [f"{live_share:.1%}", f"{simulated_share:.1%}", f"{(simulated_share - live_share) * 100:+.1f}"]
    for instance in (0, 1):
        busy = [p.simulated.instances[instance].busy_s / p.simulated.duration_s for p in pairs]
        cells.append(f"{statistics.fmean(busy):.0%}")
    return "| " + " | ".join(cells) + " |"


COLUMNS = (
    "rate (1/s)", "requests", "TTFT live (ms)", "simulated", "difference (by round)",
    "TPOT live (ms)", "simulated", "difference (by round)",
    "within SLO live", "simulated", "points", "prefill busy", "decode busy",
)  # fmt: skip
HEADER = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=150.0, help="for the profile")
    parser.add_argument("--profile", type=Path, help="write the profile here, to keep it")
    args = parser.parse_args()
    plan = PLANS[args.size]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        spec_path = spec_for(directory, build_model(directory, args.size), args.size)
        profile = args.profile or directory / "profile.json"
        pairs: dict[float, list[Pair]] = {rate: [] for rate in plan.rates}
        with awake(), profiled(spec_path, profile, plan, args.seconds):
            spec = load_spec(spec_path, {"sim": {"profile": str(profile)}})
            for number in range(args.rounds):
                for rate in plan.rates:
                    pair = one_round(spec, workload(plan, rate, seed=number), seed=number)
                    pairs[rate].append(pair)
                    print(f"round {number + 1}, {rate:g}/s: {pair.live.counts}", file=sys.stderr, flush=True)
    idle = pairs[plan.rates[0]]
    # Bounds that the loads part: between what an idle cluster and a full one give.
    slo = Slo(
        ttft_s=2.5 * mean([o.ttft_s for pair in idle for o in pair.live.outcomes]),
        tpot_s=1.5 * mean([o.tpot_s for pair in idle for o in pair.live.outcomes]),
    )
    print(f"\nSLO: TTFT {slo.ttft_s * 1e3:.0f} ms, TPOT {slo.tpot_s * 1e3:.1f} ms\n\n{HEADER}")
    for rate in plan.rates:
        print(row(rate, pairs[rate], slo))


if __name__ == "__main__":
    main()
