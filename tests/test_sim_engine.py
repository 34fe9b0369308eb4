"""The twin engine on virtual time: times, tokens, memory; many iterations as one event change nothing."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.handle import Follower
from cluster.latency import Batch, ConstantLatency, LatencyModel
from cluster.sim_engine import KvGone, SimEngine
from cluster.sim_options import TwinOptions
from cluster.wire import FINISH_LENGTH, HandOver, TokenOutput, TokenRequest
from deploy.virtual_time import run_virtual
from tests.twins import expected_tokens

STEP_S = 0.01
HANDLE = {"do_remote_prefill": True, "remote_request_id": "p", "remote_num_tokens": 20}


class Bent:
    """Iteration times that depend on everything in the batch."""

    region = None

    def iteration_s(self, batch: Batch) -> float:
        return (
            0.0071
            + 1.3e-4 * batch.prefill_tokens
            + 1.1e-7 * batch.prefill_attention
            + 3.7e-4 * batch.decode_requests
            + 2.9e-6 * batch.decode_context_tokens
        )


def options_of(latency: LatencyModel | None = None, **options: Any) -> TwinOptions:
    known: dict[str, Any] = {
        "blocks": 1000,
        "block_size": 4,
        "max_model_len": 2000,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2000,
        "latency": latency or ConstantLatency(step_s=STEP_S),
    }
    return TwinOptions(**(known | options))


def request(
    name: str, prompt: list[int], limit: int, transfer: Mapping[str, Any] | None = None
) -> TokenRequest:
    extra = {"kv_transfer_params": dict(transfer)} if transfer else {}
    return TokenRequest(
        request_id=name, prompt_token_ids=prompt, sampling_params={"max_tokens": limit, "extra_args": extra}
    )


class Exchange:
    """KV that takes `read_s` to read; `gone` names what can't be."""

    def __init__(self, read_s: float = 0.05) -> None:
        self.read_s = read_s
        self.gone = {"gone"}
        self.held: list[str] = []
        self.read_tokens: list[int] = []

    def address(self) -> dict[str, Any]:
        return {"remote_instance": "prefill-0"}

    def hold(self, handle: Mapping[str, Any]) -> None:
        self.held.append(handle["remote_request_id"])

    def let_go(self, handle: Mapping[str, Any]) -> None:
        self.held.remove(handle["remote_request_id"])

    async def read(self, handle: Mapping[str, Any], tokens: int) -> None:
        await asyncio.sleep(self.read_s)
        if handle["remote_request_id"] in self.gone:
            raise KvGone(request_id=handle["remote_request_id"], detail="gone")
        self.read_tokens.append(tokens)


class Seen:
    """An engine, served; what it told, by request."""

    def __init__(self, options: TwinOptions, **ports: Any) -> None:
        self.engine = SimEngine(options, "m", **ports)
        self.tokens: dict[str, list[int]] = {}
        self.first_s: dict[str, float] = {}
        self.end_s: dict[str, float] = {}
        self.last: dict[str, TokenOutput] = {}
        self.longest_silence_s = 0.0
        self._told_s: dict[str, float] = {}

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self._serve(), name="serve")

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            step = await self.engine.outputs()
            for output in step.outputs:
                name, now_s = output.request_id, loop.time()
                assert name not in self.end_s, "told after its end"
                silence_s = now_s - self._told_s.get(name, now_s)
                self.longest_silence_s = max(self.longest_silence_s, silence_s)
                self._told_s[name] = now_s
                self.first_s.setdefault(name, now_s)
                self.tokens.setdefault(name, []).extend(output.new_token_ids)
                self.last[name] = output
                if output.finish_reason is not None:
                    assert output.finish_reason == FINISH_LENGTH
                    self.end_s[name] = now_s


@dataclass
class Story:
    """What happens to one engine: (time, what, facts), in the order of time."""

    options: dict[str, Any]
    events: list[tuple[float, str, Any]] = field(default_factory=list)
    aborted: set[str] = field(default_factory=set)


