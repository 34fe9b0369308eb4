"""The engines of DistServe's experiments as twins: its own and vLLM's, after its published fits."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cluster.latency import DecodeCost, LatencyProfile, PrefillCost
from cluster.request import Slo
from cluster.spec import ClusterSpec, parse_spec
from deploy.planner.deployment import Layout
from deploy.profiler.published import distserve_profile
from deploy.simulator.command import unsplit
from deploy.simulator.run import Simulation
from deploy.workload import WorkloadRequest, rescale
from deploy.workload_grammar import make_workload

Model = Literal["opt-13b", "opt-66b"]
Engine = Literal["distserve", "vllm"]
Kind = Literal["split", "prefill", "decode", "separate", "whole", "chunked"]

REQUESTS = 1000
BLOCK_TOKENS = 16
OPT_MAX_TOKENS = 2048
# evaluation/2-benchmark-serving/2-start-api-server.py of DistServe's repository, for vLLM.
VLLM_BATCHED_TOKENS, VLLM_REQUESTS = 16_384, 1024
# ... and for DistServe's decode.
DECODE_REQUESTS = 1024
# The paper fills a prefill batch up to the length that saturates the GPU (512 tokens for 13B on A100) and
# runs longer prompts alone; the twin, as vLLM, can't have a limit below the longest prompt.
PREFILL_BATCHED_TOKENS = OPT_MAX_TOKENS
CHUNK_TOKENS = 512  # Sarathi-Serve (OSDI'24), its smaller budget
# simdistserve, base/worker.py add_ray_overhead and estimators/time_estimator.py: on every pass, in ms.
RAY_S, RAY_S_PER_TOKEN = 2e-3, 1e-7
STAGE_S = 1e-3
# One NVLink domain for all: the paper's placements keep a hand-over within a node.
NVLINK_GPUS = 64
# No deadline of ours ends what DistServe would have served late.
NEVER_S = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Instances on GPUs.

    Attributes:
        kind: "split"; one phase of it alone, "prefill" or "decode"; or unsplit: prompts in iterations of
            their own ("separate", vLLM up to 0.3), whole among decodes ("whole"), in chunks ("chunked").
        prefill, decode: (layout, instances); of unsplit ones and of one phase only `decode` counts.
        prompts_at_once: most prompts in one iteration of the split's prefill.
    """

    model: Model
    engine: Engine
    kind: Kind
    prefill: tuple[Layout, int]
    decode: tuple[Layout, int]
    prompts_at_once: int = 128

    @classmethod
    def split(cls, model: Model, prefill: Layout, decode: Layout, n: int, m: int) -> Placement:
        return cls(model=model, engine="distserve", kind="split", prefill=(prefill, n), decode=(decode, m))

    @classmethod
    def unsplit(cls, model: Model, engine: Engine, layout: Layout, count: int, kind: Kind) -> Placement:
        return cls(model=model, engine=engine, kind=kind, prefill=(layout, 0), decode=(layout, count))

    @classmethod
    def prefill_alone(cls, model: Model, layout: Layout) -> Placement:
        """One instance that only prefills."""
        return cls.unsplit(model, "distserve", layout, 1, "prefill")

    @classmethod
    def decode_alone(cls, model: Model, layout: Layout) -> Placement:
        """One instance that only decodes; the prefill before it takes no time."""
        return cls(model=model, engine="distserve", kind="decode", prefill=(layout, 0), decode=(layout, 1))

    @property
    def gpus(self) -> int:
        return self.prefill[0].gpus * self.prefill[1] + self.decode[0].gpus * self.decode[1]

    def __str__(self) -> str:
        parts = (
            [(self.prefill, "P "), (self.decode, "D ")] if self.kind == "split" else [(self.decode, " x ")]
        )
        return " + ".join(f"{count}{mark}{layout}" for (layout, count), mark in parts)


class Latencies:
    """TTFT and TPOT of a run's requests, in seconds; infinite where there was no complete answer."""

    def __init__(self, latencies: list[tuple[float, float]]) -> None:
        self._latencies = latencies

    def attainment(self, slo: Slo) -> float:
        """Share of the requests within both bounds."""
        met = sum(ttft_s <= slo.ttft_s and tpot_s <= slo.tpot_s for ttft_s, tpot_s in self._latencies)
        return met / len(self._latencies)

    def slo_scale(self, slo: Slo, target: float) -> float:
        """The smallest factor on both bounds with which a share of `target` is within them."""
        scales = sorted(max(ttft_s / slo.ttft_s, tpot_s / slo.tpot_s) for ttft_s, tpot_s in self._latencies)
        return scales[math.ceil(target * len(scales)) - 1]


class Trial(NamedTuple):
    """How long a run is, and with which arrivals and lengths."""

    requests: int
    seed: int


