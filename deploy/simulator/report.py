"""What a simulation comes to: attainment, goodput, latencies, use of the pools and why SLOs were missed."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from cluster.instance import Role
from cluster.request import Slo
from deploy.replay_report import MAX_ERRORS_SHOWN
from deploy.simulator.blame import Cause, causes_of_misses
from deploy.simulator.groups import PoolUse, RequestGroup, ratio
from deploy.simulator.result import FaultMark, InstanceUse, SimulatedRequest, SimulationResult
from deploy.simulator.table import report_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationReport:
    """A simulation, summed up.

    Rates are per second of `duration_s` (virtual time), throughput is that of complete answers.

    Attributes:
        gpus: held by the instances, also while they start or are gone: what one pays for.
        causes: why SLOs were missed (`deploy.simulator.blame` has the rule), the most frequent first.
        errors: (text, count), the most frequent first.
        moved_requests: requests that had to change engines because one failed them.
        wall_s, events: what the simulation itself cost; the only fields that differ between equal runs.
    """

    name: str
    seed: int
    duration_s: float
    overall: RequestGroup
    classes: tuple[RequestGroup, ...]
    pools: tuple[PoolUse, ...]
    instances: tuple[InstanceUse, ...]
    causes: tuple[Cause, ...]
    errors: tuple[tuple[str, int], ...]
    warnings: tuple[str, ...]
    faults: tuple[FaultMark, ...]
    input_tokens: int
    output_tokens: int
    moved_requests: int
    kv_bytes_moved: int
    kv_tokens_moved: int
    kv_tokens_recomputed: int
    wall_s: float
    events: int

    @classmethod
    def of(cls, result: SimulationResult) -> SimulationReport:
        """Sum up a result."""
        requests = result.requests
        done = [request for request in requests if request.status == "ok"]
        return cls(
            name=result.name,
            seed=result.seed,
            duration_s=result.duration_s,
            overall=RequestGroup.of("all", _common_slo(requests), requests),
            classes=_classes(requests),
            pools=tuple(
                PoolUse.of(role, uses)
                for role in Role
                if (uses := [use for use in result.instances if use.role == role])
            ),
            instances=result.instances,
            causes=causes_of_misses(requests),
            errors=_errors(requests),
            warnings=result.warnings,
            faults=result.faults,
            input_tokens=sum(request.input_tokens for request in done),
            output_tokens=sum(request.output_tokens for request in done),
            moved_requests=sum(request.moves > 0 for request in requests),
            kv_bytes_moved=result.kv_bytes_moved,
            kv_tokens_moved=result.kv_tokens_moved,
            kv_tokens_recomputed=result.kv_tokens_recomputed,
            wall_s=result.wall_s,
            events=result.events,
        )

    @property
    def missed(self) -> int:
        """Judged requests that did not meet their SLO."""
        return self.overall.judged - self.overall.met

    @property
    def gpus(self) -> int:
        return sum(pool.gpus for pool in self.pools)

    @property
    def present_gpu_s(self) -> float:
        return math.fsum(pool.present_gpu_s for pool in self.pools)

    @property
    def busy_gpu_s(self) -> float:
        return math.fsum(pool.busy_gpu_s for pool in self.pools)

    @property
    def goodput_rps(self) -> float:
        """Requests per second that met their SLO."""
        return self.per_second(self.overall.met)

    @property
    def goodput_rps_per_gpu(self) -> float | None:
        """Goodput by `gpus`; None without one."""
        return ratio(self.goodput_rps, self.gpus)

    @property
    def met_per_gpu_hour(self) -> float | None:
        """Requests that met their SLO per hour of a GPU's presence: fair to a pool that grows and shrinks."""
        return ratio(self.overall.met * 3600, self.present_gpu_s)

    def per_second(self, count: float) -> float:
        """`count` by the duration; 0 for a simulation that took no time."""
        return ratio(count, self.duration_s) or 0.0

    def to_json(self, *, with_cost: bool = True) -> dict[str, object]:
        """Plain JSON values: no infinities, keys always in this order.

        Without its cost, equal seeds give equal bytes: real time is nowhere else.
        """
        overall = self.overall.to_json()
        del overall["name"]
        cost = {"wall_s": self.wall_s, "events": self.events, "events_per_s": ratio(self.events, self.wall_s)}
        return {
            "name": self.name,
            "seed": self.seed,
            "warnings": list(self.warnings),
            "duration_s": self.duration_s,
            "goodput_rps": self.goodput_rps,
            "goodput_rps_per_gpu": self.goodput_rps_per_gpu,
            "met_per_gpu_hour": self.met_per_gpu_hour,
            "request_rps": self.per_second(self.overall.counts["ok"]),
            "input_tokens_per_s": self.per_second(self.input_tokens),
            "output_tokens_per_s": self.per_second(self.output_tokens),
            **overall,
            "slo_classes": [
                {**group.to_json(), "goodput_rps": self.per_second(group.met)} for group in self.classes
            ],
            "misses": {"total": self.missed, "causes": [asdict(cause) for cause in self.causes]},
            "gpus": self.gpus,
            "present_gpu_s": self.present_gpu_s,
            "busy_gpu_s": self.busy_gpu_s,
            "kv_bytes_moved": self.kv_bytes_moved,
            "kv_tokens_moved": self.kv_tokens_moved,
            "kv_tokens_recomputed": self.kv_tokens_recomputed,
            "moved_requests": self.moved_requests,
            "pools": [
                {**asdict(pool), "role": pool.role.value, "busy_share": pool.busy_share}
                for pool in self.pools
            ],
            "instances": [
                {**asdict(use), "role": use.role.value, "peak": use.peak._asdict()} for use in self.instances
            ],
            "faults": [mark._asdict() for mark in self.faults],
            "errors": [{"error": text, "count": count} for text, count in self.errors[:MAX_ERRORS_SHOWN]],
            **({"cost": cost} if with_cost else {}),
        }

    def to_text(self, *, with_cost: bool = True) -> str:
        """A summary for people, at most 100 columns wide, times in milliseconds."""
        return "\n".join(report_lines(self, with_cost=with_cost))


def _classes(requests: Iterable[SimulatedRequest]) -> tuple[RequestGroup, ...]:
    groups: dict[tuple[str, Slo], list[SimulatedRequest]] = defaultdict(list)
    for request in requests:
        groups[request.slo_class, request.slo].append(request)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], item[0][1].ttft_s, item[0][1].tpot_s))
    return tuple(RequestGroup.of(name, slo, members) for (name, slo), members in ordered)


def _common_slo(requests: Iterable[SimulatedRequest]) -> Slo | None:
    slos = {request.slo for request in requests}
    return slos.pop() if len(slos) == 1 else None


def _errors(requests: Iterable[SimulatedRequest]) -> tuple[tuple[str, int], ...]:
    counted = Counter(request.error for request in requests if request.error is not None)
    return tuple(sorted(counted.items(), key=lambda item: (-item[1], item[0])))