def story_of(seed: int, stages: int = 1) -> Story:
    rng = Random(seed)
    tight = rng.random() < 0.5
    story = Story(
        options={
            "blocks": rng.randrange(25, 40) if tight else 1000,
            "max_model_len": 100,
            "max_num_seqs": rng.choice([2, 5, 64]),
            "max_num_batched_tokens": rng.choice([16, 64, 256]),
            "chunked_prefill": True,
            "prefix_caching": rng.random() < 0.5,
            "long_prefill_token_threshold": rng.choice([0, 0, 7]),
            "pipeline_stages": stages,
            "latency": Bent(),
            "lease_s": 1.5,
        }
    )
    span_s = rng.choice([0.0, 0.3, 5.0])
    for number in range(rng.randint(1, 12)):
        name, at_s = f"r{number}", rng.random() * span_s
        prompt = [5] * rng.randrange(1, 25) + [number] * rng.randrange(25)
        hands_over = rng.random() < 0.3
        limit = 1 if hands_over else rng.randrange(1, 50)
        transfer: dict[str, Any] | None = {"do_remote_decode": True} if hands_over else None
        if not hands_over and rng.random() < 0.3:
            # Some of them are gone.
            transfer = {
                "do_remote_prefill": True,
                "remote_request_id": rng.choice(["p", "gone"]),
                "remote_num_tokens": rng.choice([len(prompt) - 1, rng.randrange(len(prompt))]),
            }
        story.events.append((at_s, "submit", (name, prompt, limit, transfer)))
        if rng.random() < 0.25:
            story.events.append((at_s + rng.random() * rng.choice([0.02, 0.5]), "abort", name))
            story.aborted.add(name)
        if hands_over and rng.random() < 0.6:
            story.events.append((at_s + rng.random() * 2, "release", name))
    for _ in range(rng.randrange(3)):
        story.events.append((rng.random() * (span_s + 0.5), "slow", rng.choice([0.5, 1.0, 3.0])))
    story.events.sort(key=lambda event: event[0])
    return story


async def live(story: Story, quiet_s: float) -> tuple[Seen, float]:
    loop = asyncio.get_running_loop()
    seen = Seen(options_of(**story.options), exchange=Exchange(), quiet_s=quiet_s)
    serving = seen.start()
    for at_s, what, facts in story.events:
        await asyncio.sleep(max(0.0, at_s - loop.time()))
        if what == "submit":
            seen.engine.submit(request(*facts))
        elif what == "abort":
            seen.engine.abort([facts])
        elif what == "release":
            seen.engine.release([facts])
        else:
            seen.engine.set_slowdown(facts)
    await asyncio.sleep(100.0)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    assert seen.engine.idle, "something is held when all is over"
    await seen.engine.stop()
    return seen, loop.time()


def check_story(story: Story) -> None:
    """1: quiet or not, every time is the same to the bit. 2: so is what was done. 3: all who stayed got the
    tokens of an undisturbed engine, those who left a part of them. 4: an engine is busy at most always."""
    told, elapsed_s = run_virtual(live(story, 0.0))[0]
    quiet, _ = run_virtual(live(story, 5.0))[0]
    assert quiet.first_s == told.first_s
    assert quiet.end_s == told.end_s
    counted, counted_quietly = told.engine.counters, quiet.engine.counters
    assert counted_quietly.busy_s == pytest.approx(counted.busy_s, rel=1e-9)
    assert counted_quietly.kv_block_s == pytest.approx(counted.kv_block_s, rel=1e-9)
    same = dataclasses.replace(counted, busy_s=0.0, kv_block_s=0.0)
    assert dataclasses.replace(counted_quietly, busy_s=0.0, kv_block_s=0.0) == same
    assert quiet.engine.preemptions == told.engine.preemptions
    assert quiet.engine.prefix_hit_tokens == told.engine.prefix_hit_tokens
    for seen in (told, quiet):
        for _, what, facts in story.events:
            if what == "submit":
                name, prompt, limit, _ = facts
                expected = expected_tokens(prompt, limit)
                got = seen.tokens.get(name, [])
                assert got == expected[: len(got)]
                assert name in story.aborted or len(got) == limit
        assert seen.engine.counters.busy_s <= elapsed_s * (1 + 1e-9)
        assert seen.engine.counters.kv_peak_blocks <= story.options["blocks"]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
@example(1630)  # one that was preempted waited for one behind it that held its blocks
@example(2430)  # one that was preempted could come back an iteration later
def test_many_iterations_as_one_event_change_no_time_and_no_token(seed: int) -> None:
    check_story(story_of(seed))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 3))
