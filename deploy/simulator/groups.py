"""Sums over the requests and over the instances of a simulation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.instance import Role
from cluster.request import Slo
from deploy.latency_table import Distribution, latencies_to_json, slo_to_json
from deploy.replay_report import STATUSES, Status
from deploy.simulator.result import STAGES, InstanceUse, SimulatedRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestGroup:
    """Requests judged together: all of them, or those with one SLO class and one SLO.

    Attributes:
        name: the SLO class; "all" for all.
        slo: their bounds; None where they differ.
        counts: requests by status, every status named.
        judged: requests that were not cancelled; met: those of them that met their SLO.
        ttft_missed, tpot_missed: complete answers beyond that bound; one beyond both counts in both.
        latencies: TTFT, TPOT, E2E (arrival to last token) and the stages, in seconds, of complete ("ok")
            answers.
    """

    name: str
    slo: Slo | None
    counts: dict[Status, int]
    judged: int
    met: int
    ttft_missed: int
    tpot_missed: int
    latencies: dict[str, Distribution | None]

    @classmethod
    def of(cls, name: str, slo: Slo | None, requests: Sequence[SimulatedRequest]) -> RequestGroup:
        counted = Counter(request.status for request in requests)
        done = [request for request in requests if request.status == "ok"]
        stages = zip(*(request.stages for request in done), strict=True) if done else ((),) * len(STAGES)
        return cls(
            name=name,
            slo=slo,
            counts={status: counted[status] for status in STATUSES},
            judged=len(requests) - counted["cancelled"],
            met=sum(request.met for request in done),
            ttft_missed=sum(
                request.ttft_s is None or request.ttft_s > request.slo.ttft_s for request in done
            ),
            tpot_missed=sum(
                request.tpot_s is not None and request.tpot_s > request.slo.tpot_s for request in done
            ),
            latencies={
                "ttft_s": Distribution.of(request.ttft_s for request in done),
                "tpot_s": Distribution.of(request.tpot_s for request in done),
                "e2e_s": Distribution.of(request.end_s - request.arrival_s for request in done),
                **{f"{stage}_s": Distribution.of(times) for stage, times in zip(STAGES, stages, strict=True)},
            },
        )

    @property
    def attainment(self) -> float | None:
        """`met` as a share (0..1) of `judged`; None when there is none."""
        return self.met / self.judged if self.judged else None

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; an infinite bound is null."""
        return {
            "name": self.name,
            "slo": None if self.slo is None else slo_to_json(self.slo),
            "requests": sum(self.counts.values()),
            "counts": dict(self.counts),
            "judged": self.judged,
            "met": self.met,
            "attainment": self.attainment,
            "ttft_missed": self.ttft_missed,
            "tpot_missed": self.tpot_missed,
            **latencies_to_json(self.latencies),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolUse:
    """What the instances of one role did together.

    Attributes:
        present_gpu_s, busy_gpu_s: seconds times GPUs that the instances were READY or DRAINING, and computed.
        prefix_hit_share: prompt tokens found in a prefix cache, of those found or computed; None where
            none was computed, as in a decode pool that reads the rest.
        kv_peak: the highest of any instance; kv_mean: averaged over the presence of all.
        decode_batch: decode tokens per iteration, over all iterations; None for a pool that decoded nothing.
        starts: lives that the instances had.
    """

    role: Role
    instances: int
    gpus: int
    present_gpu_s: float
    busy_gpu_s: float
    iterations: int
    prefill_tokens: int
    decode_tokens: int
    prefix_hit_tokens: int
    prefix_hit_share: float | None
    preemptions: int
    kv_peak: float
    kv_mean: float
    decode_batch: float | None
    starts: int

    @classmethod
    def of(cls, role: Role, uses: Sequence[InstanceUse]) -> PoolUse:
        iterations = sum(use.iterations for use in uses)
        prefill_tokens = sum(use.prefill_tokens for use in uses)
        decode_tokens = sum(use.decode_tokens for use in uses)
        hit_tokens = sum(use.prefix_hit_tokens for use in uses)
        present_s = math.fsum(use.present_s for use in uses)
        return cls(
            role=role,
            instances=len(uses),
            gpus=sum(use.gpus for use in uses),
            present_gpu_s=math.fsum(use.gpus * use.present_s for use in uses),
            busy_gpu_s=math.fsum(use.gpus * use.busy_s for use in uses),
            iterations=iterations,
            prefill_tokens=prefill_tokens,
            decode_tokens=decode_tokens,
            prefix_hit_tokens=hit_tokens,
            prefix_hit_share=ratio(hit_tokens, hit_tokens + prefill_tokens) if prefill_tokens else None,
            preemptions=sum(use.preemptions for use in uses),
            kv_peak=max((use.kv_peak for use in uses), default=0.0),
            kv_mean=ratio(math.fsum(use.kv_mean * use.present_s for use in uses), present_s) or 0.0,
            decode_batch=ratio(decode_tokens, iterations) if decode_tokens else None,
            starts=sum(use.starts for use in uses),
        )

    @property
    def busy_share(self) -> float | None:
        """Busy share (0..1) of the GPU time present; None for a pool that never was."""
        return ratio(self.busy_gpu_s, self.present_gpu_s)


def ratio(amount: float, whole: float) -> float | None:
    """`amount / whole`; None for a whole of zero."""
    return amount / whole if whole else None
