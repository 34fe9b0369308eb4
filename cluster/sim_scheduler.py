"""The twin's scheduler: what vLLM 0.32's scheduler decides in each iteration, without a model.

Continuous batching by iteration under a token budget: decodes first, then the prompt in progress, then
waiting ones as far as tokens, requests and KV blocks allow; prompts in chunks or whole; preemption by
recompute, the last one first, when blocks run out; a prefix cache. With `separate_prefill` as vLLM did before
it had chunks: waiting prompts first, in iterations of their own. Pure: it is told what happened and never
asks the time.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol

from cluster.adapter_slots import AdapterSlots
from cluster.latency import Batch
from cluster.prefix_hash import chain as chain_hash
from cluster.sim_blocks import BlockPool, BlockTable
from cluster.sim_decode import DecodeGroup
from cluster.sim_options import TwinOptions


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in the twin.

    Attributes:
        tokens: prompt.
        limit: output tokens at most.
        keeps: whether its blocks stay for a reader when it has ended.
        hands_over: whether its end tells how to read them.
        remote: `kv_transfer_params` of blocks to read first, while they are to be read.
        deadline_s: time by which it shall have its first token.
        adapter: name of its LoRA adapter; empty for none.
        came_s: when it came.
        keep_s: how long its blocks are worth keeping when it has ended.
        total: tokens whose KV must be there before it gets its next token.
        computed: tokens whose KV is there, or will be with the iterations that run.
        in_flight: those of them that running iterations compute.
        generated: output tokens.
        external, local: prompt tokens whose KV was read from elsewhere, or found in the cache.
        preempted: how often it was; chunks of earlier lives are void.
        admitted: number of its last admission, or of its taking blocks for what is to be read.
        lane: pipeline lane in which it decodes.
        last_token: of the prompt, or of the tokens told.
        told, told_s: output tokens that went out, and when the last ones did.
        followed_s: when it was told to go on elsewhere, and another engine began to read it.
        first_chunk_s, last_chunk_tokens: when the first part of the prompt was computed, and how long the
            last one is.
        begun, ended: whether it ever was in an iteration; whether it has left the batch for good.
    """

    request_id: str
    tokens: list[int]
    limit: int
    keeps: bool = False
    hands_over: bool = False
    remote: Mapping[str, Any] | None = None
    deadline_s: float = math.inf
    adapter: str = ""
    came_s: float = 0.0
    keep_s: float = 0.0
    total: int = 0
    computed: int = 0
    in_flight: int = 0
    generated: int = 0
    external: int = 0
    local: int = 0
    preempted: int = 0
    admitted: int = 0
    lane: int = 0
    joined_step: int = 0
    end_step: int = 0
    last_token: int = 0
    told: int = 0
    told_s: float = 0.0
    followed_s: float = math.inf
    first_chunk_s: float = math.inf
    last_chunk_tokens: int = 0
    begun: bool = False
    ended: bool = False
    table: BlockTable = field(default_factory=BlockTable)

    def __post_init__(self) -> None:
        self.total = len(self.tokens)


class Chunk(NamedTuple):
    """Prompt tokens of one request in an iteration; void once the request was preempted or left."""

    sequence: Sequence
    tokens: int
    preempted: int


class Step(NamedTuple):
    """One iteration, decided: chunks of prompts, and a token for each member of the lane's group unless the
    chunks are computed alone. Before it, `loads` adapters are loaded."""

    chunks: list[Chunk]
    batch: Batch
    loads: int = 0


class PromptOrder(Protocol):
    """In which order prompts are computed, where it is not that of their arrival."""

    def rank(self, left_tokens: int, computed_tokens: int, deadline_s: float, now_s: float) -> Any:
        """The lower, the sooner; comparable with other ranks of the same time."""
        ...


class PromptBatching(Protocol):
    """Which prompts share an iteration, where it is not whoever comes next."""

    @property
    def held_until_s(self) -> float:
        """When somebody's turn comes where it was nobody's."""
        ...

    def turn(
        self,
        prompts: list[tuple[int, float, float]],
        now_s: float,
        *,
        first_tokens: int | None,
        is_idle: bool,
    ) -> range:
        """Lengths of the prompts that go next, of these of (tokens, when it came, when it is due); an empty
        one for nobody."""
        ...


