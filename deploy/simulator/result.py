"""What a simulation found, as values; reports and pictures are made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from cluster.instance import Role
from cluster.latency import Batch
from cluster.request import NO_SLO, Slo
from deploy.replay_report import Status

# The stages of a request in the order of the clock; together they are its whole time.
STAGES = ("prefill_queue", "prefill", "transfer_queue", "transfer", "decode_queue", "decode")


class StageTimes(NamedTuple):
    """Seconds a request spent in each stage, over all its attempts.

    prefill_queue: from its arrival until a prefill instance began to compute it.
    prefill: until its first token.
    transfer_queue: until a decode instance had memory for its KV.
    transfer: until the KV was there.
    decode_queue: until the decode instance's first token.
    decode: until its last token.
    """

    prefill_queue: float = 0.0
    prefill: float = 0.0
    transfer_queue: float = 0.0
    transfer: float = 0.0
    decode_queue: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRequest:
    """One request of the workload and how it ended.

    Attributes:
        index: its place in the workload.
        slo_class: name of its SLO class.
        output_tokens: tokens its client got.
        ttft_s: from arrival to the first token; None without one.
        tpot_s: averaged over the tokens after the first; None for fewer than two.
        prefill, decode: the instances that served it last, empty where none did.
        moves: engines it had to leave because they failed it.
        error: why its status isn't "ok".
    """

    index: int
    slo_class: str
    slo: Slo = NO_SLO
    status: Status
    input_tokens: int
    output_tokens: int
    arrival_s: float
    end_s: float
    ttft_s: float | None
    tpot_s: float | None
    stages: StageTimes
    prefill: str
    decode: str
    moves: int = 0
    error: str | None = None

    @property
    def met(self) -> bool:
        """A complete answer within both bounds; one token has no TPOT and keeps any."""
        return self.status == "ok" and self.slo.is_kept(self.ttft_s, self.tpot_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceUse:
    """What one instance did.

    Attributes:
        gpus: accelerators it holds (its ranks).
        present_s: seconds it was READY or DRAINING.
        busy_s: seconds of it in which an iteration ran.
        prefix_hit_tokens: prompt tokens found in its prefix cache.
        kv_peak: largest share of its KV cache in use, 0 to 1; kv_mean: averaged over its presence.
        peak: largest batch, component by component.
        starts: lives it had.
        adapter_loads: LoRA adapters that it read from their files.
    """

    instance_id: str
    role: Role
    gpus: int
    present_s: float
    busy_s: float
    iterations: int
    prefill_tokens: int
    decode_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    kv_peak: float
    kv_mean: float
    peak: Batch
    starts: int = 1
    adapter_loads: int = 0


class IterationSpan(NamedTuple):
    """A stretch of iterations on one instance, for pictures: `iterations` of them from `start_s` to `end_s`;
    the batch is the first one's. `what` is "prefill", "decode" or "mixed"."""

    instance_id: str
    start_s: float
    end_s: float
    what: str
    iterations: int
    prefill_tokens: int
    decode_requests: int


class FaultMark(NamedTuple):
    """Something that the scenario did, or that followed from it."""

    at_s: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """Everything a simulation found.

    Attributes:
        name: the spec's name.
        duration_s: virtual time from the first arrival to the end of the last request.
        kv_tokens_recomputed: KV tokens a decode instance computed although a prefill instance had them.
        warnings: what the reader must know to trust it, for example a profile that was left behind.
        events: handles the loop ran; wall_s: real seconds it took.
        spans: iterations, only where a timeline was asked for.
    """

    name: str
    seed: int
    duration_s: float
    requests: tuple[SimulatedRequest, ...]
    instances: tuple[InstanceUse, ...]
    kv_bytes_moved: int
    kv_tokens_moved: int
    kv_tokens_recomputed: int
    warnings: tuple[str, ...] = ()
    events: int = 0
    wall_s: float = 0.0
    spans: tuple[IterationSpan, ...] = field(default=(), repr=False)
    faults: tuple[FaultMark, ...] = ()

    def busy_while_arriving(self) -> dict[Role, float]:
        """By role, the mean share of the time in which requests came that its instances computed, up to 1:
        what is computed after the last arrival counts, too."""
        span_s = max(request.arrival_s for request in self.requests) or self.duration_s
        shares: dict[Role, list[float]] = {}
        for use in self.instances:
            shares.setdefault(use.role, []).append(min(1.0, use.busy_s / span_s) if span_s else 0.0)
        return {role: fmean(known) for role, known in shares.items()}
