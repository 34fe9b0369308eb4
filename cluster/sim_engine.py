"""The twin engine: behaves like vLLM towards its host, in time and memory, and computes no model.

`sim_scheduler` decides its iterations, a latency model says how long they take, the running loop's clock,
real or virtual, is what passes. Each of its tokens follows from the one before, as a real model's greedy
tokens follow from the sequence so far: a request that is handed over, moved or replayed must go on with the
same tokens, or a test sees it.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from cluster import wire
from cluster.block_names import BlockChanges
from cluster.engine import Frames
from cluster.errors import ServingError
from cluster.fingerprint import model_fingerprint
from cluster.handle import FOLLOWS_PARAM
from cluster.instance import EngineFacts, Fingerprint, Role, chunk_tokens
from cluster.latency import EMPTY_BATCH, Batch, Levels, level_at
from cluster.sim_group import SimGroup
from cluster.sim_options import TwinOptions, twin_options
from cluster.sim_scheduler import (
    Chunk,
    MemoryGate,
    PromptBatching,
    PromptOrder,
    Scheduler,
    Sequence,
    Step,
)
from cluster.spec import ClusterSpec
from cluster.wire import (
    DUE_PARAM,
    KEEP_PARAM,
    Blocks,
    GoOn,
    HandOver,
    Load,
    PrefillCounts,
    StepOutputs,
    TokenOutput,
    TokenRequest,
)

SIM_ENGINE_NAME = "sim 3"
# A twin hears nothing before a prompt is computed; its facts say that it may be sent one that follows.
NEWS_ADDRESS = "twin"
_VOCABULARY = range(100, 4000)
_TWO_CYCLES = [*_VOCABULARY, *_VOCABULARY]
# A process that is later than this was stopped, not slow, and its engine with it.
_MOST_LATE_S = 0.1
# Iterations that only decode are run ahead at most so far; more would be thrown away when a request arrives.
_MOST_STEPS_AHEAD = 256


def tokens_after(token: int, count: int) -> list[int]:
    """The tokens that follow one: the next of the vocabulary, and so on, around its end."""
    size = len(_VOCABULARY)
    start = (token + 1 - _VOCABULARY.start) % size
    if count <= size:
        return _TWO_CYCLES[start : start + count]
    return [_VOCABULARY[(start + ahead) % size] for ahead in range(count)]


class KvGone(ServingError):
    """KV that was to be read is not there any more. Facts: `request_id`, `detail`."""

    reason = "kv-gone"

    request_id: str
    detail: str

    def describe(self) -> str:
        return f"the KV of {self.request_id} can't be read: {self.detail}"


class KvExchange(Protocol):
    """How twins read each other's KV."""

    def address(self) -> dict[str, Any]:
        """What a reader needs to find this twin; becomes part of the handle."""
        ...

    def hold(self, handle: Mapping[str, Any]) -> None:
        """Tell the source that its blocks will be read, however long it takes."""
        ...

    def let_go(self, handle: Mapping[str, Any]) -> None:
        """Tell the source that they will not be read after all: their lease begins again."""
        ...

    async def read(self, handle: Mapping[str, Any], tokens: int) -> None:
        """Move the KV of `tokens` tokens; the source frees it all then. Raises KvGone."""
        ...


class Watcher(Protocol):
    """Whoever wants to know what goes on inside; ids are those of hops."""

    def begun(self, request_id: str, now_s: float) -> None:
        """Its first tokens are being computed here."""
        ...

    def reading(self, request_id: str, now_s: float) -> None:
        """It has memory, and its KV is on its way."""
        ...

    def read(self, request_id: str, now_s: float) -> None:
        """Its KV is there, or will never be."""
        ...

    def iterated(self, start_s: float, end_s: float, steps: int, batch: Batch) -> None:
        """Iterations have ended; the batch is the first one's."""
        ...


