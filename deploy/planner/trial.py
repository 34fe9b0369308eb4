"""One candidate tried: the live code on virtual time, under a part of the workload, at a rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.instance import Role
from cluster.spec import UNSPLIT, ClusterSpec, parse_spec
from deploy.goodput_search import find_goodput
from deploy.planner.deployment import Deployment, Layout
from deploy.planner.goal import Goal
from deploy.simulator.blame import causes_of_misses
from deploy.simulator.result import SimulationResult
from deploy.simulator.run import Simulation
from deploy.workload import percentile

# Long beside an answer, few enough requests for many runs. The first quarter of them finds the cluster less
# busy than it will be, and is not judged.
RUN_S, LEAST_REQUESTS, MOST_REQUESTS = 45.0, 600, 8000
# Bounds on the first token that a run lasts at least: in less a queue can't grow to where it breaks them.
RUN_BOUNDS = 2.0
WARM_UP = 0.25
# The bracket around a goodput that is found.
TOLERANCE = 0.02
# What a node's resource for its type of GPU begins with.
GPU_TYPE = "accelerator_type:"
# vLLM's kernels for the exchange with experts, as `cluster.expert_exchange` has them: many tokens, or few.
ALL_TO_ALL = {Role.PREFILL: "deepep_high_throughput", Role.DECODE: "deepep_low_latency"}
# From one rate to the next.
STRIDE = 1.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a candidate did at a rate.

    Attributes:
        attainment: share of the requests that kept both bounds; of the class with the least where the goal is
            of each.
        ttft_s, tpot_s: (median, 99th percentile) of those that were answered.
        prefill_busy, decode_busy: shares of the time in which requests came that the instances of a pool
            computed, up to 1.
        cause: what cost most of the misses; empty for none.
        warnings: the simulation's, say of a profile that was never measured there.
    """

    deployment: Deployment
    seed: int
    rate_rps: float
    attainment: float
    ttft_s: tuple[float, float]
    tpot_s: tuple[float, float]
    prefill_busy: float
    decode_busy: float
    cause: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The goodput of a candidate.

    Attributes:
        rate_rps: the largest rate at which enough requests keep their SLO; 0 where it was given up as it
            is less than it had to be.
        trial: at that rate, or where it was given up.
    """

    rate_rps: float
    trial: Trial

    @property
    def deployment(self) -> Deployment:
        return self.trial.deployment

    @property
    def per_gpu_rps(self) -> float:
        return self.rate_rps / self.deployment.gpus


def raw_spec(goal: Goal, deployment: Deployment) -> dict[str, Any]:
    """The deployment as a spec's keys."""
    sim: dict[str, Any] = {}
    layouts = {Role.PREFILL: deployment.prefill or deployment.decode, Role.DECODE: deployment.decode}
    if goal.profiles:
        files = [goal.profiles[layout] for layout in layouts.values()]
        sim["profile"] = files[0] if files[0] == files[1] else dict(zip(map(str, Role), files, strict=True))
    gpus = {role: goal.hardware_of(layout) for role, layout in layouts.items()}
    names = [hardware.name for hardware in gpus.values() if hardware is not None]
    if names:
        sim["hardware"] = names[0] if len(set(names)) == 1 else dict(zip(map(str, Role), names, strict=True))
    # What the candidate says, its base does not: the base may be another plan's spec.
    base = {key: value for key, value in goal.base.items() if (key, value) != ("policy", UNSPLIT)}
    base.pop("colocate", None)
    model = base.get("model", goal.model)
    if goal.shape is not None and goal.shape.name != model:
        sim["shape"] = goal.model if model != goal.model else goal.shape.name
    network: dict[str, Any] = {}
    if any(one is not None and one.gpus_per_node != goal.gpus_per_node for one in gpus.values()):
        network["gpus_per_node"] = goal.gpus_per_node
    if goal.node_gbps is not None:
        network["nic_gbps"] = goal.node_gbps
    if network:
        sim["network"] = network
    raw: dict[str, Any] = {
        "name": "plan",
        "device": "gpu" if names else "cpu",
        **base,
        "model": model,
        "engine_options": {**base.get("engine_options", {}), "max_model_len": goal.max_model_len},
        "prefill": _pool(
            Role.PREFILL, layouts[Role.PREFILL], deployment.prefill_count, base.get("prefill", {})
        ),
        "decode": _pool(
            Role.DECODE if deployment.is_split else Role.PREFILL,  # for what it has the most tokens of
            deployment.decode,
            deployment.decode_count,
            base.get("decode", {}),
        ),
        "slo": {**base.get("slo", {}), **_slo(goal)},
        "sim": {**base.get("sim", {}), **sim},
    }
    if not deployment.is_split:
        raw["policy"] = UNSPLIT
    if deployment.colocated:
        raw["colocate"] = goal.gpus_per_node
    if deployment.decode.pipeline > 1:  # KV can't be read into pipeline stages
        raw["engine"] = "sim"
    return raw