class MemoryGate(Protocol):
    """Who is let into the KV memory, where free blocks are not enough to know."""

    def ended(self, output_tokens: int) -> None:
        """An answer has ended, complete."""
        ...

    def fits(self, holding: list[tuple[int, int, int]], capacity_tokens: int) -> bool:
        """Whether these, of (tokens now, output tokens now, output tokens at most), will fit together."""
        ...


class Scheduler:
    """Requests and KV blocks of one engine.

    Attributes:
        groups: decoding requests by pipeline lane.
        waiting: in the order in which they will be admitted.
        loading: requests whose KV is on its way, with blocks taken.
        loaded_waiting: those whose KV has come, in the order in which they took their blocks. They go first:
            who holds blocks must not wait for one who waits for blocks.
        kept: ended requests whose blocks wait for a reader.
        adapters: those of running requests have slots.
        adapter_loads: how many were loaded so far.
        held_until_s: until when prompts that wait are not begun, for others to join them; 0 for not at all.
    """

    def __init__(
        self,
        options: TwinOptions,
        order: PromptOrder | None = None,
        gate: MemoryGate | None = None,
        batching: PromptBatching | None = None,
    ) -> None:
        self.options = options
        self.held_until_s = 0.0
        self._order = order
        self._batching = batching
        self._gate = gate
        # Nothing was freed since the first that waits did not fit.
        self._is_full = False
        self.pool = BlockPool(options.blocks, options.block_size, caching=options.prefix_caching)
        self.groups = [DecodeGroup(options.block_size) for _ in range(options.pipeline_stages)]
        self.waiting: deque[Sequence] = deque()
        self.loading: dict[str, Sequence] = {}
        self.loaded_waiting: list[Sequence] = []
        self.kept: dict[str, Sequence] = {}
        self.adapters = AdapterSlots(options.max_loras, options.max_cpu_loras)
        self.adapter_loads = 0
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self._prefilling: list[Sequence] = []
        self._members: dict[str, Sequence] = {}
        self._admissions = 0

    # --- requests come and go

    def add(self, sequence: Sequence, known_hashes: list[int]) -> None:
        """A new request, of whose leading blocks the hashes may be known. ValueError for one that can never
        be served here."""
        if sequence.request_id in self._members:
            raise ValueError(f"request id {sequence.request_id!r} is in use")
        if sequence.total < 1 or sequence.limit < 1:
            raise ValueError(
                f"{sequence.total} prompt and {sequence.limit} output tokens, expected at least 1"
            )
        if sequence.total + sequence.limit - 1 > self.options.max_model_len:
            raise ValueError(
                f"{sequence.total} prompt and {sequence.limit} output tokens do not fit max_model_len "
                f"{self.options.max_model_len}"
            )
        if sequence.adapter and not self.options.max_loras:
            raise ValueError(f"adapter {sequence.adapter!r} for an engine without enable_lora")
        if sequence.adapter:
            # Its KV is that adapter's, and nobody finds it by tokens.
            before = chain_hash(0, tuple(sequence.adapter.encode()))
            sequence.table.hashes = self.pool.hashes(sequence.tokens, known_hashes, before)
        else:
            sequence.table.hashes = self.pool.hashes(sequence.tokens, known_hashes)
            sequence.table.spans = self.pool.spans(sequence.tokens)
        self._members[sequence.request_id] = sequence
        self.waiting.append(sequence)

    def remove(self, request_id: str) -> Sequence | None:
        """Forget a request that has not ended and free its blocks; None when there is none."""
        sequence = self._members.pop(request_id, None)
        if sequence is None:
            return None
        self._take_out(sequence)
        self._is_full = False
        self.held_until_s = 0.0
        sequence.ended = True
        sequence.preempted += 1
        self.pool.release(sequence.table, sequence.computed)
        return sequence

    def free_kept(self, request_id: str) -> bool:
        """Free the blocks of an ended request; False when it keeps none."""
        sequence = self.kept.pop(request_id, None)
        if sequence is None:
            return False
        self.pool.release(sequence.table, sequence.computed, sequence.keep_s)
        self._is_full = False
        return True

    def hand_over(self, request_id: str, at_tokens: int = 0) -> Sequence | None:
        """Let a request that decodes end early, its blocks kept for a reader; None when it does not decode,
        or will have ended by then anyway.

        Args:
            at_tokens: with so many output tokens, and with its next one where it has them already.
        """
        sequence = self._members.get(request_id)
        group = self.groups[sequence.lane] if sequence is not None else None
        if sequence is None or group is None or group.members.get(request_id) is not sequence:
            return None
        group.bring_up(sequence)
        limit = max(at_tokens, sequence.generated + 1)
        if limit >= sequence.limit:
            return None
        sequence.keeps = sequence.hands_over = True
        group.end_at(sequence, limit)
        return sequence

    def loaded(self, sequence: Sequence, *, arrived: bool) -> None:
        """The KV of a loading request is there; or it will not come, and must be computed."""
        del self.loading[sequence.request_id]
        sequence.remote = None
        if arrived:
            self.pool.commit(sequence.table, sequence.computed)
            insort(self.loaded_waiting, sequence, key=_admitted)
        else:
            self.pool.release(sequence.table)
            sequence.computed = sequence.external = sequence.local = 0
            self.waiting.appendleft(sequence)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._prefilling) + sum(len(group.members) for group in self.groups)

    @property
    def queued(self) -> int:
        """Requests that wait, for memory, a place in the batch or their KV."""
        return len(self.waiting) + len(self.loading) + len(self.loaded_waiting)

    def has_work(self, lane: int) -> bool:
        """Whether a lane has somebody to decide on."""
        return bool(self.groups[lane].members or self.waiting or self.loaded_waiting or self._prefilling)

    @property
    def empty(self) -> bool:
        """Whether it has no request and keeps nothing."""
        return not self._members and not self.kept

    def bring_up(self, sequence: Sequence) -> None:
        """Bring the counts of a request up to the last iteration that ended."""
        group = self.groups[sequence.lane]
        if group.members.get(sequence.request_id) is sequence:
            group.bring_up(sequence)

    # --- an iteration

    def schedule(self, lane: int, now_s: float = 0.0) -> tuple[Step | None, list[Sequence]]:
        """Decide the next iteration of a lane, and take its blocks.

        Returns the iteration, None when there is nothing to compute, and the requests whose KV shall now be
        read from elsewhere: their blocks are taken.
        """
        group = self.groups[lane]
        self.pool.now_s = now_s
        to_read: list[Sequence] = []
        budget = self.options.max_num_batched_tokens
        before, loads = self.preemptions, self.adapter_loads
        if self.options.separate_prefill and (chunks := self._prompts(group, budget, before, to_read, now_s)):
            return Step(chunks, _batch(None, chunks), self.adapter_loads - loads), to_read
        while not self.pool.take(group.blocks_at(0)):
            victim = self._victim(group)
            assert victim is not None  # who needs a block is one
            self._preempt(victim)
        group.begun = True
        chunks = []
        if not self.options.separate_prefill:
            chunks = self._prompts(group, budget - len(group.members), before, to_read, now_s)
        if not chunks and not group.members:
            group.begun = False
            return None, to_read
        return Step(chunks, _batch(group, chunks), self.adapter_loads - loads), to_read

    def complete(self, lane: int, chunks: list[Chunk], steps: int) -> list[Sequence]:
        """Iterations of a lane have ended: the first with `chunks`, all with its group where that had begun.

        Returns the requests that got their first token or their last one; the latter are out of the batch.
        """
        group = self.groups[lane]
        for ahead in range(1, steps):
            if not self.pool.take(group.blocks_at(ahead)):
                raise RuntimeError("iterations were run for which there were no blocks")
        changed = group.advance(steps) if group.begun else []
        for sequence in changed:
            self._end(sequence)
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.preempted != sequence.preempted:
                continue
            sequence.in_flight -= chunk.tokens
            if sequence.computed - sequence.in_flight < sequence.total:
                continue
            self._prefilling.remove(sequence)
            sequence.generated += 1
            if sequence.generated == sequence.limit:
                self._end(sequence)
            else:
                sequence.lane = lane
                group.join(sequence)
            changed.append(sequence)
        return changed

    def begin_next(self, lane: int) -> None:
        """The next iteration of a lane that only decodes begins, decided before."""
        group = self.groups[lane]
        if not self.pool.take(group.blocks_at(0)):
            raise RuntimeError("an iteration began for which there are no blocks")
        group.begun = True

    # --- inside

    def _prompts(
        self,
        group: DecodeGroup,
        budget: int,
        preemptions: int,
        to_read: list[Sequence],
        now_s: float,
    ) -> list[Chunk]:
        """Prompt tokens for an iteration: of the prompts in progress, then of waiting ones, if there were
        only so many `preemptions` so far."""
        self.held_until_s = 0.0
        lengths = self._lengths(group, now_s)
        if lengths is None:
            return self._prompts_in_order(group, budget, preemptions, to_read, now_s)
        everybody = self.waiting
        # What is to be read computes nothing here.
        self.waiting = deque(s for s in everybody if s.remote is not None or s.total in lengths)
        shown = {id(sequence) for sequence in self.waiting}
        chunks = self._prompts_in_order(group, budget, preemptions, to_read, now_s, lengths)
        rest = {id(sequence) for sequence in self.waiting}
        back = [sequence for sequence in self.waiting if id(sequence) not in shown]  # preempted
        kept = (one for one in everybody if id(one) not in shown or id(one) in rest)
        self.waiting = deque(chain(back, kept))
        if not lengths:
            assert self._batching is not None
            self.held_until_s = self._batching.held_until_s
        elif not chunks and not group.members:
            # Those whose turn it is find no memory, and the others may have it.
            return self._prompts_in_order(group, budget, preemptions, to_read, now_s)
        return chunks

    def _lengths(self, group: DecodeGroup, now_s: float) -> range | None:
        """Lengths of the prompts whose turn it is; None for all."""
        if self._batching is None:
            return None
        prompts = [*self._prefilling, *(sequence for sequence in self.waiting if sequence.remote is None)]
        if not prompts:
            return None
        first_tokens = None
        if self._order is not None:
            first_tokens = min(prompts, key=lambda sequence: self._rank(sequence, now_s)).total
        lengths = self._batching.turn(
            [(sequence.total, sequence.came_s, sequence.deadline_s) for sequence in prompts],
            now_s,
            first_tokens=first_tokens,
            is_idle=not (group.members or self._prefilling or self.loaded_waiting),
        )
        return None if all(sequence.total in lengths for sequence in prompts) else lengths

    def _prompts_in_order(
        self,
        group: DecodeGroup,
        budget: int,
        preemptions: int,
        to_read: list[Sequence],
        now_s: float,
        lengths: range | None = None,
    ) -> list[Chunk]:
        """With an order, a prompt in progress gives way for an iteration to one that waits and ranks before
        it, and with it all that wait and rank behind it. Prompts in progress of other `lengths` wait."""
        under_way = self._prefilling
        if lengths is not None:
            under_way = [sequence for sequence in under_way if sequence.total in lengths]
        first, later, most = self._ranked(under_way, now_s)
        chunks = self._continue_prompts(group, budget, first)
        if self.preemptions == preemptions:
            self._admit(budget - sum(chunk.tokens for chunk in chunks), chunks, to_read, most)
            if later and not chunks:
                # What was to go first finds no memory, and those who gave way have it.
                chunks = self._continue_prompts(group, budget, later)
        return chunks

    def _ranked(self, under_way: list[Sequence], now_s: float) -> tuple[list[Sequence], list[Sequence], int]:
        """Prompts in progress that go before those that wait, those that give way, and how many of those that
        wait may go; all lists in order."""
        if self._order is None:
            return under_way, [], len(self.waiting)

        def rank(sequence: Sequence) -> Any:
            return self._rank(sequence, now_s)

        under_way = sorted(under_way, key=rank)
        if not self.waiting:
            return under_way, [], 0
        if len(self.waiting) > 1:
            self.waiting = deque(sorted(self.waiting, key=rank))
        next_rank = rank(self.waiting[0])
        first = [sequence for sequence in under_way if not rank(sequence) > next_rank]
        later = under_way[len(first) :]
        if not later:
            return first, [], len(self.waiting)
        limit = rank(later[0])
        return first, later, sum(rank(sequence) < limit for sequence in self.waiting)

    def _rank(self, sequence: Sequence, now_s: float) -> Any:
        assert self._order is not None
        left = sequence.total - sequence.computed
        return self._order.rank(left, sequence.computed, sequence.deadline_s, now_s)

    def _continue_prompts(self, group: DecodeGroup, budget: int, sequences: list[Sequence]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in list(sequences):
            if sequence.table.count == 0:
                continue  # a victim of one before it
            tokens = self._chunk(sequence.total - sequence.computed, budget)
            if not tokens:
                continue
            needed = self.pool.blocks_for(sequence.computed + tokens) - sequence.table.count
            taken = self.pool.take(needed)
            while not taken and (victim := self._victim(group)) is not None:
                self._preempt(victim)
                if victim is sequence:
                    break
                taken = self.pool.take(needed)
            if not taken:
                break
            sequence.table.private += needed
            chunks.append(self._advance(sequence, tokens))
            budget -= tokens
        return [chunk for chunk in chunks if chunk.preempted == chunk.sequence.preempted]

    def _admit(self, budget: int, chunks: list[Chunk], to_read: list[Sequence], most: int) -> None:
        """Begin prompts, at most so many of those that wait."""
        if not self.loaded_waiting and not most:
            return
        running = self.running
        while budget > 0 and running < self.options.max_num_seqs:
            queue, sequence = self._next(most)
            if sequence is None:
                return
            is_new = queue is self.waiting
            if self._gate is not None and is_new and not self._fits(sequence, self._gate):
                return
            if sequence.remote is not None:
                if not self._begin_loading(sequence):
                    return
                self.waiting.remove(sequence)
                most -= 1
                to_read.append(sequence)
                continue
            found = self.pool.find(sequence.table, sequence.total - 1) if not sequence.computed else 0
            before = sequence.computed + found * self.pool.block_size
            tokens = self._chunk(sequence.total - before, budget)
            if not tokens or not self._reserve(sequence, found, before + tokens):
                return
            if found:
                sequence.computed = before
                self.prefix_hit_tokens += before
                if not sequence.generated:
                    sequence.local = before
            queue.remove(sequence)
            most -= is_new
            if sequence.adapter:
                self.adapter_loads += self.adapters.use(sequence.adapter)
            self._prefilling.append(sequence)
            self._number(sequence)
            running += 1
            chunks.append(self._advance(sequence, tokens))
            budget -= tokens

    def _next(self, most: int) -> tuple[list[Sequence] | deque[Sequence], Sequence | None]:
        """Who is begun next, and in which queue it is; of those that wait only the first `most` may be. As in
        vLLM, one whose adapter finds no slot lets the others by."""
        for queue, count in ((self.loaded_waiting, len(self.loaded_waiting)), (self.waiting, most)):
            for sequence in islice(queue, count):
                if not sequence.adapter or self.adapters.can_run(sequence.adapter):
                    return queue, sequence
        return self.waiting, None

    def _fits(self, sequence: Sequence, gate: MemoryGate) -> bool:
        """Whether the gate lets a request that waits in."""
        if self._is_full:
            return False
        members = [member for group in self.groups for member in group.members.values()]
        for member in members:
            self.bring_up(member)
        there = [*self.loading.values(), *self.loaded_waiting, *self._prefilling, *members]
        holding = [(len(one.tokens) + one.generated, one.generated, one.limit) for one in (*there, sequence)]
        # Alone it may have all.
        self._is_full = bool(there) and not gate.fits(holding, self.pool.blocks * self.pool.block_size)
        return not self._is_full

    def _number(self, sequence: Sequence) -> None:
        self._admissions += 1
        sequence.admitted = self._admissions

    def _reserve(self, sequence: Sequence, found: int, tokens: int, promised: int = 0) -> bool:
        """Take the blocks for the first `tokens` tokens, `found` of them from the cache, if the whole prompt
        could be held and `promised` blocks are left."""
        pool, table = self.pool, sequence.table
        held = table.count + found
        whole = sequence.total if self.options.reserve_full_prompt else tokens
        needed = pool.blocks_for(tokens) - held
        available = pool.available(table, found)
        if pool.blocks_for(whole) - held > available or needed > available - promised:
            return False
        if found:
            pool.share(table, found)
        if not pool.take(needed):
            raise RuntimeError("blocks that were available could not be taken")
        table.private += needed
        return True

    def _begin_loading(self, sequence: Sequence) -> bool:
        """Take blocks for KV that is to be read, as far as it is not in the cache."""
        assert sequence.remote is not None
        found = self.pool.find(sequence.table, sequence.total - 1)
        local = found * self.pool.block_size
        there = min(int(sequence.remote.get("remote_num_tokens") or 0), sequence.total - 1)
        if not self._reserve(sequence, found, max(local, there), self._promised()):
            return False
        self._number(sequence)
        sequence.local = local
        self.prefix_hit_tokens += local
        sequence.external = max(0, there - local)
        sequence.computed = local + sequence.external
        self.loading[sequence.request_id] = sequence
        return True

    def _promised(self) -> int:
        """Blocks that the prompts under way still need. One that is read holds its blocks and can't be
        preempted: were others to take the rest, all could wait for each other."""
        under_way = chain(self.loading.values(), self.loaded_waiting, self._prefilling)
        return sum(self.pool.blocks_for(one.total) - one.table.count for one in under_way)

    def _chunk(self, tokens: int, budget: int) -> int:
        """Prompt tokens to compute now of `tokens` that are left; 0 for none."""
        options = self.options
        # A request that is alone may take all: there is nobody to starve.
        if options.long_prefill_token_threshold and len(self._members) > 1:
            tokens = min(tokens, options.long_prefill_token_threshold)
        if tokens <= budget:
            return tokens
        return max(0, budget) if options.chunked_prefill else 0

    def _advance(self, sequence: Sequence, tokens: int) -> Chunk:
        sequence.computed += tokens
        sequence.in_flight += tokens
        # Findable from now on, as in vLLM: whoever finds them reads them after they were written.
        self.pool.commit(sequence.table, sequence.computed)
        return Chunk(sequence, tokens, sequence.preempted)

    def _victim(self, group: DecodeGroup) -> Sequence | None:
        """Whom to preempt: the last one admitted of those that no running iteration computes."""
        candidates = [sequence for sequence in self._prefilling if not sequence.in_flight]
        candidates += group.members.values()
        return max(candidates, key=_admitted, default=None)

    def _preempt(self, sequence: Sequence) -> None:
        """Take its blocks; it waits at the head of the queue and is computed anew."""
        self._take_out(sequence)
        self.pool.release(sequence.table, sequence.computed)
        sequence.total = len(sequence.tokens) + sequence.generated
        sequence.computed = sequence.in_flight = 0
        sequence.preempted += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _take_out(self, sequence: Sequence) -> None:
        group = self.groups[sequence.lane]
        if sequence.request_id in group.members:
            group.leave(sequence)
            self.adapters.done(sequence.adapter)
        elif self.loading.pop(sequence.request_id, None) is not None:
            return
        elif sequence in self._prefilling:
            self._prefilling.remove(sequence)
            self.adapters.done(sequence.adapter)
        elif sequence in self.loaded_waiting:
            self.loaded_waiting.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def _end(self, sequence: Sequence) -> None:
        del self._members[sequence.request_id]
        sequence.ended = True
        self._is_full = False
        self.adapters.done(sequence.adapter)
        if self._gate is not None:
            self._gate.ended(sequence.generated)
        if sequence.keeps:
            self.kept[sequence.request_id] = sequence
        else:
            self.pool.release(sequence.table, sequence.computed, sequence.keep_s)


def _admitted(sequence: Sequence) -> int:
    return sequence.admitted


def _batch(group: DecodeGroup | None, chunks: list[Chunk]) -> Batch:
    requests, context = (len(group.members), group.context_tokens) if group is not None else (0, 0)
    if not chunks:
        return Batch(0, 0, 0, requests, context)
    tokens = attention = prompts = 0
    for chunk in chunks:
        after = chunk.sequence.computed
        before = after - chunk.tokens
        if chunk.tokens == 1:
            # One token over a context is what a decode is, to the kernels too; so it is with every request
            # whose KV was read from elsewhere.
            requests += 1
            context += before
            continue
        prompts += 1
        tokens += chunk.tokens
        attention += after * after - before * before
    return Batch(tokens, attention, prompts, requests, context)