@dataclass(slots=True)
class Counters:
    """What a twin has done so far.

    Attributes:
        busy_s: seconds in which an iteration ran; with pipeline stages, each stage's share.
        kv_block_s: blocks in use, integrated over those seconds.
        peak: largest batch, component by component.
    """

    busy_s: float = 0.0
    iterations: int = 0
    decode_iterations: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    kv_peak_blocks: int = 0
    kv_block_s: float = 0.0
    peak: Batch = EMPTY_BATCH


@dataclass(slots=True)
class _Flight:
    """Iterations of one lane that were decided and have not all ended; `ended` of them have. `stage_s` is the
    first one's time in each pipeline stage."""

    lane: int
    chunks: list[Chunk]
    batch: Batch
    stage_s: float
    start_s: float
    ends: list[float]
    ended: int = 0


class SimEngine:
    """One twin.

    Attributes:
        slowdown: factor on every iteration decided from now on.
        quiet_s: how long a running request may go without news.
        counters: what it has done.
    """

    def __init__(
        self,
        options: TwinOptions,
        model: str,
        *,
        exchange: KvExchange | None = None,
        watcher: Watcher | None = None,
        on_busy: Callable[[bool], None] | None = None,
        quiet_s: float = 0.0,
        order: PromptOrder | None = None,
        gate: MemoryGate | None = None,
        batching: PromptBatching | None = None,
        tells_blocks: bool = False,
        group: SimGroup | None = None,
    ) -> None:
        """
        Args:
            on_busy: told when it begins to compute and when it has nothing to compute any more.
            exchange: how KV moves; without one it is there at once and nothing is kept for a reader.
            quiet_s: how long a running request may go without news; 0 tells every token as it comes. More
                lets many iterations pass as one event, and changes no time.
            order: in which prompts are computed; none is that of their arrival.
            gate: who is let into the memory beside those that have blocks; none is who finds free ones.
            batching: which prompts share an iteration; none is whoever comes next.
            tells_blocks: whether somebody wants to know how its prefix cache changes.
            group: of the data-parallel group that it is to compute with, once it has joined it.
        """
        self._group = group
        self._options = options
        self._model = model
        self._exchange = exchange
        self._watcher = watcher
        self._on_busy = on_busy
        self.quiet_s = quiet_s
        self._is_busy = False
        self._contention: Levels = ()
        self._scheduler = Scheduler(options, order, gate, batching)
        self._block_changes = self._scheduler.pool.changes = BlockChanges() if tells_blocks else None
        self._block_waiter: asyncio.Future[None] | None = None
        self._flights: list[_Flight] = []
        self._stage_free_s = [0.0] * options.pipeline_stages
        self._ended_s: dict[int, float] = {}
        self._told_used = 0
        self._changed: list[Sequence] = []
        self._told: deque[tuple[float, Sequence]] = deque()
        self._reads: dict[str, asyncio.Task[None]] = {}
        self._leases: dict[str, asyncio.TimerHandle] = {}
        # Their prompts are computed elsewhere; what has moved meanwhile, the exchange says when they go on.
        self._following: dict[str, TokenRequest] = {}
        self._ahead = _MOST_STEPS_AHEAD
        self._counted_s = 0.0
        self._waker: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self.slowdown = 1.0
        self.counters = Counters()

    @classmethod
    def of(
        cls, spec: ClusterSpec, role: Role, phase_options: Mapping[str, Any] | None = None, **ports: Any
    ) -> SimEngine:
        """The twin of an instance of a spec; `ports` are the constructor's. Raises as `twin_options`."""
        return cls(twin_options(spec, role, phase_options or {}), spec.model, **ports)

    # --- cluster.engine.Engine

    async def start(self, progress: Callable[[str], None]) -> EngineFacts:
        progress("starting the twin engine")
        return self.facts()

    def facts(self) -> EngineFacts:
        """What it says of itself."""
        options = self._options
        return EngineFacts(
            fingerprint=Fingerprint(
                engine=SIM_ENGINE_NAME,
                model=model_fingerprint(self._model),
                dtype="none",
                kv_dtype="none",
                block_size_tokens=options.block_size,
            ),
            max_model_len=options.max_model_len,
            kv_capacity_tokens=options.blocks * options.block_size,
            kv_bytes_per_token=options.kv_bytes_per_token,
            max_num_seqs=options.max_num_seqs,
            tensor_parallel_size=options.gpus // options.pipeline_stages,
            pipeline_parallel_size=options.pipeline_stages,
            max_loras=options.max_loras,
            max_cpu_loras=options.max_cpu_loras,
            chunk_tokens=chunk_tokens(
                options.max_num_batched_tokens,
                options.long_prefill_token_threshold,
                is_chunked=options.chunked_prefill,
            ),
            news_address=NEWS_ADDRESS if options.overlap and self._exchange is not None else "",
        )

    def add(self, frames: Frames) -> None:
        self.submit(msgspec.msgpack.decode(frames[0], type=TokenRequest))

    def submit(self, request: TokenRequest, known_hashes: list[int] | None = None) -> list[int]:
        """Accept a request. ValueError for one that can never be served.

        Args:
            known_hashes: what `submit` returned of a prompt that this one begins with: the hashes of its
                blocks.
        """
        params = request.sampling_params or {}
        extra = params.get("extra_args") or {}
        transfer = extra.get("kv_transfer_params") or {}
        if transfer.get(FOLLOWS_PARAM):
            self._following[request.request_id] = request
            return []
        now_s = asyncio.get_running_loop().time()
        sequence = Sequence(
            request_id=request.request_id,
            tokens=request.prompt_token_ids,
            limit=params.get("max_tokens", 16),
            keeps=bool(transfer.get("do_remote_decode")) and self._exchange is not None,
            hands_over=bool(transfer.get("do_remote_decode")),
            remote=transfer if transfer.get("do_remote_prefill") else None,
            last_token=request.prompt_token_ids[-1] if request.prompt_token_ids else 0,
            adapter=request.lora_request[0] if request.lora_request else "",
            deadline_s=now_s + extra.get(DUE_PARAM, math.inf),
            came_s=now_s,
            keep_s=extra.get(KEEP_PARAM, 0.0),
        )
        if self._flights:
            self._catch_up(now_s)
        self._scheduler.add(sequence, known_hashes or [])
        if sequence.remote is not None and self._exchange is not None:
            self._exchange.hold(sequence.remote)
        self._has_changed()
        return sequence.table.hashes

    def abort(self, request_ids: list[str]) -> None:
        self._catch_up(asyncio.get_running_loop().time())
        for request_id in request_ids:
            self._following.pop(request_id, None)
            sequence = self._scheduler.remove(request_id)
            if (reading := self._reads.pop(request_id, None)) is not None:
                reading.cancel()
            if sequence is not None and sequence.remote is not None and self._exchange is not None:
                self._exchange.let_go(sequence.remote)
        self._has_changed()

    def release(self, request_ids: list[str]) -> None:
        self._catch_up(asyncio.get_running_loop().time())  # what has ended had those blocks
        freed = [self._scheduler.free_kept(request_id) for request_id in request_ids]
        for request_id in request_ids:
            if (lease := self._leases.pop(request_id, None)) is not None:
                lease.cancel()
        if any(freed):
            self._has_changed()

    def hand_over(self, message: HandOver) -> None:
        now_s = asyncio.get_running_loop().time()
        self._catch_up(now_s)
        sequence = self._scheduler.hand_over(message.request_id, message.at_tokens)
        if sequence is not None:
            if message.follower is not None and sequence.limit == message.at_tokens:
                sequence.followed_s = now_s
            self._has_changed()

    def go_on(self, message: GoOn) -> None:
        request = self._following.pop(message.request_id, None)
        if request is not None:
            known = len(request.prompt_token_ids) - message.replaces
            request.prompt_token_ids = request.prompt_token_ids[:known] + message.token_ids
            request.sampling_params["extra_args"]["kv_transfer_params"] = message.kv_params
            self.submit(request)

    async def call(self, method: str, args: list[Any]) -> Any:
        if method == "add_lora":
            name = args[0][0]
            self._scheduler.adapter_loads += self._scheduler.adapters.use(name)
            self._scheduler.adapters.done(name)
            return True
        raise NotImplementedError(f"the twin engine has no method {method!r}")

    async def outputs(self) -> StepOutputs:
        loop = asyncio.get_running_loop()
        while True:
            self._launch(loop.time())
            if not self._has_stale_load():
                await self._sleep(loop)
            now_s = loop.time()
            self._settle(now_s)
            if (outputs := self._outputs(now_s)) or self._has_stale_load():
                # Now, not when the host has sent these: what comes until then has missed this iteration.
                self._launch(now_s)
                self._told_used = self._scheduler.pool.used
                if self._block_changes and self._block_waiter is not None and not self._block_waiter.done():
                    self._block_waiter.set_result(None)
                return StepOutputs(outputs=outputs)

    def take_block_changes(self) -> Blocks | None:
        """How the prefix cache has changed since the last call; None for not at all."""
        return self._block_changes.take() if self._block_changes else None

    async def block_changes(self) -> Blocks:
        while (changes := self.take_block_changes()) is None:
            self._block_waiter = asyncio.get_running_loop().create_future()
            await self._block_waiter
        return changes

    def load(self) -> Load:
        scheduler = self._scheduler
        return Load(
            running=scheduler.running,
            waiting=scheduler.queued,
            kv_usage=scheduler.pool.used / self._options.blocks,
        )

    def part(self, outputs: StepOutputs, members: list[TokenOutput], *, with_stats: bool) -> Frames:
        return [msgspec.msgpack.encode(StepOutputs(outputs=members, timestamp=outputs.timestamp))]

    async def stop(self) -> None:
        if self._group is not None:
            self._group.leave(self)
        if self._on_busy is not None and self._is_busy:
            self._is_busy = False
            self._on_busy(False)
        for task in self._reads.values():
            task.cancel()
        for lease in self._leases.values():
            lease.cancel()
        self._reads.clear()
        self._leases.clear()

    # --- the source's side of a transfer

    def held(self, request_id: str) -> bool:
        """A reader will come: the lease ends. False when the blocks are gone."""
        if (lease := self._leases.pop(request_id, None)) is not None:
            lease.cancel()
        return request_id in self._scheduler.kept

    def lease_again(self, request_id: str) -> None:
        """Its reader will not come: the lease begins again, unless the blocks are gone."""
        if request_id in self._scheduler.kept and request_id not in self._leases:
            self._leases[request_id] = asyncio.get_running_loop().call_later(
                self._options.lease_s, self.release, [request_id]
            )

    def set_slowdown(self, factor: float) -> None:
        """Make iterations take `factor` times as long from the next one on."""
        self.slowdown = factor
        self._has_changed()

    def set_contention(self, factors: Levels) -> None:
        """Make iterations take so many times as long from now on, by the requests that decode, and the rest
        of the running one too: others have begun to use the same cores, or have stopped (empty)."""
        if factors == self._contention:
            return
        self._has_changed()
        if self._group is not None:  # its running iteration is that of others too
            self._contention = factors
            return
        now_s = asyncio.get_running_loop().time()
        before = {flight.lane: self._slowdown_of(flight.batch) for flight in self._flights}
        self._contention = factors
        for flight in self._flights:
            change = self._slowdown_of(flight.batch) / before[flight.lane]
            flight.ends[-1] = now_s + (flight.ends[-1] - now_s) * change
            self._stage_free_s[-1] = flight.ends[-1]
        self._wake()

    @property
    def preemptions(self) -> int:
        """Requests that lost their blocks to others and were computed anew."""
        return self._scheduler.preemptions

    @property
    def prefix_hit_tokens(self) -> int:
        """Prompt tokens whose KV was found in the cache."""
        return self._scheduler.prefix_hit_tokens

    @property
    def adapter_loads(self) -> int:
        """LoRA adapters that were read from their files."""
        return self._scheduler.adapter_loads

    @property
    def idle(self) -> bool:
        """Whether it holds no request and no block for anybody."""
        return self._scheduler.empty and not self._scheduler.pool.used and not self._following

    # --- its data-parallel group's side

    @property
    def busy_until_s(self) -> float:
        """When its running iterations end."""
        return self._flights[0].ends[-1] if self._flights else -math.inf

    @property
    def free_blocks(self) -> int:
        return self._scheduler.pool.free

    @property
    def holds(self) -> bool:
        """Whether a prompt waits for others to be computed with."""
        return bool(self._scheduler.held_until_s)

    def most_ahead(self) -> int:
        """Iterations in a row that change nothing but contexts."""
        running = self._scheduler.groups[0].members
        return min(self._scheduler.groups[0].steps_to_next_end(), self._ahead) if running else self._ahead

    def blocks_at(self, ahead: int) -> int:
        """Blocks that its requests take in the iteration so many after the next."""
        return self._scheduler.groups[0].blocks_at(ahead)

    def loads_s(self, step: Step | None) -> float:
        """Seconds in which the step loads adapters."""
        return step.loads * self._options.adapter_load_s if step else 0.0

    def decide(self, now_s: float) -> tuple[Step | None, bool]:
        """What it computes next, and whether another decision right after it would find nothing."""
        self._settle(now_s)
        return self._decide(0, now_s) if self._scheduler.has_work(0) else (None, True)

    def begin(self, step: Step, now_s: float, ends: list[float]) -> None:
        """Compute it, and the same again until the last of `ends`."""
        self._tell_begun(step, now_s)
        self._stage_free_s[0] = ends[-1]
        self._flights.append(_Flight(0, step.chunks, step.batch, ends[0] - now_s, now_s, ends))
        self._wake()

    def look_again(self) -> None:
        """Something else than its own requests has changed."""
        self._wake()

    def _tell_begun(self, step: Step, start_s: float) -> None:
        if self._watcher is not None:
            for chunk in step.chunks:
                if not chunk.sequence.begun:
                    chunk.sequence.begun = True
                    self._watcher.begun(chunk.sequence.request_id, start_s)

    # --- time

    def _launch(self, now_s: float) -> None:
        """Begin an iteration of every lane that has none, as far as the first stage is free."""
        if self._group is not None:
            self._group.launch(now_s)
            return
        for lane in range(self._options.pipeline_stages):
            if self._stage_free_s[0] > now_s:
                return
            if self._flights and lane in [flight.lane for flight in self._flights]:
                continue
            start_s = self._start_s(lane, now_s)
            if not self._scheduler.has_work(lane):
                continue
            step, is_settled = self._decide(lane, now_s)
            if step is None:
                continue
            self._tell_begun(step, start_s)
            slowdown = self._slowdown_of(step.batch)
            stage_s = slowdown * self._options.latency.iteration_s(step.batch) / len(self._stage_free_s)
            if step.loads:
                stage_s += step.loads * self._options.adapter_load_s / len(self._stage_free_s)
            ends = [self._through_stages(stage_s, start_s)]
            if self.quiet_s and is_settled and not step.chunks and self._options.pipeline_stages == 1:
                self._run_ahead(lane, step.batch, ends)
            self._flights.append(_Flight(lane, step.chunks, step.batch, stage_s, start_s, ends))

    def _decide(self, lane: int, now_s: float) -> tuple[Step | None, bool]:
        """The next iteration of a lane, and whether another decision right after it would find nothing."""
        scheduler = self._scheduler
        while True:
            preemptions = scheduler.preemptions
            step, to_read = scheduler.schedule(lane, now_s)
            for sequence in to_read:
                self._read(sequence, now_s)
            # Whoever loses its blocks is not admitted again at once, but may be next; and without an exchange
            # what is to be read is there already.
            is_settled = scheduler.preemptions == preemptions and (not to_read or self._exchange is not None)
            if step is not None or is_settled:
                return step, is_settled

    def _catch_up(self, now_s: float) -> None:
        """Bring it up to now, before something changes. In real time an iteration may have ended unnoticed,
        and what follows it was decided before the change came."""
        is_late = any(flight.ends[-1] < now_s for flight in self._flights)
        self._settle(now_s)
        if is_late:
            self._launch(now_s)

    def _start_s(self, lane: int, now_s: float) -> float:
        """When a lane's next iteration starts: as its last one ended, if this is the first look since.

        In real time that was some wake-ups ago. An engine on a GPU does not wait for them, and the lateness
        of each iteration would add up.
        """
        ended_s = self._ended_s.pop(lane, now_s)
        if now_s - ended_s > _MOST_LATE_S:
            return now_s
        return min(now_s, max(ended_s, self._stage_free_s[0]))

    def _through_stages(self, stage_s: float, now_s: float) -> float:
        """When an iteration that starts now ends, behind the ones before it in the pipeline."""
        end_s = now_s
        for stage, free_s in enumerate(self._stage_free_s):
            end_s = max(end_s, free_s) + stage_s
            self._stage_free_s[stage] = end_s
        return end_s

    def _slowdown_of(self, batch: Batch) -> float:
        if not self._contention:
            return self.slowdown
        return self.slowdown * level_at(self._contention, batch.decode_requests)

    def _run_ahead(self, lane: int, batch: Batch, ends: list[float]) -> None:
        """Add the ends of the iterations that will follow as long as nothing changes but the contexts."""
        group = self._scheduler.groups[lane]
        free = self._scheduler.pool.free
        requests, context = batch.decode_requests, batch.decode_context_tokens
        end_s = ends[0]
        last_s = end_s + self.quiet_s
        iteration_s, slowdown = self._options.latency.iteration_s, self._slowdown_of(batch)
        for ahead in range(1, min(group.steps_to_next_end(), self._ahead)):
            free -= group.blocks_at(ahead)
            if free < 0 or end_s > last_s:
                break
            context += requests
            end_s += slowdown * iteration_s(Batch(0, 0, 0, requests, context))
            ends.append(end_s)
        self._stage_free_s[0] = end_s

    def _settle(self, now_s: float) -> None:
        """Account for the iterations that have ended by now."""
        self._scheduler.pool.now_s = now_s
        for flight in list(self._flights):
            steps = bisect_right(flight.ends, now_s, lo=flight.ended) - flight.ended
            if not steps:
                continue
            start_s = flight.ends[flight.ended - 1] if flight.ended else flight.start_s
            self._count(flight, start_s, steps)
            chunks = flight.chunks if not flight.ended else []
            for chunk in chunks:
                chunk.sequence.last_chunk_tokens = chunk.tokens
                chunk.sequence.first_chunk_s = min(chunk.sequence.first_chunk_s, flight.ends[0])
            self._changed += self._scheduler.complete(flight.lane, chunks, steps)
            flight.ended += steps
            if flight.ended == len(flight.ends):
                self._flights.remove(flight)
                self._ended_s[flight.lane] = flight.ends[-1]
                self._ahead = min(_MOST_STEPS_AHEAD, 8 + 2 * flight.ended)
            else:
                self._scheduler.begin_next(flight.lane)

    def _has_changed(self) -> None:
        """Something is to be decided anew: of the iterations decided ahead, only the one that runs stays."""
        if self._group is not None:
            self._group.changed()
        else:
            self.forget_ahead()
        if len(self._flights) < len(self._stage_free_s):
            self._wake()

    def forget_ahead(self) -> None:
        """Of the iterations decided ahead, only the one that runs stays."""
        flights = self._flights
        if self.quiet_s and flights:
            loop = asyncio.get_running_loop()
            self._settle(loop.time())
            for flight in flights:
                if flight.ended + 1 < len(flight.ends):
                    del flight.ends[flight.ended + 1 :]
                    self._stage_free_s[0] = flight.ends[-1]
                    if self._alarm is not None:
                        # Nothing can be decided before that iteration ends: sleep until then, no longer.
                        self._alarm.cancel()
                        self._alarm = loop.call_at(flight.ends[-1], self._wake)

    async def _sleep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Until the next iteration ends, a stage is free for a lane, prompts have waited for others for long
        enough, or something happens. Always gives others their turn: the host must get to take requests and
        aborts."""
        if self._on_busy is not None and self._is_busy != bool(self._flights):
            self._is_busy = bool(self._flights)
            self._on_busy(self._is_busy)
        wake_s = self._scheduler.held_until_s or None
        if wake_s is not None and self._group is not None:
            wake_s = max(wake_s, self._group.busy_until_s)
            wake_s = None if wake_s == math.inf else wake_s
        if self._flights:
            now_s = loop.time()
            wake_s = min([wake_s or math.inf, *[flight.ends[-1] for flight in self._flights]])
            if len(self._flights) < len(self._stage_free_s) and self._stage_free_s[0] > now_s:
                wake_s = min(wake_s, self._stage_free_s[0])
            if wake_s <= now_s:
                await asyncio.sleep(0)
                return
        self._waker = loop.create_future()
        if wake_s is not None:
            self._alarm = loop.call_at(wake_s, self._wake)
        try:
            await self._waker
        finally:
            self._waker = None
            if self._alarm is not None:
                self._alarm.cancel()
                self._alarm = None

    def _wake(self) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    # --- KV from and for others

    def _read(self, sequence: Sequence, now_s: float) -> None:
        if self._watcher is not None:
            self._watcher.reading(sequence.request_id, now_s)
        if self._exchange is None:
            self._scheduler.loaded(sequence, arrived=True)
            return
        task = asyncio.create_task(
            self._reading(sequence, self._exchange), name=f"read-{sequence.request_id}"
        )
        self._reads[sequence.request_id] = task

    async def _reading(self, sequence: Sequence, exchange: KvExchange) -> None:
        assert sequence.remote is not None
        arrived = True
        try:
            await exchange.read(sequence.remote, sequence.external)
        except KvGone:
            arrived = False
        del self._reads[sequence.request_id]
        now_s = asyncio.get_running_loop().time()
        self._catch_up(now_s)  # what has ended had its blocks
        self._scheduler.loaded(sequence, arrived=arrived)
        if self._watcher is not None:
            self._watcher.read(sequence.request_id, now_s)
        self._has_changed()

    def _keep(self, sequence: Sequence) -> dict[str, Any]:
        """The handle of an ended request's blocks; their lease begins."""
        if sequence.keeps:
            self.lease_again(sequence.request_id)
        early_s, last = 0.0, len(sequence.tokens)
        if sequence.generated == 1:
            early_s, last = sequence.told_s - sequence.first_chunk_s, sequence.last_chunk_tokens
        elif sequence.followed_s < math.inf:
            early_s, last = sequence.told_s - sequence.followed_s, self._options.block_size
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[0]],
            "remote_request_id": sequence.request_id,
            "remote_num_tokens": sequence.computed,
            # For a reader that was sent the chunks of a prompt as they were finished, or what a request that
            # decodes had when it was told to go.
            "chunks_s": max(0.0, early_s),
            "last_chunk_share": min(1.0, last / max(1, sequence.computed)),
            **({} if self._exchange is None else self._exchange.address()),
        }

    # --- what is told

    def _outputs(self, now_s: float) -> list[TokenOutput]:
        """News of the requests that changed; of all, where every token is told at once."""
        changed, self._changed = self._changed, []
        if not self.quiet_s:
            known = {id(sequence) for sequence in changed}
            running = (s for group in self._scheduler.groups for s in group.members.values())
            changed = [s for s in running if id(s) not in known] + changed
        outputs = [self._output(sequence, now_s) for sequence in changed if self._has_news(sequence)]
        told = self._told
        while told and told[0][0] + self.quiet_s < now_s:
            told_s, sequence = told.popleft()
            # Told again since, or ended: then there is a later entry, or none is needed.
            if sequence.told_s == told_s and self._has_news(sequence) and not sequence.ended:
                outputs.append(self._output(sequence, now_s))
        return outputs

    def _has_stale_load(self) -> bool:
        """Whether blocks were freed since the load was told, and no output will come to tell it again."""
        scheduler = self._scheduler
        changed = not self._flights and scheduler.pool.used != self._told_used
        return changed and not (scheduler.running or scheduler.queued)

    def _has_news(self, sequence: Sequence) -> bool:
        self._scheduler.bring_up(sequence)
        return sequence.generated > sequence.told

    def _output(self, sequence: Sequence, now_s: float) -> TokenOutput:
        is_first = not sequence.told
        output = TokenOutput(request_id=sequence.request_id, new_token_ids=self._tokens(sequence))
        if is_first:
            output.prefill_stats = PrefillCounts(
                num_prompt_tokens=len(sequence.tokens),
                num_computed_tokens=len(sequence.tokens) - sequence.local - sequence.external,
                num_cached_tokens=sequence.local + sequence.external,
                num_local_cached_tokens=sequence.local,
                num_external_cached_tokens=sequence.external,
            )
        sequence.told_s = now_s
        if sequence.generated == sequence.limit:
            output.finish_reason = wire.FINISH_LENGTH
            if sequence.hands_over:
                output.kv_transfer_params = self._keep(sequence)
        elif self.quiet_s:
            self._told.append((now_s, sequence))
        return output

    @staticmethod
    def _tokens(sequence: Sequence) -> list[int]:
        tokens = tokens_after(sequence.last_token, sequence.generated - sequence.told)
        sequence.last_token = tokens[-1]
        sequence.told = sequence.generated
        return tokens

    def _count(self, flight: _Flight, start_s: float, steps: int) -> None:
        end_s = flight.ends[flight.ended + steps - 1]
        counters, batch = self.counters, flight.batch
        counters.busy_s += flight.stage_s if len(self._stage_free_s) > 1 else end_s - start_s
        counters.iterations += steps
        if not flight.ended:
            counters.prefill_tokens += batch.prefill_tokens
        if batch.decode_requests:
            counters.decode_iterations += steps
            counters.decode_tokens += steps * batch.decode_requests
        self._count_blocks(flight, start_s, steps)
        context = batch.decode_context_tokens + (flight.ended + steps - 1) * batch.decode_requests
        peak = counters.peak
        if (
            context > peak.decode_context_tokens
            or batch.decode_requests > peak.decode_requests
            or batch.prefill_tokens > peak.prefill_tokens
            or batch.prefill_attention > peak.prefill_attention
            or batch.prefill_requests > peak.prefill_requests
        ):
            counters.peak = Batch(*map(max, peak, batch._replace(decode_context_tokens=context)))
        if self._watcher is not None:
            self._watcher.iterated(start_s, end_s, steps, batch)

    def _count_blocks(self, flight: _Flight, start_s: float, steps: int) -> None:
        """Of every iteration for itself: each may have taken more than the one before."""
        counters, group = self.counters, self._scheduler.groups[flight.lane]
        used = self._scheduler.pool.used
        # Iterations of several lanes overlap; memory is in use once.
        begin_s = max(start_s, self._counted_s)
        for ahead in range(steps):
            if ahead:
                used += group.blocks_at(ahead)
            end_s = flight.ends[flight.ended + ahead]
            if end_s > begin_s:
                counters.kv_block_s += used * (end_s - begin_s)
                begin_s = end_s
        counters.kv_peak_blocks = max(counters.kv_peak_blocks, used)
        self._counted_s = begin_s
