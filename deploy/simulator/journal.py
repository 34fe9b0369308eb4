"""What happened in a simulation, written down as it happens: per request, per stage, per instance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cluster.errors import ServingError
from cluster.latency import Batch, beyond_region
from deploy.replay_report import Status
from deploy.simulator.result import (
    STAGES,
    FaultMark,
    InstanceUse,
    IterationSpan,
    SimulatedRequest,
    SimulationResult,
    StageTimes,
)
from deploy.slo_classes import SloClass
from deploy.workload import WorkloadRequest
from router.hop import Hop, HopKind

if TYPE_CHECKING:
    from deploy.simulator.instances import Record, SimInstances

_QUEUE, _PREFILL, _TRANSFER_QUEUE, _TRANSFER, _DECODE_QUEUE, _DECODE = range(len(STAGES))
ANY = SloClass(name="all")
_REJECTIONS = (429, 503)
_PROGRESS_EVERY = 500


class _Track:
    """A request under way."""

    __slots__ = (
        "arrival_s",
        "cancelled",
        "decode",
        "error",
        "finished",
        "first_s",
        "hops",
        "index",
        "last_s",
        "prefill",
        "sends",
        "stage",
        "stage_s",
        "stages",
        "tokens",
    )

    def __init__(self, index: int, now_s: float) -> None:
        self.index = index
        self.arrival_s = now_s
        self.stage = _QUEUE
        self.stage_s = now_s
        self.stages = [0.0] * len(STAGES)
        self.hops: dict[str, HopKind] = {}
        self.prefill = self.decode = ""
        self.sends = 0
        self.tokens = 0
        self.first_s: float | None = None
        self.last_s = now_s
        self.finished = False
        self.cancelled = False
        self.error: ServingError | None = None

    def enter(self, stage: int, now_s: float) -> None:
        """The time since the last change belongs to the stage until now."""
        self.stages[self.stage] += now_s - self.stage_s
        self.stage = stage
        self.stage_s = now_s


class Journal:
    """The router's `Client`, the instances' `HopWatcher`.

    Attributes:
        ready: all instances are there.
        all_ended: every request has ended.
    """

    def __init__(
        self,
        requests: Sequence[WorkloadRequest],
        classes: Sequence[SloClass] | None,
        *,
        with_spans: bool,
        on_progress: Callable[[float, int], None] | None,
    ) -> None:
        if classes is not None and len(classes) != len(requests):
            raise ValueError(f"{len(classes)} SLO classes for {len(requests)} requests")
        self._requests = requests
        self._classes = classes
        self._on_progress = on_progress
        self._tracks: dict[str, _Track] = {}
        self._done: list[SimulatedRequest] = []
        self._spans: list[IterationSpan] | None = [] if with_spans else None
        self._faults: list[FaultMark] = []
        self._start_s = 0.0
        self.tokens_recomputed: Any = None
        self.on_end: Callable[[str], object] = lambda name: None
        self.ready = asyncio.Event()
        self.all_ended = asyncio.Event()

    def begin(self, now_s: float) -> float:
        """The first request may arrive now."""
        self._start_s = now_s
        return now_s

    def note(self, now_s: float, text: str) -> None:
        """Something that the scenario did."""
        self._faults.append(FaultMark(now_s - self._start_s, text))

    # --- clients

    def class_of(self, index: int) -> SloClass:
        """The class of a request of the workload."""
        return ANY if self._classes is None else self._classes[index]

    def arrived(self, name: str, index: int, now_s: float) -> None:
        self._tracks[name] = _Track(index, now_s)

    def tokens(self, name: str, count: int, now_s: float, finish: Any) -> None:
        """A client gets tokens."""
        track = self._tracks.get(name)
        if track is None:
            return
        if track.first_s is None:
            track.first_s = now_s
        track.tokens += count
        track.last_s = now_s
        if finish is not None:
            track.enter(_DECODE, now_s)
            track.finished = True
        elif track.stage == _PREFILL:
            whole = _WHOLE in track.hops.values()
            track.enter(_DECODE if whole else _TRANSFER_QUEUE, now_s)
        elif track.stage == _DECODE_QUEUE:
            track.enter(_DECODE, now_s)

    def leave(self, name: str) -> bool:
        """A client goes; False when its request has ended."""
        track = self._tracks.get(name)
        if track is None or track.finished:
            return False
        track.cancelled = True
        return True

    # --- router.router.Client

    def fail(self, request_id: str, error: ServingError) -> None:
        self._tracks[request_id].error = error

    def forget(self, request_id: str) -> None:
        track = self._tracks.pop(request_id)
        self.on_end(request_id)
        self._done.append(self._ended(track, asyncio.get_running_loop().time()))
        if self._on_progress is not None and len(self._done) % _PROGRESS_EVERY == 0:
            self._on_progress(asyncio.get_running_loop().time() - self._start_s, len(self._done))
        if len(self._done) == len(self._requests):
            self.all_ended.set()

    # --- deploy.simulator.instances.HopWatcher

    def sent(self, hop: Hop, now_s: float) -> None:
        track = self._tracks[hop.request.request_id]
        track.hops = {hop.hop_id: hop.kind}
        if hop.kind is HopKind.DECODE:
            track.decode = hop.instance_id
            track.enter(_TRANSFER_QUEUE, now_s)
        else:
            track.prefill = hop.instance_id
            track.sends += 1
            if hop.kind is HopKind.WHOLE:
                track.decode = hop.instance_id
            track.enter(_QUEUE, now_s)

    def refused(self, hop_id: str) -> None:
        if (track := self._track_of(hop_id)) is not None:
            track.sends -= 1

    def begun(self, request_id: str, now_s: float) -> None:
        track = self._track_of(request_id)
        if track is not None and track.stage == _QUEUE:
            track.enter(_PREFILL, now_s)

    def reading(self, request_id: str, now_s: float) -> None:
        if (track := self._track_of(request_id)) is not None:
            track.enter(_TRANSFER, now_s)

    def read(self, request_id: str, now_s: float) -> None:
        if (track := self._track_of(request_id)) is not None:
            track.enter(_DECODE_QUEUE, now_s)

    def iterated(self, instance_id: str, start_s: float, end_s: float, steps: int, batch: Batch) -> None:
        if self._spans is None:
            return
        what = "decode" if not batch.prefill_tokens else "mixed" if batch.decode_requests else "prefill"
        self._spans.append(
            IterationSpan(
                instance_id,
                start_s - self._start_s,
                end_s - self._start_s,
                what,
                steps,
                batch.prefill_tokens,
                batch.decode_requests,
            )
        )

    def _track_of(self, hop_id: str) -> _Track | None:
        track = self._tracks.get(hop_id.rsplit("~", 1)[0])
        # A hop that was left may be heard of until its engine knows.
        return track if track is not None and hop_id in track.hops else None

    # --- the end

    def result(
        self,
        *,
        name: str,
        seed: int,
        duration_s: float,
        instances: SimInstances,
        events: int,
        wall_s: float,
    ) -> SimulationResult:
        """All of it. Only after the end: instances are counted over their whole lives."""
        uses = tuple(_use(record) for record in instances.records.values())
        moved = instances.network
        return SimulationResult(
            name=name,
            seed=seed,
            duration_s=duration_s,
            requests=tuple(sorted(self._done, key=lambda request: request.index)),
            instances=uses,
            kv_bytes_moved=moved.bytes_moved,
            kv_tokens_moved=moved.tokens_moved,
            kv_tokens_recomputed=int(self.tokens_recomputed._value.get()),
            warnings=_warnings(instances, uses),
            events=events,
            wall_s=wall_s,
            spans=tuple(self._spans or ()),
            faults=tuple(self._faults),
        )

    def _ended(self, track: _Track, now_s: float) -> SimulatedRequest:
        track.enter(track.stage, track.last_s if track.finished else now_s)
        status, error = _status(track)
        slo_class = self.class_of(track.index)
        first_s = track.first_s
        tpot_s = None
        if first_s is not None and track.tokens > 1:
            tpot_s = (track.last_s - first_s) / (track.tokens - 1)
        return SimulatedRequest(
            index=track.index,
            slo_class=slo_class.name,
            slo=slo_class.slo,
            status=status,
            input_tokens=self._requests[track.index].input_tokens,
            output_tokens=track.tokens,
            arrival_s=track.arrival_s - self._start_s,
            end_s=track.stage_s - self._start_s,
            ttft_s=None if first_s is None else first_s - track.arrival_s,
            tpot_s=tpot_s,
            stages=StageTimes(*track.stages),
            prefill=track.prefill,
            decode=track.decode,
            moves=max(0, track.sends - 1),
            error=error,
        )


_WHOLE = HopKind.WHOLE


def _status(track: _Track) -> tuple[Status, str | None]:
    if track.finished:
        return "ok", None
    if track.error is not None:
        rejected = track.error.http_status in _REJECTIONS and not track.tokens
        return ("rejected" if rejected else "failed"), str(track.error)
    return "cancelled", None


def _use(record: Record) -> InstanceUse:
    lives = record.lives
    peaks = [life.peak for life in lives] or [Batch()]
    busy_s = sum(life.busy_s for life in lives)
    block_s = sum(life.kv_block_s for life in lives)
    blocks = record.options.blocks
    return InstanceUse(
        instance_id=record.instance_id,
        role=record.role,
        gpus=record.options.gpus,
        present_s=record.present_s,
        busy_s=busy_s,
        iterations=sum(life.iterations for life in lives),
        prefill_tokens=sum(life.prefill_tokens for life in lives),
        decode_tokens=sum(life.decode_tokens for life in lives),
        prefix_hit_tokens=record.prefix_hit_tokens,
        preemptions=record.preemptions,
        kv_peak=max((life.kv_peak_blocks for life in lives), default=0) / blocks,
        kv_mean=block_s / (record.present_s * blocks) if record.present_s else 0.0,
        peak=Batch(*(max(values) for values in zip(*peaks, strict=True))),
        starts=len(lives),
        adapter_loads=record.adapter_loads,
    )


def _warnings(instances: SimInstances, uses: Sequence[InstanceUse]) -> tuple[str, ...]:
    """What was asked of a latency model that it was never measured on."""
    told: dict[str, None] = {}
    for use in uses:
        region = instances.records[use.instance_id].options.latency.region
        for line in beyond_region(use.peak, region):
            told[f"{use.instance_id}: the profile was left: {line}"] = None
    return tuple(told)