def test_pipeline_stages_serve_all_and_free_all(seed: int, stages: int) -> None:
    check_story(story_of(seed, stages))


def story_of_loads(seed: int) -> Story:
    """Requests that each read a part of their KV into little memory: any of them may wait for any other."""
    rng = Random(seed)
    story = Story(
        options={
            "blocks": rng.randrange(25, 32),
            "max_model_len": 100,
            "max_num_batched_tokens": rng.choice([8, 256]),
            "prefix_caching": rng.random() < 0.5,
            "reserve_full_prompt": rng.random() < 0.7,
            "latency": Bent(),
        }
    )
    for number in range(rng.randint(2, 8)):
        length = rng.randrange(5, 90)
        handle = HANDLE | {"remote_num_tokens": rng.randrange(length)}
        facts = (f"r{number}", [number] * length, rng.randrange(1, min(40, 101 - length)), handle)
        story.events.append((rng.random() * 0.2, "submit", facts))
    story.events.sort(key=lambda event: event[0])
    return story


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
@example(255)  # two that were read waited for each other's blocks
@example(520)  # all had lost their blocks, and nobody looked again
def test_requests_that_read_kv_into_little_memory_do_not_block_each_other(seed: int) -> None:
    check_story(story_of_loads(seed))


def serve(options: TwinOptions, requests: list[TokenRequest], for_s: float = 60.0, **ports: Any) -> Seen:
    """All requests at time 0, served for so long."""

    async def main() -> Seen:
        seen = Seen(options, **ports)
        serving = seen.start()
        for one in requests:
            seen.engine.submit(one)
        await asyncio.sleep(for_s)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await seen.engine.stop()
        return seen

    return run_virtual(main())[0]


def test_a_request_takes_the_time_of_its_iterations() -> None:
    latency = ConstantLatency(step_s=STEP_S, prefill_s_per_token=0.001)
    seen = serve(options_of(latency, max_num_batched_tokens=40), [request("a", [7] * 100, 5)])
    assert seen.first_s["a"] == pytest.approx(3 * STEP_S + 0.1)
    assert seen.end_s["a"] == pytest.approx(7 * STEP_S + 0.1)
    assert seen.engine.counters.iterations == 7
    assert seen.engine.counters.decode_iterations == 4
    assert seen.engine.counters.busy_s == pytest.approx(seen.end_s["a"])
    assert seen.tokens["a"] == expected_tokens([7] * 100, 5)


async def test_a_request_that_can_never_be_served_is_refused() -> None:
    engine = SimEngine(options_of(max_model_len=20), "m")
    for prompt, limit, why in (([], 1, "0 prompt"), ([1], 0, "0 output"), ([1] * 15, 7, "max_model_len 20")):
        with pytest.raises(ValueError, match=why):
            engine.submit(request("a", prompt, limit))
    assert engine.idle


@pytest.mark.parametrize("quiet_s", [0.0, 0.5])
def test_a_running_request_is_never_silent_for_long(quiet_s: float) -> None:
    seen = serve(options_of(), [request(f"r{n}", [n], 400 + n) for n in range(5)], quiet_s=quiet_s)
    assert len(seen.end_s) == 5
    assert seen.longest_silence_s <= 2 * quiet_s + 2 * STEP_S


def test_two_stages_do_twice_the_work_of_one() -> None:
    requests = [request(f"r{n}", [n] * 8, 200) for n in range(32)]
    # An iteration's time does not depend on its batch here: half a batch in each lane, both under way.
    one, two = (
        serve(options_of(pipeline_stages=stages, max_num_seqs=8 * stages), requests) for stages in (1, 2)
    )
    assert max(one.end_s.values()) / max(two.end_s.values()) == pytest.approx(2, rel=0.05)
    assert two.engine.counters.busy_s <= 2 * max(two.end_s.values())


def test_the_load_tells_who_runs_who_waits_and_what_memory_is_used() -> None:
    async def main() -> None:
        seen = Seen(options_of(blocks=100, max_num_seqs=2, max_model_len=200))
        serving = seen.start()
        for number in range(3):
            seen.engine.submit(request(f"r{number}", [number] * 39, 10))
        await asyncio.sleep(STEP_S * 1.5)
        load = seen.engine.load()
        assert (load.running, load.waiting) == (2, 1)
        # 39 tokens of prompt and one of output.
        assert load.kv_usage == pytest.approx(2 * 10 / 100)
        await asyncio.sleep(1)
        load = seen.engine.load()
        assert (load.running, load.waiting, load.kv_usage) == (0, 0, 0)
        serving.cancel()

    run_virtual(main())


