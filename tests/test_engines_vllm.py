"""Two real vLLM engines, KV over real NIXL: hand-off at every block boundary, release, death of an engine."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq
import zmq.asyncio

from cluster import vllm_api, wire
from cluster.handle import KvHandle, handle_of, keep_for_reader
from cluster.prefix_hash import chain_hashes
from cluster.vllm_engine import VLLM_ENGINE_NAME
from deploy.tiny_model_torch import build_tiny_model
from tests.hybrid_model_torch import WINDOW, build_hybrid_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 128
STEP_DEADLINE_S = 60
LENGTHS = [1, 2, 5, *(n * BLOCK + d for n in (1, 2, 3, 4) for d in (-1, 0, 1)), 700, 1500]


def offer(request_id: str) -> bytes:
    """The header of a request that the instance must take."""
    return wire.pack(wire.Offer(request_id, tokens=1, must_take=True))


@dataclass
class Process:
    """A worker process and the connection to its engine."""

    process: asyncio.subprocess.Process
    facts: dict[str, Any]
    pid: int
    socket: zmq.asyncio.Socket
    calls: int = 0
    loads: list[wire.Load] = field(default_factory=list)
    cached: set[int] = field(default_factory=set)
    results: dict[int, Any] = field(default_factory=dict)
    transfers: dict[str, list[float]] = field(default_factory=dict)

    async def post(self, *frames: Any) -> None:
        await self.socket.send_multipart(list(frames))

    async def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        kv: dict[str, Any] | None = None,
        salt: str | None = None,
    ) -> None:
        """Give it a greedy request of so many tokens."""
        request = vllm_api.EngineCoreRequest(
            request_id=request_id, prompt_token_ids=prompt, mm_features=None,
            sampling_params=vllm_api.SamplingParams(
                temperature=0, max_tokens=max_tokens, ignore_eos=True,
                extra_args={"kv_transfer_params": kv} if kv else None,
            ),
            pooling_params=None, arrival_time=time.time(), lora_request=None, cache_salt=salt,
            data_parallel_rank=None,
        )  # fmt: skip
        await self.post(wire.ADD, offer(request_id), *vllm_api.MsgpackEncoder().encode(request))

    async def step(self) -> list[Any]:
        """Outputs of the next step."""
        kind, *frames = await asyncio.wait_for(self.socket.recv_multipart(), STEP_DEADLINE_S)
        if kind == wire.OUTPUTS:
            self.loads.append(msgspec.msgpack.decode(frames[0], type=wire.Load))
            step = vllm_api.MsgpackDecoder(vllm_api.EngineCoreOutputs).decode(frames[1:])
            if step.scheduler_stats is not None:
                stats = step.scheduler_stats.kv_connector_stats or {}
                for name, values in stats.get("PdConnector", stats).items():
                    self.transfers.setdefault(name, []).extend(values)
            return list(step.outputs)
        if kind == wire.BLOCKS:
            changes = msgspec.msgpack.decode(frames[0], type=wire.Blocks)
            kept = set() if changes.cleared else self.cached.difference(changes.removed)
            self.cached = kept.union(changes.stored)
        if kind == wire.RESULT:
            result = msgspec.msgpack.decode(frames[0], type=wire.CallResult)
            self.results[result.call_id] = result
        if kind == wire.FATAL:
            raise ConnectionError(msgspec.msgpack.decode(frames[0]))
        return []

    async def generate(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        kv: dict[str, Any] | None = None,
        salt: str | None = None,
    ) -> tuple[list[int], KvHandle | None, Any]:
        """Greedy tokens, the handle and the prefill statistics of one request."""
        await self.add(request_id, prompt, max_tokens, kv, salt)
        tokens: list[int] = []
        stats = None
        while True:
            for output in await self.step():
                if output.request_id != request_id:
                    continue
                tokens += output.new_token_ids
                stats = output.prefill_stats or stats
                if output.finish_reason is not None:
                    return tokens, handle_of(output.kv_transfer_params), stats

    async def until_cached(self, names: list[int], expected: bool) -> None:
        """Wait until all of these blocks are known to be there, or none is."""
        async with asyncio.timeout(10):
            while [name in self.cached for name in names] != [expected] * len(names):
                await self.step()

    async def call(self, method: str, *args: Any) -> Any:
        self.calls += 1
        await self.post(wire.CALL, wire.pack(wire.Call(call_id=self.calls, method=method, args=list(args))))
        while self.calls not in self.results:
            await self.step()
        result = self.results.pop(self.calls)
        assert not result.error, result.error
        return result.result


async def start(
    model: Path, role: str, engine_process: str, cores: str, context: Any, overrides: dict[str, Any]
) -> Process:
    """A worker that answers; ended again where it does not, or the other one fails."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    words = [sys.executable, "-m", "tests.worker_vllm", str(model), role, engine_process, cores]
    log = model.parent / f"{role}-{engine_process}.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *words,
            json.dumps(overrides),
            cwd=ROOT,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
    try:
        return await connected(process, role, log, context)
    except BaseException:
        process.kill()
        await process.wait()
        raise


