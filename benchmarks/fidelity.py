"""Live against simulated: the same requests through a real cluster on this machine's CPUs, and simulated.

python -m benchmarks.fidelity                # a model whose engine, not the front end, has the work
python -m benchmarks.fidelity --size tiny    # the demo's model: here both compete for the same two cores
python -m benchmarks.fidelity --speed 2      # on a machine that is twice as fast: rates twice as high
python -m benchmarks.fidelity --keep FILE    # also keep what was measured ...
python -m benchmarks.fidelity --again FILES  # ... to fit and simulate it again, several runs together

Starts `deploy/specs/cpu.yaml` (one prefill, one decode instance, real vLLM and NIXL). A round measures it as
`pdserve profile --url` does, every point of the grid once, and sends a workload at three loads in between.
The speed of a shared machine drifts within minutes: the profile is fitted to the points of all rounds, and
for each load it is scaled to the pace of the points that were measured just before and after it. Nothing of
what the loads measured goes into it. What was really sent, the lengths and the send times of the live runs,
is simulated then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pickle
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from benchmarks.cluster import ROOT, URL, cluster, wait_serving
from cluster.latency import LatencyProfile
from cluster.request import Slo
from cluster.spec import ClusterSpec, load_spec
from deploy.model_store import tiny_model_ready
from deploy.profiler.streams import PointStreams
from deploy.profiler.url import server_to_measure
from deploy.profiler.url_fit import fit_streams, paces, profile_of, table_of
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
    "medium": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
}


# Tokens that a point of the profile computes first; more take a core seconds and tell nothing new.
LARGEST_BURST = 2048


@dataclass(frozen=True)
class Plan:
    """What is sent: the longest prompt and answer in tokens, the loads as (requests/s, seconds of a round);
    and the most requests at once in the profile."""

    max_input: int
    max_output: int
    loads: tuple[tuple[float, float], ...]
    max_concurrency: int


# From next to idle to more than the prefill instance can do, on a machine where that is five requests/s.
PLANS = {
    "tiny": Plan(1024, 128, ((4.0, 20.0), (20.0, 20.0), (60.0, 10.0)), 64),
    "medium": Plan(512, 64, ((0.5, 40.0), (2.5, 40.0), (10.0, 12.0)), 16),
}


@dataclass(frozen=True)
class Pair:
    """One round at one load: what was measured, and what was simulated of it."""

    live: ReplayReport
    simulated: SimulationResult


Pairs = dict[float, list[Pair]]


@dataclass
class Measured:
    """What one run of the benchmark measured: points of the profile, load, points, load, ..., points."""

    model: str = ""
    slices: list[list[PointStreams]] = field(default_factory=list)
    live: list[tuple[float, int, ReplayReport]] = field(default_factory=list)

    @property
    def visits(self) -> list[PointStreams]:
        """All points."""
        return [visit for part in self.slices for visit in part]


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


def workload(plan: Plan, rate: float, seed: int) -> list[WorkloadRequest]:
    """The same requests at every load, as many as are sent in the time."""
    counts = {rate: round(rate * seconds) for rate, seconds in plan.loads}
    requests = conversation_like(
        max(counts.values()),
        rate_rps=1.0,
        max_input=plan.max_input,
        max_output=plan.max_output,
        rng=Random(seed),
    )
    return [replace(r, arrival_s=r.arrival_s / rate) for r in requests[: counts[rate]]]


async def one_round(measured: Measured, plan: Plan, number: int, *, last: bool) -> None:
    """A third of the points of the profile's grid, a load, the next third, and so on."""
    rng = Random(f"profile/{number}")
    async with server_to_measure(URL, None, plan.max_input, plan.max_concurrency, rng) as server:
        measured.model = server.model.name
        server.points = [point for point in server.points if point.requests * point.tokens <= LARGEST_BURST]
        if not number:
            await server.round(0, len(plan.loads))  # warm-up
        for part, (rate, _) in enumerate(plan.loads):
            measured.slices.append(await server.round(part, len(plan.loads)))
            # Other prompts at each load, else they would be in the prefix cache.
            options = ReplayOptions(seed=number * len(plan.loads) + part)
            report = await replay(URL, workload(plan, rate, seed=number), options)
            measured.live.append((rate, number, report))
            print(f"round {number + 1}, {rate:g}/s: {report.counts}", file=sys.stderr, flush=True)
        if last:
            measured.slices.append(await server.round(0, len(plan.loads)))