def test_kept_blocks_go_when_they_are_released_or_their_lease_ends() -> None:
    async def main() -> None:
        seen = Seen(options_of(lease_s=3.0), exchange=Exchange())
        engine = seen.engine
        serving = seen.start()
        for name in ("released", "leased", "held"):
            engine.submit(request(name, [1] * 20, 1, {"do_remote_decode": True}))
        await asyncio.sleep(1)
        assert set(seen.end_s) == {"released", "leased", "held"}
        params = seen.last["held"].kv_transfer_params
        assert params is not None
        assert params["remote_request_id"] == "held"
        assert params["remote_num_tokens"] == 20
        assert params["remote_instance"] == "prefill-0"
        engine.release(["released", "unknown"])
        assert not engine.held("released")
        assert engine.held("held")
        await asyncio.sleep(3)
        assert not engine.held("leased")
        assert not engine.idle  # a reader will come for it, however late
        engine.release(["held"])
        assert engine.idle
        serving.cancel()
        await engine.stop()

    run_virtual(main())


def test_chunks_are_told_for_a_reader_that_was_sent_them_as_they_were_finished() -> None:
    seen = serve(
        options_of(max_num_batched_tokens=40),
        [request("a", [7] * 100, 1, {"do_remote_decode": True})],
        for_s=1.0,
        exchange=Exchange(),
    )
    params = seen.last["a"].kv_transfer_params
    assert params is not None
    # Chunks of 40, 40 and 20 tokens end at 1, 2 and 3 steps.
    assert params["chunks_s"] == pytest.approx(2 * STEP_S)
    assert params["last_chunk_share"] == pytest.approx(0.2)


@pytest.mark.parametrize("gone", [False, True])
def test_kv_is_read_once_and_what_is_gone_is_computed(*, gone: bool) -> None:
    exchange = Exchange(read_s=0.5)
    source = "gone" if gone else "p"
    prompt = list(range(21))
    asked = request("a", prompt, 5, HANDLE | {"remote_request_id": source})
    seen = serve(options_of(), [asked], exchange=exchange)
    assert exchange.held == [source]
    assert seen.tokens["a"] == expected_tokens(prompt, 5)
    assert seen.first_s["a"] == pytest.approx(0.5 + STEP_S)
    assert exchange.read_tokens == ([] if gone else [20])
    # A last prompt token over KV that was read is a decode.
    assert seen.engine.counters.prefill_tokens == (21 if gone else 0)
    assert seen.engine.idle


def test_an_abort_frees_all_at_every_stage() -> None:
    at_s = {"waiting": 0.001, "loading": 0.25, "prompt": 0.505, "decoding": 0.6}

    async def main(stage: str, quiet_s: float) -> None:
        exchange = Exchange(read_s=0.5)
        seen = Seen(options_of(max_num_batched_tokens=16), exchange=exchange, quiet_s=quiet_s)
        serving = seen.start()
        remote = None if stage == "waiting" else HANDLE
        if stage == "waiting":
            seen.engine.submit(request("other", [1] * 100, 1))
        seen.engine.submit(request("a", list(range(60)), 50, remote))
        await asyncio.sleep(at_s[stage])
        assert not seen.engine.idle
        seen.engine.abort(["a", "unknown"])
        if stage != "waiting":
            assert seen.engine.idle
        await asyncio.sleep(2)
        assert seen.engine.idle
        assert "a" not in seen.end_s
        assert ("a" in seen.tokens) == (stage == "decoding")
        # The engine goes on.
        seen.engine.submit(request("b", list(range(60)), 5))
        await asyncio.sleep(1)
        assert seen.tokens["b"] == expected_tokens(list(range(60)), 5)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    for stage in at_s:
        for quiet_s in (0.0, 5.0):
            run_virtual(main(stage, quiet_s))


