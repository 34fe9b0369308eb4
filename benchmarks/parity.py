"""Live against simulated, decision for decision.

Twins, 2 for prefill and 2 for decode, serve a trace in real time, in Ray actors behind vLLM's front end. Then
the simulator serves the same requests, arriving when they did. It is asked twice. With the same history: what
would it have decided at each request, had all before gone where they went live? And alone, where one decision
between two nearly equal instances that falls the other way changes the cluster for all that follow.

python -m benchmarks.parity --model .cache/models/tiny
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from cluster.request import ServeRequest, Stage
from cluster.spec import ClusterSpec, parse_spec
from deploy.ray_up import serving
from deploy.replay import ReplayOptions, replay
from deploy.replay_report import ReplayReport
from deploy.simulator.run import Simulation
from deploy.status import fetch_status, read_metric
from deploy.workload import WorkloadRequest, fit_to_model
from deploy.workload_grammar import make_workload
from router.decision_log import LoggedDecision, read_decisions
from router.policies import make_policy
from router.policy import Decision, Policy
from router.view import View

PORT = 18320
MAX_MODEL_LEN = 4096
MAX_OUTPUT = 256
EMPTY_DEADLINE_S = 10.0
WARM_UP_RPS, WARM_UP_COUNT = 5.0, 20
# Little enough that a prompt seldom waits for another.
CALIBRATION_RPS, CALIBRATION_COUNT = 3.0, 60
# vLLM 0.32 makes `cmpl-<x-request-id>-<number of the prompt>` of the header that `deploy.replay` sends.
_EXTERNAL = re.compile(r"cmpl-replay-(\d+)-(\d+)-0")

Picks = dict[int, tuple[str, str]]
"""(prefill, decode) of each request's first decision, by its index in the workload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """One load as it was served.

    Attributes:
        picks: first decisions by request.
        made_s: when they were made; sent_s: when clients sent the requests; each since a start of its own.
        prefill_s: mean of the router's prefill stage, from the sending to the engine's last word.
    """

    rate_rps: float
    requests: list[WorkloadRequest]
    report: ReplayReport
    picks: Picks
    made_s: dict[int, float]
    prefill_s: float

    @property
    def sent_s(self) -> dict[int, float]:
        return {outcome.index: outcome.sent_s for outcome in self.report.outcomes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """The same load simulated. `picks` are the policy's own, whether they were followed or not; means in
    seconds."""

    picks: Picks
    ttft_s: float
    tpot_s: float
    prefill_s: float


class Follow:
    """The policy `inner`, asked for its picks (kept in `own`), while others are followed."""

    def __init__(self, inner: Policy, followed: Mapping[str, tuple[str, str]]) -> None:
        self._inner = inner
        self._followed = followed
        self.own: dict[str, tuple[str, str]] = {}

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        decision = self._inner.decide(request, view, now_s)
        if request.request_id in self.own:  # an instance refused it, or failed it
            return decision
        self.own[request.request_id] = decision.prefill, decision.decode
        prefill, decode = self._followed.get(request.request_id, self.own[request.request_id])
        return replace(decision, prefill=prefill, decode=decode)


def parity_spec(model: str, log: Path) -> ClusterSpec:
    """Llama-3-70B on H100s, 4 to an instance and a node: what KV takes between two instances is one NIC path
    live and simulated."""
    pool = {"count": 2, "tensor_parallel_size": 4, "cpus": 0.1}
    return parse_spec(
        {
            "name": "parity",
            "model": model,
            "served_model_name": "twin",
            "device": "cpu",
            "engine": "sim",
            # Its decisions follow from exact counts; what others learn of times differs from run to run.
            "policy": "least_tokens",
            "engine_options": {"enforce_eager": True, "max_model_len": MAX_MODEL_LEN},
            "prefill": pool,
            "decode": pool,
            "sim": {"hardware": "h100", "shape": "llama-3-70b", "network": {"gpus_per_node": 4}},
            "ingress": {
                "port": PORT,
                "cpus": 0,
                "decision_log": str(log),
                "server_options": {"disable_uvicorn_access_log": True},
            },
        }
    )


def workload(rate_rps: float, count: int, seed: int) -> list[WorkloadRequest]:
    """Conversations that fit the twins."""
    requests = make_workload(f"poisson:rate={rate_rps},count={count},lengths=conversation", seed)
    return fit_to_model(requests, max_model_len=MAX_MODEL_LEN, max_output=MAX_OUTPUT)


def live_picks(lines: Sequence[LoggedDecision], seed: int) -> tuple[Picks, dict[int, float]]:
    """The first decisions of one load, and when they were made, in seconds."""
    picks: Picks = {}
    made_s: dict[int, float] = {}
    for line in lines:
        found = _EXTERNAL.fullmatch(line.external or "")
        if found is not None and int(found[1]) == seed and (index := int(found[2])) not in picks:
            picks[index] = line.prefill, line.decode
            made_s[index] = line.now_s
    return picks, made_s


def simulate(spec: ClusterSpec, live: Live, arrivals_s: Mapping[int, float], followed: Picks) -> Simulated:
    """Serve the same requests, arriving at these times by request, wherever `followed` sends them."""
    first_s = min(arrivals_s.values())
    order = sorted(arrivals_s, key=lambda index: (arrivals_s[index], index))
    names = {f"r{place}": index for place, index in enumerate(order)}
    policy = Follow(
        make_policy(spec.policy),
        {name: followed[index] for name, index in names.items() if index in followed},
    )
    simulation = Simulation(
        spec,
        [replace(live.requests[index], arrival_s=arrivals_s[index] - first_s) for index in order],
        policy=policy,
    )
    result = simulation.run()
    return Simulated(
        picks={names[name]: picks for name, picks in policy.own.items()},
        ttft_s=fmean(r.ttft_s for r in result.requests if r.ttft_s is not None),
        tpot_s=fmean(r.tpot_s for r in result.requests if r.tpot_s is not None),
        prefill_s=_mean_prefill_s(simulation),
    )


def _mean_prefill_s(simulation: Simulation) -> float:
    samples = {
        sample.name.rsplit("_", 1)[1]: sample.value
        for metric in simulation.router.metrics.stage_seconds.collect()
        for sample in metric.samples
        if sample.labels.get("stage") == Stage.PREFILL.value and sample.name.endswith(("_sum", "_count"))
    }
    return samples["sum"] / samples["count"]


def same(live: Picks, simulated: Picks, *parts: int) -> float:
    """Share of the requests whose picks are equal in these parts (0 is prefill, 1 is decode)."""
    equal = sum(all(live[index][part] == simulated[index][part] for part in parts) for index in live)
    return equal / len(live)


def wait_empty(url: str) -> None:
    """Raises RuntimeError when an instance still holds something long after the last answer."""
    deadline_s = time.monotonic() + EMPTY_DEADLINE_S
    while time.monotonic() < deadline_s:
        status = fetch_status(url)
        loads = [row["load"] for row in status["instances"]]
        if not status["pending"] and all(
            load["kv_usage"] == load["running"] == load["waiting"] == 0 for load in loads
        ):
            return
        time.sleep(0.05)
    raise RuntimeError(f"all requests have ended, and still held is {loads}")


def serve(url: str, rate_rps: float, count: int) -> tuple[ReplayReport, float]:
    """Replay one load; returns what its clients saw and the mean prefill stage in seconds."""
    before = _stage(url)
    options = ReplayOptions(seed=seed_of(rate_rps))
    report = asyncio.run(replay(url, workload(rate_rps, count, seed_of(rate_rps)), options))
    print(report.to_text(), file=sys.stderr)
    wait_empty(url)
    total_s, stages = (after - was for after, was in zip(_stage(url), before, strict=True))
    return report, total_s / stages


def _stage(url: str) -> tuple[float, float]:
    label = f'{{stage="{Stage.PREFILL.value}"}}'
    return (
        read_metric(url, f"pdserve_stage_seconds_sum{label}"),
        read_metric(url, f"pdserve_stage_seconds_count{label}"),
    )


def row(spec: ClusterSpec, live: Live) -> str:
    """One line of the table."""
    followed = simulate(spec, live, live.made_s, live.picks)
    as_sent = simulate(spec, live, live.sent_s, live.picks)
    alone = simulate(spec, live, live.made_s, {})
    outcomes = live.report.outcomes
    ttft_s = fmean(o.ttft_s for o in outcomes if o.ttft_s is not None)
    tpot_s = fmean(o.tpot_s for o in outcomes if o.tpot_s is not None)
    cells = [
        f"{live.rate_rps:g}",
        str(len(live.requests)),
        *(f"{same(live.picks, followed.picks, *parts):.1%}" for parts in ((0,), (1,), (0, 1))),
        f"{same(live.picks, as_sent.picks, 0, 1):.1%}",
        f"{same(live.picks, alone.picks, 0, 1):.1%}",
        f"{ttft_s * 1e3:.1f} / {alone.ttft_s * 1e3:.1f}",
        f"{tpot_s * 1e3:.2f} / {alone.tpot_s * 1e3:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def load(rate_rps: float, report: ReplayReport, prefill_s: float, lines: Sequence[LoggedDecision]) -> Live:
    """A load with its decisions. RuntimeError when some are missing."""
    picks, made_s = live_picks(lines, seed_of(rate_rps))
    requests = workload(rate_rps, len(report.outcomes), seed_of(rate_rps))
    if len(picks) != len(requests):
        raise RuntimeError(f"{len(picks)} of {len(requests)} requests are in the decision log")
    return Live(
        rate_rps=rate_rps,
        requests=requests,
        report=report,
        picks=picks,
        made_s=made_s,
        prefill_s=prefill_s,
    )


def measured_hop_s(spec: ClusterSpec, live: Live) -> float:
    """What a hop takes beside the engine's time: the live prefill stage less the simulated one."""
    return max(0.0, live.prefill_s - simulate(spec, live, live.made_s, live.picks).prefill_s)


