"""The twin's scheduler, an iteration at a time."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.latency import Batch, ConstantLatency
from cluster.sim_options import TwinOptions
from cluster.sim_scheduler import Scheduler, Sequence


def scheduler_of(**options: object) -> Scheduler:
    known: dict[str, object] = {
        "blocks": 64,
        "block_size": 4,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "latency": ConstantLatency(),
        "chunked_prefill": False,
        "prefix_caching": False,
    }
    return Scheduler(TwinOptions(**(known | options)))  # type: ignore[arg-type]


def add(scheduler: Scheduler, name: str, prompt: int, limit: int) -> Sequence:
    sequence = Sequence(request_id=name, tokens=[1] * prompt, limit=limit)
    scheduler.add(sequence, [])
    return sequence


def iterate(scheduler: Scheduler, lane: int = 0) -> Batch | None:
    """Decide an iteration and let it end."""
    step, _ = scheduler.schedule(lane)
    if step is None:
        return None
    for sequence in scheduler.complete(lane, step.chunks, 1):
        scheduler.bring_up(sequence)
    return step.batch


def test_prompts_and_decodes_share_an_iteration() -> None:
    scheduler = scheduler_of()
    add(scheduler, "a", 10, 5)
    iterate(scheduler)
    add(scheduler, "b", 20, 5)
    assert iterate(scheduler) == Batch(20, 400, 1, 1, 10)
    assert iterate(scheduler) == Batch(0, 0, 0, 2, 11 + 20)


def test_separate_prompts_go_first_and_stop_the_decodes() -> None:
    scheduler = scheduler_of(separate_prefill=True)
    first = add(scheduler, "a", 10, 5)
    iterate(scheduler)
    assert iterate(scheduler) == Batch(0, 0, 0, 1, 10)
    add(scheduler, "b", 20, 5)
    add(scheduler, "c", 30, 5)
    assert iterate(scheduler) == Batch(50, 400 + 900, 2, 0, 0)
    scheduler.bring_up(first)
    assert first.generated == 2  # as before the iteration that it had no part in
    assert iterate(scheduler) == Batch(0, 0, 0, 3, 11 + 20 + 30)


def test_separate_prompts_that_do_not_fit_let_the_decodes_go_on() -> None:
    scheduler = scheduler_of(separate_prefill=True, blocks=8, max_model_len=32)
    add(scheduler, "a", 20, 3)
    add(scheduler, "b", 20, 1)
    assert iterate(scheduler) == Batch(20, 400, 1, 0, 0)
    assert iterate(scheduler) == Batch(0, 0, 0, 1, 20)
    assert iterate(scheduler) == Batch(0, 0, 0, 1, 21)
    assert iterate(scheduler) == Batch(20, 400, 1, 0, 0)
    assert scheduler.empty


def test_separate_prompts_in_chunks_stop_the_decodes_until_they_are_done() -> None:
    scheduler = scheduler_of(separate_prefill=True, chunked_prefill=True, max_num_batched_tokens=16)
    add(scheduler, "a", 4, 5)
    iterate(scheduler)
    add(scheduler, "b", 40, 5)
    prompts = [iterate(scheduler) for _ in range(3)]
    assert [batch and (batch.prefill_tokens, batch.decode_requests) for batch in prompts] == [
        (16, 0),
        (16, 0),
        (8, 0),
    ]
    assert iterate(scheduler) == Batch(0, 0, 0, 2, 4 + 40)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(0, 12)), min_size=1, max_size=12),
    st.booleans(),
    st.sampled_from([16, 20, 64]),
    st.sampled_from([1, 2]),
)
def test_separate_prefill_serves_all_and_never_mixes(
    asked: list[tuple[int, int, int]], chunked: bool, blocks: int, lanes: int
) -> None:
    scheduler = scheduler_of(
        separate_prefill=True,
        chunked_prefill=chunked,
        blocks=blocks,
        max_model_len=64,
        max_num_batched_tokens=64 if not chunked else 10,
        pipeline_stages=lanes,
    )
    sequences = []
    waiting = sorted(asked, key=lambda request: request[2])
    flights: dict[int, list] = {}
    for turn in range(4000):
        while waiting and waiting[0][2] <= turn:
            prompt, limit, _ = waiting.pop(0)
            sequences.append(add(scheduler, f"r{len(sequences)}", prompt, limit))
        lane = turn % lanes
        if lane in flights:
            scheduler.complete(lane, flights.pop(lane), 1)
        step, _ = scheduler.schedule(lane)
        if step is not None:
            # A prompt of one token counts as a decode, and is a chunk all the same.
            lone = sum(chunk.tokens == 1 for chunk in step.chunks)
            assert not step.chunks or step.batch.decode_requests == lone
            flights[lane] = step.chunks
        if not waiting and scheduler.empty:
            break
    # 1. All have all their tokens. 2. No block is left.
    assert [sequence.generated for sequence in sequences] == [sequence.limit for sequence in sequences]
    assert scheduler.empty
    assert scheduler.pool.used == 0


class Served:
    """A scheduler and all that it was asked, checked in every step."""

    def __init__(self, seed: int, stages: int) -> None:
        rng = Random(seed)
        self.scheduler = scheduler_of(
            blocks=rng.choice([25, 40, 500]),
            max_model_len=100,
            max_num_seqs=rng.choice([2, 5, 30]),
            max_num_batched_tokens=rng.choice([30, 64, 200]),
            chunked_prefill=rng.random() < 0.6,
            prefix_caching=rng.random() < 0.6,
            long_prefill_token_threshold=rng.choice([0, 0, 7]),
            reserve_full_prompt=rng.random() < 0.7,
            pipeline_stages=stages,
        )
        options = self.scheduler.options
        longest = 60 if options.chunked_prefill else min(60, options.max_num_batched_tokens)
        rest = 40 if options.chunked_prefill else options.max_num_batched_tokens - longest
        self.coming = sorted(
            (
                rng.randrange(60),
                [1] * rng.randrange(longest // 2) + [2 + number] * rng.randrange(1, longest // 2),
                # Recomputed after a preemption it must still fit an iteration that takes whole prompts only.
                rng.randrange(1, min(40, 2 + rest)),
            )
            for number in range(rng.randint(1, 20))
        )
        self.asked: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.flights: dict[int, list] = {}

    def run(self) -> None:
        scheduler, lanes = self.scheduler, len(self.scheduler.groups)
        for turn in range(20_000):
            while self.coming and self.coming[0][0] <= turn:
                _, prompt, limit = self.coming.pop(0)
                self.asked.append(Sequence(request_id=f"r{len(self.asked)}", tokens=prompt, limit=limit))
                scheduler.add(self.asked[-1], [])
            if (chunks := self.flights.pop(turn % lanes, None)) is not None:
                self.complete(turn % lanes, chunks)
            self.decide(turn % lanes)
            self.check_blocks()
            if not self.coming and scheduler.empty:
                return
        raise AssertionError(f"left over: {scheduler.waiting}")

    def decide(self, lane: int) -> None:
        scheduler, options = self.scheduler, self.scheduler.options
        before = scheduler.preemptions
        step, _ = scheduler.schedule(lane)
        # Who lost its blocks waits ahead of all others.
        assert all(one.preempted for one in list(scheduler.waiting)[: scheduler.preemptions - before])
        if step is None:
            return
        members = scheduler.groups[lane].members
        tokens = sum(chunk.tokens for chunk in step.chunks) + len(members)
        assert step.batch.prefill_tokens + step.batch.decode_requests == tokens
        assert step.batch.prefill_requests + step.batch.decode_requests == len(step.chunks) + len(members)
        assert tokens <= options.max_num_batched_tokens
        assert scheduler.running <= options.max_num_seqs
        assert len({chunk.sequence.request_id for chunk in step.chunks}) == len(step.chunks)
        self.admitted += [c.sequence for c in step.chunks if c.sequence not in self.admitted]
        if not options.chunked_prefill and not options.long_prefill_token_threshold:
            assert all(chunk.sequence.computed == chunk.sequence.total for chunk in step.chunks)
        self.flights[lane] = step.chunks

    def complete(self, lane: int, chunks: list) -> None:
        members = list(self.scheduler.groups[lane].members.values())
        before = [self.generated(one) for one in members]
        self.scheduler.complete(lane, chunks, 1)
        # Every decode has its token.
        assert [self.generated(one) for one in members] == [count + 1 for count in before]

    def generated(self, sequence: Sequence) -> int:
        self.scheduler.bring_up(sequence)
        return sequence.generated

    def check_blocks(self) -> None:
        """In use is what the tokens of those in the batch fill, each block once."""
        scheduler = self.scheduler
        shared: set[int] = set()
        private = 0
        for one in self.asked:
            if one.ended or one in scheduler.waiting:
                assert one.ended or one.table.count == 0
                continue
            scheduler.bring_up(one)
            group = scheduler.groups[one.lane]
            tokens = one.computed + (group.begun if group.members.get(one.request_id) is one else 0)
            shared.update(one.table.shared)
            private += scheduler.pool.blocks_for(tokens) - len(one.table.shared)
        assert scheduler.pool.used == len(shared) + private
        assert scheduler.pool.used + scheduler.pool.free == scheduler.pool.blocks


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_all_are_served_within_the_limits(seed: int, stages: int) -> None:
    """1: all have exactly their tokens. 2: in every step tokens, requests and blocks are within the limits,
    and blocks in use are those of the live requests. 3: no decode is left out. 4: first come, first admitted.
    5: in the end nothing is held."""
    served = Served(seed, stages)
    served.run()
    assert [one.generated for one in served.asked] == [one.limit for one in served.asked]
    assert served.admitted == served.asked
    assert served.scheduler.pool.used == 0


def test_the_last_admitted_loses_its_blocks_and_is_computed_anew_with_its_output() -> None:
    scheduler = scheduler_of(blocks=9, max_model_len=36)
    first, second = add(scheduler, "a", 16, 20), add(scheduler, "b", 12, 20)
    batches = [iterate(scheduler) for _ in range(6)]
    assert scheduler.preemptions == 1
    assert list(scheduler.waiting) == [second]
    assert first.preempted == 0
    lost = next(number for number, batch in enumerate(batches) if number and batch.decode_requests == 1)
    assert second.generated == lost
    while not scheduler.empty:
        batch = iterate(scheduler)
        assert batch is not None
        if batch.prefill_tokens:
            assert batch.prefill_tokens == 12 + lost
    assert (first.generated, second.generated) == (20, 20)


def test_who_lost_its_blocks_is_not_admitted_in_the_same_iteration() -> None:
    scheduler = scheduler_of(blocks=9, max_model_len=36, chunked_prefill=True, reserve_full_prompt=False)
    add(scheduler, "a", 16, 20)
    add(scheduler, "b", 12, 20)
    add(scheduler, "c", 1, 1)
    while not scheduler.preemptions:
        batch = iterate(scheduler)
    assert batch == Batch(0, 0, 0, 1, batch.decode_context_tokens)


def test_equal_prompts_of_one_iteration_share_their_blocks() -> None:
    """As in vLLM: blocks can be found from the time at which their computation is decided."""
    scheduler = scheduler_of(prefix_caching=True)
    add(scheduler, "a", 40, 1)
    second = add(scheduler, "b", 40, 1)
    assert iterate(scheduler) == Batch(40 + 4, 1600 + (1600 - 36 * 36), 2, 0, 0)
    assert second.local == 36
    assert scheduler.prefix_hit_tokens == 36


@pytest.mark.parametrize(("alone", "tokens"), [(True, 40), (False, 7)])
def test_a_long_prompt_is_cut_only_where_it_could_starve_another(alone: bool, tokens: int) -> None:
    scheduler = scheduler_of(chunked_prefill=True, long_prefill_token_threshold=7)
    add(scheduler, "a", 40, 1)
    if not alone:
        add(scheduler, "b", 1, 1)
    batch = iterate(scheduler)
    assert batch is not None
    assert batch.prefill_tokens + batch.decode_requests == tokens + (not alone)


def test_an_id_in_use_and_a_request_too_long_are_refused() -> None:
    scheduler = scheduler_of()
    add(scheduler, "a", 10, 5)
    with pytest.raises(ValueError, match="in use"):
        add(scheduler, "a", 10, 5)
    with pytest.raises(ValueError, match="max_model_len 256"):
        add(scheduler, "b", 200, 58)
    add(scheduler, "b", 200, 57)


def test_nothing_is_left_of_one_that_is_removed() -> None:
    scheduler = scheduler_of(chunked_prefill=True, max_num_batched_tokens=16)
    assert scheduler.remove("unknown") is None
    for steps in range(5):  # waiting, in its prompt, decoding
        add(scheduler, "a", 40, 5)
        for _ in range(steps):
            iterate(scheduler)
        removed = scheduler.remove("a")
        assert removed is not None
        assert removed.ended
        assert scheduler.empty
        assert scheduler.pool.used == 0