def test_an_aborted_id_can_be_used_again_at_once() -> None:
    async def main() -> Seen:
        seen = Seen(options_of(max_num_batched_tokens=16))
        serving = seen.start()
        seen.engine.submit(request("a", [1] * 40, 5))
        await asyncio.sleep(STEP_S * 1.5)
        with pytest.raises(ValueError, match="in use"):
            seen.engine.submit(request("a", [2] * 40, 5))
        seen.engine.abort(["a"])
        seen.engine.submit(request("a", [2] * 40, 5))
        await asyncio.sleep(1)
        serving.cancel()
        return seen

    seen = run_virtual(main())[0]
    assert seen.tokens["a"] == expected_tokens([2] * 40, 5)
    assert seen.engine.idle


async def test_hashes_of_a_prompt_that_it_begins_with_are_taken_over() -> None:
    engine = SimEngine(options_of(), "m")
    known = engine.submit(request("a", list(range(20)), 5))
    longer = engine.submit(request("b", list(range(30)), 5), known)
    assert longer[: len(known)] == known
    assert longer == SimEngine(options_of(), "m").submit(request("b", list(range(30)), 5))


async def test_a_process_that_wakes_late_does_not_slow_its_engine() -> None:
    engine = SimEngine(options_of(), "m")
    engine.submit(request("r", [1, 2, 3], 50))
    engine._launch(0.0)
    for ended in range(1, 6):
        engine._settle(ended * STEP_S + 0.004)
        engine._launch(ended * STEP_S + 0.006)
        assert engine._flights[0].ends == [pytest.approx((ended + 1) * STEP_S)]


async def test_a_process_that_was_stopped_has_an_engine_that_was_stopped() -> None:
    engine = SimEngine(options_of(), "m")
    engine.submit(request("r", [1, 2, 3], 50))
    engine._launch(0.0)
    engine._settle(60.0)
    engine._launch(60.0)
    assert engine._flights[0].ends == [60.0 + STEP_S]


async def test_what_comes_after_an_unnoticed_end_has_missed_the_next_iteration() -> None:
    engine = SimEngine(options_of(), "m")
    engine.submit(request("r", [1, 2, 3], 50))
    now_s = asyncio.get_running_loop().time()
    engine._launch(now_s - 1.5 * STEP_S)
    engine.submit(request("late", [4, 5, 6], 50))
    assert engine._flights[0].ends == [pytest.approx(now_s + 0.5 * STEP_S)]
    assert (engine._flights[0].batch.decode_requests, engine._flights[0].batch.prefill_requests) == (1, 0)
    assert engine.load().waiting == 1


async def test_freed_blocks_are_told_when_no_output_will_tell_of_them() -> None:
    engine = SimEngine(options_of(ConstantLatency()), "m", exchange=Exchange())
    engine.submit(request("p", [1] * 20, 1, {"do_remote_decode": True}))
    assert (await engine.outputs()).outputs
    assert engine.load().kv_usage > 0
    engine.release(["p"])
    async with asyncio.timeout(5):
        assert (await engine.outputs()).outputs == []
    assert engine.load().kv_usage == 0


async def test_an_aborted_request_lets_go_of_what_it_was_to_read() -> None:
    let_go: list[Mapping[str, Any]] = []
    exchange = Exchange()
    exchange.let_go = let_go.append  # type: ignore[method-assign]
    engine = SimEngine(options_of(), "m", exchange=exchange)
    engine.submit(request("d", [1] * 21, 5, HANDLE))
    engine.abort(["d"])
    assert let_go == [HANDLE]
    assert engine.idle


def test_an_adapter_is_loaded_once_and_takes_its_time() -> None:
    async def main() -> list[float]:
        options = options_of(max_loras=1, max_cpu_loras=2, adapter_load_s=0.5)
        engine, loop = SimEngine(options, "m"), asyncio.get_running_loop()
        assert await engine.call("add_lora", [["a", 1, "/a"]])
        took_s = []
        for number, adapter in enumerate(("a", "b", "a", "b", "c", "a")):
            request = TokenRequest(
                request_id=str(number), prompt_token_ids=[1], sampling_params={"max_tokens": 1},
                lora_request=[adapter, 1, "/"],
            )  # fmt: skip
            engine.submit(request)
            began_s = loop.time()
            while not (await engine.outputs()).outputs:
                pass
            took_s.append(loop.time() - began_s)
        assert engine.adapter_loads == 4
        await engine.stop()
        return took_s

    took_s, _ = run_virtual(main())
    least_s = min(took_s)
    # b is loaded beside a; c in the place of a, which is the one that was used longest ago, and so on.
    assert [round(one - least_s, 6) for one in took_s] == [0, 0.5, 0, 0, 0.5, 0.5]