def seed_of(rate_rps: float) -> int:
    """Another workload for each load."""
    return round(rate_rps * 1000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".cache/models/tiny", help="as 'pdserve model tiny' builds it")
    parser.add_argument("--rates", type=float, nargs="+", default=[4.0, 12.0, 24.0], metavar="RPS")
    parser.add_argument("--count", type=int, default=300, metavar="N", help="requests at each rate")
    args = parser.parse_args()
    rates: list[float] = args.rates
    served: dict[float, tuple[ReplayReport, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "decisions.jsonl"
        spec = parity_spec(args.model, log)
        with serving(spec, say=lambda line: print(line, file=sys.stderr)) as url:
            serve(url, WARM_UP_RPS, WARM_UP_COUNT)
            for rate_rps in (CALIBRATION_RPS, *rates):
                count = CALIBRATION_COUNT if rate_rps == CALIBRATION_RPS else args.count
                served[rate_rps] = serve(url, rate_rps, count)
        lines = read_decisions(log)
    lives = [load(rate_rps, *served[rate_rps], lines) for rate_rps in served]
    hop_s = measured_hop_s(spec, lives[0])
    print(f"router to engine and back: {hop_s * 1e3:.2f} ms, at {CALIBRATION_RPS:g} requests/s\n")
    spec = spec.model_copy(update={"sim": spec.sim.model_copy(update={"hop_s": hop_s})})
    print(
        "| requests/s | requests | prefill | decode | both | both, as sent | both, alone "
        "| TTFT ms, live / simulated | TPOT ms, live / simulated |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for live in lives[1:]:
        print(row(spec, live))


if __name__ == "__main__":
    main()