class Twins:
    """Runs placements at rates, each once."""

    def __init__(self, folder: Path, traces: Path, trial: Trial) -> None:
        """
        Args:
            folder: where profiles are written.
            traces: with DistServe's fits and the lengths.
        """
        self._folder = folder
        self._traces = traces
        self._trial = trial
        self._runs: dict[tuple[Placement, float], Latencies] = {}

    def run(self, placement: Placement, rate_rps: float) -> Latencies:
        """What a rate of so many requests/s in all brings."""
        key = placement, rate_rps
        if key not in self._runs:
            requests = rescale(self._requests, speedup=rate_rps)
            if placement.kind == "prefill":
                requests = [
                    WorkloadRequest(arrival_s=r.arrival_s, input_tokens=r.input_tokens, output_tokens=1)
                    for r in requests
                ]
            found = Simulation(self.spec(placement), requests).run().requests
            self._runs[key] = Latencies(
                [
                    (r.ttft_s, r.tpot_s or 0.0)
                    if r.status == "ok" and r.ttft_s is not None
                    else (math.inf,) * 2
                    for r in found
                ]
            )
        return self._runs[key]

    def spec(self, placement: Placement) -> ClusterSpec:
        """The placement as a spec."""
        kind = placement.kind
        split = kind in ("split", "decode")
        profiles = {"prefill": self._profile(placement, placement.prefill[0], free=kind == "decode")}
        profiles["decode"] = self._profile(placement, placement.decode[0])
        spec = parse_spec(
            {
                "name": "distserve",
                "model": f"facebook/{placement.model}",
                "engine": "sim",
                "policy": "least_tokens",  # as the paper's controller: it knows no SLO and rejects nobody
                "engine_options": {
                    "max_model_len": OPT_MAX_TOKENS,
                    "block_size": BLOCK_TOKENS,
                    "enable_prefix_caching": False,
                    "enable_chunked_prefill": False,
                },
                "prefill": self._pool(
                    placement,
                    placement.prefill,
                    max_num_batched_tokens=PREFILL_BATCHED_TOKENS,
                    max_num_seqs=placement.prompts_at_once,
                ),
                "decode": self._pool(placement, placement.decode, **_LIMITS[kind]),
                "deadlines": {"prefill_s": NEVER_S, "transfer_s": NEVER_S, "stall_s": NEVER_S},
                "transfer": {"lease_s": int(NEVER_S)},
                "sim": {
                    "hardware": "a100",
                    "shape": placement.model,
                    "profile": profiles,
                    "separate_prefill": kind == "separate",
                    "network": {"gpus_per_node": NVLINK_GPUS},
                },
            }
        )
        if split:
            return spec
        alone = spec.model_copy(update={"prefill": spec.decode.model_copy(update={"count": 0})})
        return unsplit(alone, chunked=kind == "chunked")

    def _pool(self, placement: Placement, pool: tuple[Layout, int], **limits: int) -> dict[str, Any]:
        layout, count = pool
        blocks = self._kv_tokens[placement.model, layout] // BLOCK_TOKENS
        return {
            "count": max(1, count),
            "tensor_parallel_size": layout.tensor,
            "pipeline_parallel_size": layout.pipeline,
            "engine_options": {"num_gpu_blocks_override": blocks, **limits},
        }

    def _profile(self, placement: Placement, layout: Layout, *, free: bool = False) -> str:
        name = f"{placement.model}-{placement.engine}-{layout.tensor}-{layout.pipeline}{'-free' * free}.json"
        path = self._folder / name
        if not path.exists():
            source = self._traces / "distserve" / f"profiler-a100-80g.{placement.engine}.json"
            profile = with_overheads(
                distserve_profile(source, placement.model, layout.tensor), layout.pipeline
            )
            if free:
                profile = profile.model_copy(update={"prefill": (PrefillCost(base_s=0, token_s=0),)})
            profile.save(path)
        return str(path)

    @cached_property
    def _kv_tokens(self) -> Mapping[tuple[str, Layout], int]:
        with (self._traces / "distserve" / "max_num_tokens.csv").open(encoding="utf-8", newline="") as lines:
            return {
                (row["model"].removeprefix("facebook/"), Layout(int(row["tp"]), int(row["pp"]))): int(
                    row["max_num_tokens"]
                )
                for row in csv.DictReader(lines)
            }

    @cached_property
    def _requests(self) -> list[WorkloadRequest]:
        """At one request per second."""
        lengths = self._traces / "sharegpt" / "distserve_sharegpt_opt_lengths.csv.gz"
        trial = self._trial
        return make_workload(f"poisson:rate=1,count={trial.requests},lengths={lengths}", trial.seed)


_UNSPLIT = {"max_num_batched_tokens": VLLM_BATCHED_TOKENS, "max_num_seqs": VLLM_REQUESTS}
_LIMITS: Mapping[Kind, Mapping[str, int]] = {
    "split": {"max_num_seqs": DECODE_REQUESTS},
    "decode": {"max_num_seqs": DECODE_REQUESTS},
    "prefill": {"max_num_batched_tokens": PREFILL_BATCHED_TOKENS},
    "separate": _UNSPLIT,
    "whole": _UNSPLIT,
    "chunked": {"max_num_batched_tokens": CHUNK_TOKENS, "max_num_seqs": CHUNK_TOKENS},
}


def with_overheads(profile: LatencyProfile, stages: int) -> LatencyProfile:
    """A fit of one stage as simdistserve uses it for `stages`: each stage takes its part of the time, prefill
    1 ms for every stage on top in each, and Ray's overhead comes once for each pass."""
    return profile.model_copy(
        update={
            "pipeline_parallel_size": stages,
            "prefill": tuple(_prefill(cost, stages) for cost in profile.prefill),
            "decode": tuple(_decode(cost) for cost in profile.decode),
        }
    )


def _prefill(cost: PrefillCost, stages: int) -> PrefillCost:
    base_s = cost.base_s + RAY_S + stages * stages * STAGE_S
    return cost.model_copy(update={"base_s": base_s, "token_s": cost.token_s + RAY_S_PER_TOKEN})


def _decode(cost: DecodeCost) -> DecodeCost:
    context_s = cost.context_s + RAY_S_PER_TOKEN
    return cost.model_copy(update={"base_s": cost.base_s + RAY_S, "context_s": context_s})