def last_words(log: Path) -> str:
    return log.read_text()[-4000:]


async def connected(process: asyncio.subprocess.Process, role: str, log: Path, context: Any) -> Process:
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 120)
    assert line, f"the {role} worker did not start:\n{last_words(log)}"
    ready = json.loads(line)
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVHWM, 0)  # one that does not read would be taken for dead
    socket.connect(ready["address"])
    hello = wire.Hello(wire.WIRE_VERSION, VLLM_ENGINE_NAME, "test", wants_blocks=True)
    await socket.send_multipart([wire.HELLO, wire.pack(hello)])
    assert (await socket.recv_multipart())[0] == wire.WELCOME
    return Process(process=process, facts=ready["facts"], pid=ready["pid"], socket=socket)


@asynccontextmanager
async def pair(
    model: Path,
    engine_process: str,
    overrides: dict[str, Any] | None = None,
    cores: tuple[str, str] = ("0", "1"),
) -> AsyncIterator[tuple[Process, Process]]:
    context = zmq.asyncio.Context()
    roles = ("prefill", "decode")
    processes: dict[str, Process] = {}

    async def begin(role: str, of: str) -> None:
        processes[role] = await start(model, role, engine_process, of, context, overrides or {})

    try:
        async with asyncio.TaskGroup() as starting:
            for of, role in zip(cores, roles, strict=True):
                starting.create_task(begin(role, of))
        yield processes["prefill"], processes["decode"]
    finally:
        for process in processes.values():
            if process.process.returncode is None:
                process.process.kill()
            await process.process.wait()
            process.socket.close()
        context.destroy(linger=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


async def check_hand_off(prefill: Process, decode: Process) -> None:
    """With the first token, and without it (the decode instance computes the prompt's last token itself)."""
    rng = random.Random(1)
    for length in LENGTHS:
        prompt = [rng.randrange(100, 4000) for _ in range(length)]
        whole, _, _ = await decode.generate(f"whole-{length}", prompt, 24)
        assert await decode.call("reset_prefix_cache")
        first, handle, _ = await prefill.generate(f"p-{length}", prompt, 1, keep_for_reader())
        assert handle is not None
        assert handle.tokens == length
        rest, _, stats = await decode.generate(f"d-{length}", prompt + first, 23, dict(handle.params))
        assert first + rest == whole
        assert stats.num_external_cached_tokens == length
        if length == 1:
            continue
        _, handle, _ = await prefill.generate(f"q-{length}", prompt[:-1], 1, keep_for_reader())
        assert handle is not None
        assert await decode.call("reset_prefix_cache")
        again, _, stats = await decode.generate(f"e-{length}", prompt, 24, dict(handle.params))
        assert again == whole
        assert stats.num_external_cached_tokens == length - 1


async def check_part_of_the_prompt_cached(prefill: Process, decode: Process) -> None:
    """Only blocks that the reader has not are moved."""
    rng = random.Random(2)
    shared = [rng.randrange(100, 4000) for _ in range(3 * BLOCK)]
    await decode.generate("warm", shared, 2)
    prompt = shared + [rng.randrange(100, 4000) for _ in range(200)]
    whole, _, _ = await prefill.generate("part-whole", prompt, 8)
    first, handle, _ = await prefill.generate("part-p", prompt, 1, keep_for_reader())
    assert handle is not None
    rest, _, stats = await decode.generate("part-d", prompt + first, 7, dict(handle.params))
    assert first + rest == whole
    assert stats.num_local_cached_tokens == 3 * BLOCK
    assert stats.num_external_cached_tokens == 200


async def check_cached_blocks_are_told(prefill: Process, decode: Process) -> None:
    """What is stored, read from elsewhere, evicted and cleared, in names that follow from the tokens."""
    rng = random.Random(3)
    prompt = [rng.randrange(100, 4000) for _ in range(3 * BLOCK + 10)]
    names = list(chain_hashes(prompt, BLOCK))
    assert len(names) == 3
    _, handle, _ = await prefill.generate("told-p", prompt, 1, keep_for_reader())
    assert handle is not None
    await prefill.until_cached(names, True)
    await decode.generate("told-d", [*prompt, 5], 2, dict(handle.params))
    await decode.until_cached(names, True)
    # Tokens with a salt are other blocks, and nobody finds them by tokens.
    before = len(prefill.cached)
    salted = [rng.randrange(100, 4000) for _ in range(3 * BLOCK)]
    await prefill.generate("told-salted", salted, 1, salt="a client's own")
    assert await decode.call("reset_prefix_cache")
    await decode.generate("told-again", [5] * (BLOCK + 1), 1)  # vLLM tells of it with the next iteration
    await decode.until_cached(names, False)
    await decode.until_cached(list(chain_hashes([5] * BLOCK, BLOCK)), True)
    assert len(decode.cached) == 1
    for number in range(20):  # more than the cache holds
        others = [rng.randrange(100, 4000) for _ in range(15 * BLOCK)]
        await prefill.generate(f"told-{number}", others, 1)
    await prefill.until_cached(names, False)
    assert not prefill.cached.intersection(chain_hashes(salted, BLOCK))
    assert before <= len(prefill.cached) <= prefill.facts["kv_capacity_tokens"] // BLOCK


async def check_refusal(decode: Process) -> None:
    """A request that the engine can't take ends itself and nothing else."""
    bad = vllm_api.EngineCoreRequest(
        request_id="bad", prompt_token_ids=[5, 6], mm_features=None,
        sampling_params=vllm_api.SamplingParams(
            structured_outputs={"regex": "(unclosed"}, extra_args=None, max_tokens=3
        ),
        pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip
    await decode.post(wire.ADD, offer("bad"), *vllm_api.MsgpackEncoder().encode(bad))
    outputs: list[Any] = []
    while not outputs:
        outputs = [output for output in await decode.step() if output.request_id == "bad"]
    assert outputs[0].finish_reason is vllm_api.FinishReason.ERROR
    tokens, _, _ = await decode.generate("good", [5, 6, 7], 3)
    assert len(tokens) == 3


async def check_mismatch(prefill: Process, decode: Process) -> None:
    """Blocks of another length than the prompt asks for are not read: better computed than wrong."""
    prompt = [300 + i for i in range(200)]
    whole, _, _ = await prefill.generate("mis-whole", prompt, 5)
    _, handle, _ = await prefill.generate("mis-p", prompt, 1, keep_for_reader())
    assert handle is not None
    tokens, _, stats = await decode.generate("mis-d", prompt, 5, dict(handle.params))
    assert tokens == whole
    assert stats.num_external_cached_tokens == 0


async def check_release(prefill: Process) -> None:
    """Blocks that nobody will read are free in a fraction of a second, not after the lease of 30 s."""
    _, handle, _ = await prefill.generate("unread", [300] * 500, 1, keep_for_reader())
    assert handle is not None
    assert prefill.loads[-1].kv_usage > 0
    began = time.monotonic()
    await prefill.post(wire.RELEASE, wire.pack([handle.request_id]))
    while prefill.loads[-1].kv_usage > 0:
        await prefill.step()
    assert time.monotonic() - began < 2.0
    # A second release, or one of an id that never was, harms nobody.
    await prefill.post(wire.RELEASE, wire.pack([handle.request_id, "never-was"]))
    tokens, _, _ = await prefill.generate("after", [300] * 10, 3)
    assert len(tokens) == 3


async def check_silence(prefill: Process) -> None:
    """An engine that only keeps blocks for a reader has nothing to say, though it takes a thousand steps a
    second meanwhile."""
    _, handle, _ = await prefill.generate("kept", [300] * 500, 1, keep_for_reader())
    assert handle is not None
    before = len(prefill.loads)
    await asyncio.sleep(1.0)
    await prefill.generate("beside", [300] * 10, 1)
    assert len(prefill.loads) - before < 20
    await prefill.post(wire.RELEASE, wire.pack([handle.request_id]))
    while prefill.loads[-1].kv_usage > 0:
        await prefill.step()


async def check_idle(*processes: Process) -> None:
    """Idle engines with open NIXL agents rest: stock NIXL 1.5.1 takes 95 % of a core each."""

    def used() -> float:
        family = [
            member
            for process in processes
            for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        ]
        return sum(sum(member.cpu_times()[:2]) for member in family)

    await asyncio.sleep(2.0)  # vLLM's own processes spin for a second after their last message
    before = used()
    await asyncio.sleep(3.0)
    assert (used() - before) / 3.0 < 0.5


async def test_hybrid_kv_groups(tmp_path: Path) -> None:
    """Sliding-window layers keep only their window's blocks; prompts here are up to six windows long."""
    async with pair(build_hybrid_model(tmp_path), "thread") as (prefill, decode):
        groups = await decode.call("get_kv_cache_group_metadata")
        assert {group["sliding_window"] for group in groups} == {None, WINDOW}
        await check_hand_off(prefill, decode)
        await check_release(prefill)
        await check_silence(prefill)


@pytest.mark.parametrize("engine_process", ["thread", "own"])
async def test_a_pair_of_engines(model: Path, engine_process: str) -> None:
    async with pair(model, engine_process) as (prefill, decode):
        assert prefill.facts["fingerprint"] == decode.facts["fingerprint"]
        assert prefill.facts["fingerprint"]["block_size_tokens"] == BLOCK
        assert (
            prefill.facts["kv_bytes_per_token"] == 2 * 4 * 4 * 32 * 4
        )  # K and V, layers, heads, size, bytes
        await check_hand_off(prefill, decode)
        await check_part_of_the_prompt_cached(prefill, decode)
        await check_release(prefill)
        await check_silence(prefill)
        await check_cached_blocks_are_told(prefill, decode)
        await check_mismatch(prefill, decode)
        if engine_process == "thread":
            await check_refusal(decode)
        await check_idle(prefill, decode)
        if engine_process == "own":
            # The engine's process dies, the worker's does not: it says so, and ends.
            for child in psutil.Process(decode.pid).children():
                if "EngineCore" in child.name() or "VLLM" in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGKILL)
            with pytest.raises(ConnectionError, match="the engine died"):
                await decode.generate("late", [5, 6, 7], 1000)
            assert decode.process.stdout is not None
            ended = json.loads(await asyncio.wait_for(decode.process.stdout.readline(), 10))
            assert "the engine died" in ended["ended"]
            # The other way round: a worker that is killed takes its engine's processes along.
            orphans = [
                child
                for child in psutil.Process(prefill.pid).children(recursive=True)
                if " ".join(child.cmdline()).startswith("VLLM")
            ]
            assert len(orphans) == 2  # engine core and one rank
            prefill.process.send_signal(signal.SIGKILL)
            _, alive = await asyncio.to_thread(psutil.wait_procs, orphans, 5)
            assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