def measure(spec: Path, plan: Plan, rounds: int) -> Measured:
    """All rounds, on a cluster that is started for them."""
    measured = Measured()
    with cluster("", spec=str(spec)) as running:
        print(f"serving after {wait_serving(running):.1f} s", file=sys.stderr, flush=True)
        for number in range(rounds):
            asyncio.run(one_round(measured, plan, number, last=number == rounds - 1))
    return measured


def at_pace(profile: LatencyProfile, visits: Sequence[PointStreams]) -> LatencyProfile:
    """The profile, as much slower or faster as these points were than it says."""
    return profile.at_pace(*paces(profile, visits))


def simulated(spec: ClusterSpec, live: ReplayReport, plan: Plan, rate: float, seed: int) -> Pair:
    """A live run beside its simulation, with the send times that were kept."""
    requests = workload(plan, rate, seed)
    sent = [replace(requests[o.index], arrival_s=o.sent_s) for o in live.outcomes]
    return Pair(live, Simulation(spec, sorted(sent, key=lambda request: request.arrival_s)).run())


def all_simulated(measured: Measured, plan: Plan, profile: LatencyProfile, spec_path: Path) -> Pairs:
    """Every live run beside its simulation, by load."""
    pairs: Pairs = {}
    path = spec_path.with_name("pace.json")
    for at, (rate, number, live) in enumerate(measured.live):
        around = [visit for part in measured.slices[at : at + 2] for visit in part]
        at_pace(profile, around).save(path)
        spec = load_spec(spec_path, {"sim": {"profile": str(path)}})
        pairs.setdefault(rate, []).append(simulated(spec, live, plan, rate, number))
    return pairs


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


def print_table(pairs: Pairs) -> None:
    """A line per load, under bounds between what an idle cluster and a full one give."""
    idle = next(iter(pairs.values()))
    slo = Slo(
        ttft_s=2.5 * mean([o.ttft_s for pair in idle for o in pair.live.outcomes]),
        tpot_s=1.5 * mean([o.tpot_s for pair in idle for o in pair.live.outcomes]),
    )
    print(f"\nSLO: TTFT {slo.ttft_s * 1e3:.0f} ms, TPOT {slo.tpot_s * 1e3:.1f} ms\n\n{HEADER}")
    for rate, of_rate in pairs.items():
        print(row(rate, of_rate, slo))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="medium")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--speed", type=float, default=1.0, help="of this machine: the rates times it")
    parser.add_argument("--profile", type=Path, help="write the profile here")
    parser.add_argument("--keep", type=Path, help="write what was measured here")
    parser.add_argument("--again", type=Path, nargs="+", help="what earlier runs kept, instead of measuring")
    args = parser.parse_args()
    plan = PLANS[args.size]
    plan = replace(plan, loads=tuple((rate * args.speed, s / args.speed) for rate, s in plan.loads))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        spec_path = spec_for(directory, build_model(directory, args.size), args.size)
        if args.again:
            runs: list[Measured] = [pickle.loads(file.read_bytes()) for file in args.again]
        else:
            runs = [measure(spec_path, plan, args.rounds)]
        if args.keep:
            args.keep.write_bytes(pickle.dumps(runs[0]))
        pairs: Pairs = {}
        for measured in runs:
            found = fit_streams(measured.visits)
            profile = profile_of(found, measured.model, URL, measured.visits)
            if args.profile:
                profile.save(args.profile)
            print(table_of(found, profile))
            for rate, of_rate in all_simulated(measured, plan, profile, spec_path).items():
                pairs.setdefault(rate, []).extend(of_rate)
        print_table(pairs)


if __name__ == "__main__":
    main()