async def test_an_adapter_for_a_twin_without_any_is_refused() -> None:
    engine = SimEngine(options_of(), "m")
    request = TokenRequest(request_id="r", prompt_token_ids=[1], lora_request=["a", 1, "/"])
    with pytest.raises(ValueError, match="without enable_lora"):
        engine.submit(request)


def test_a_running_request_goes_on_in_another_twin() -> None:
    """At its next token or later, with all its KV but that token's; wherever it is in a block."""

    async def one(length: int, after: int, at_tokens: int = 0) -> None:
        exchange = Exchange()
        here, there = (SimEngine(options_of(), "m", exchange=exchange) for _ in range(2))
        prompt = list(range(100, 100 + length))
        here.submit(request("a", prompt, 40))
        tokens: list[int] = []
        handle: Mapping[str, Any] | None = None
        while handle is None:
            for output in (await here.outputs()).outputs:
                tokens += output.new_token_ids
                handle = output.kv_transfer_params
            if len(tokens) == after:
                here.hand_over(HandOver("nobody"))
                here.hand_over(HandOver("a", at_tokens))
        assert len(tokens) == max(after + 1, at_tokens)
        held = length + len(tokens) - 1
        assert handle["remote_num_tokens"] == held
        assert not here.idle
        there.submit(request("b", prompt + tokens, 40 - len(tokens), handle))
        stats = None
        while len(tokens) < 40:
            for output in (await there.outputs()).outputs:
                tokens += output.new_token_ids
                stats = output.prefill_stats or stats
        assert tokens == expected_tokens(prompt, 40)
        assert stats is not None
        assert stats.num_external_cached_tokens == held
        assert exchange.read_tokens == [held]
        assert there.idle
        here.release(["a"])
        assert here.idle

    for length in range(1, 10):
        for after in (1, 2, 5, 38):
            run_virtual(one(length, after))
        run_virtual(one(length, 2, at_tokens=9))


def test_what_would_end_anyway_or_does_not_decode_is_not_handed_over() -> None:
    async def main() -> None:
        engine = SimEngine(options_of(max_num_seqs=1), "m", exchange=Exchange())
        engine.submit(request("a", [100] * 10, 5))
        engine.submit(request("waits", [200] * 10, 3))
        seen: dict[str, list[TokenOutput]] = {"a": [], "waits": []}
        for name in ("a", "waits"):
            engine.hand_over(HandOver(name))  # neither has a token
        while sum(len(one.new_token_ids) for one in seen["waits"]) < 3:
            for output in (await engine.outputs()).outputs:
                seen[output.request_id].append(output)
            if sum(len(one.new_token_ids) for one in seen["a"]) == 4:
                engine.hand_over(HandOver("a"))  # its next token is its last
        assert sum(len(one.new_token_ids) for one in seen["a"]) == 5
        assert [one.kv_transfer_params for outputs in seen.values() for one in outputs] == [None] * 8
        assert engine.idle

    run_virtual(main())


def test_what_a_request_had_when_it_was_told_to_move_has_moved_meanwhile() -> None:
    """As far as the links let it: its handle says since when it was read, and what can't have been."""

    async def main() -> None:
        engine = SimEngine(options_of(), "m", exchange=Exchange())
        engine.submit(request("a", [100] * 50, 40))
        tokens, told_s = 0, 0.0
        handle: Mapping[str, Any] | None = None
        while handle is None:
            for output in (await engine.outputs()).outputs:
                tokens += len(output.new_token_ids)
                handle = output.kv_transfer_params
            if tokens == 3 and not told_s:
                told_s = asyncio.get_running_loop().time()
                engine.hand_over(HandOver("a", 13, Follower("there", "b")))
        assert tokens == 13
        assert handle["chunks_s"] == pytest.approx(asyncio.get_running_loop().time() - told_s, abs=2 * STEP_S)
        assert handle["last_chunk_share"] == pytest.approx(options_of().block_size / (50 + 12))
        engine.release(["a"])

    run_virtual(main())