def spec_of(goal: Goal, deployment: Deployment) -> ClusterSpec:
    """As a spec. Raises SpecError for one that no spec can say."""
    return parse_spec(raw_spec(goal, deployment), file="(plan)")


def simulate(goal: Goal, deployment: Deployment, rate_rps: float, seed: int) -> Trial:
    """Try it once."""
    longest_s = max((one.slo.ttft_s for one in goal.classes if one.slo.ttft_s < math.inf), default=0.0)
    count = max(LEAST_REQUESTS, min(MOST_REQUESTS, RUN_S * rate_rps), RUN_BOUNDS * longest_s * rate_rps)
    requests, classes = goal.part(seed, round(count), rate_rps)
    result = Simulation(spec_of(goal, deployment), requests, classes, seed=seed).run()
    return _trial(result, deployment, rate_rps, seed, each_class=goal.each_class)


def goodput(goal: Goal, deployment: Deployment, seed: int, start_rps: float, least_rps: float = 0.0) -> Found:
    """The largest rate that it holds.

    Args:
        start_rps: where the search begins.
        least_rps: one that does not hold this is given up at once.
    """
    trials: dict[float, Trial] = {}

    def attainment(rate_rps: float) -> float:
        if rate_rps not in trials:
            trials[rate_rps] = simulate(goal, deployment, rate_rps, seed)
        return trials[rate_rps].attainment

    if least_rps and attainment(least_rps) < goal.attainment:
        return Found(rate_rps=0.0, trial=trials[least_rps])
    found = find_goodput(
        attainment,
        target=goal.attainment,
        tolerance=TOLERANCE,
        start_rps=least_rps or start_rps,
        stride=STRIDE,
        lowest_rps=start_rps / 100,
    )
    at = found.rate_rps or min(trials)
    return Found(rate_rps=found.rate_rps, trial=trials[at])


def _pool(role: Role, layout: Layout, count: int, base: Mapping[str, Any]) -> dict[str, Any]:
    pool: dict[str, Any] = {**base, "count": count * layout.data, "tensor_parallel_size": layout.tensor}
    sizes = {"pipeline_parallel_size": layout.pipeline, "data_parallel_size": layout.data}
    for key, size in sizes.items():
        pool.pop(key, None)
        if size > 1:
            pool[key] = size
    if layout.data > 1 and (kernels := ALL_TO_ALL.get(role)):
        pool["engine_options"] = {"all2all_backend": kernels, **base.get("engine_options", {})}
    if layout.gpu:  # Ray's own name of what a node has
        kept = {key: of for key, of in base.get("resources", {}).items() if not key.startswith(GPU_TYPE)}
        pool["resources"] = {**kept, f"{GPU_TYPE}{layout.gpu.partition('-')[0].upper()}": 0.001}
    return pool


def _slo(goal: Goal) -> dict[str, Any]:
    classes: dict[str, dict[str, float]] = {}
    for one in goal.classes:
        bounds = {"ttft_ms": one.slo.ttft_s * 1e3, "tpot_ms": one.slo.tpot_s * 1e3}
        classes[one.name] = {key: round(value, 6) for key, value in bounds.items() if value < float("inf")}
    default = max(goal.classes, key=lambda one: one.share or 0.0).name
    return {"default": default, "classes": classes}


def _trial(
    result: SimulationResult, deployment: Deployment, rate_rps: float, seed: int, *, each_class: bool
) -> Trial:
    judged = result.requests[int(WARM_UP * len(result.requests)) :]
    groups: dict[str, list[bool]] = {}
    for request in judged:
        groups.setdefault(request.slo_class if each_class else "", []).append(request.met)
    causes = causes_of_misses(judged)
    busy = result.busy_while_arriving()
    ttft = [request.ttft_s for request in judged if request.ttft_s is not None]
    tpot = [request.tpot_s for request in judged if request.tpot_s is not None]
    return Trial(
        deployment=deployment,
        seed=seed,
        rate_rps=rate_rps,
        attainment=min(sum(met) / len(met) for met in groups.values()),
        ttft_s=_ends(ttft),
        tpot_s=_ends(tpot),
        prefill_busy=busy.get(Role.PREFILL, 0.0),
        decode_busy=busy.get(Role.DECODE, 0.0),
        cause=f"{causes[0].name} ({causes[0].misses / len(judged):.0%} of the requests)" if causes else "",
        warnings=tuple(result.warnings),
    )


def _ends(values: list[float]) -> tuple[float, float]:
    return (percentile(values, 50), percentile(values, 99)) if values else (0.0, 0.0)
