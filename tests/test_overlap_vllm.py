"""Real vLLM engines: a prompt of several chunks is read while it is still computed."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from cluster import wire
from cluster.handle import Follower, follow, handle_of, keep_for_reader
from deploy.tiny_model_torch import build_tiny_model
from kv_transfer.following_vllm import LIFE_PARAM
from kv_transfer.stats_vllm import EARLY_BYTES, STAGES, seconds_key
from tests.hybrid_model_torch import build_hybrid_model
from tests.test_engines_vllm import BLOCK, Process, pair
from tests.test_transports_vllm import MANY

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

CHUNK = 256
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 4096,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": 128 << 20,
    "max_num_batched_tokens": CHUNK,
}
TOKENS = 24
RELEASE = seconds_key("release")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


async def finished(engine: Process, name: str) -> tuple[list[int], Any, Any]:
    """Tokens, handle and prefill statistics of a request that was added."""
    tokens: list[int] = []
    stats = None
    while True:
        for output in await engine.step():
            if output.request_id == name:
                tokens += output.new_token_ids
                stats = output.prefill_stats or stats
                if output.finish_reason is not None:
                    return tokens, handle_of(output.kv_transfer_params), stats


async def overlapped(
    prefill: Process,
    decode: Process,
    name: str,
    prompt: list[int],
    *,
    hands_token: bool = True,
    life: int = 0,
) -> tuple[list[int], Any]:
    """A request as the router sends it, which loses its blocks at the source so often at least; its tokens
    and the reader's statistics."""
    source, reader = f"{name}-p", f"{name}-d"
    held = prompt if hands_token else prompt[:-1]
    await decode.add(reader, list(prompt), TOKENS - hands_token, follow(len(held)))
    follower = Follower(decode.facts["news_address"], reader)
    await prefill.add(source, held, 1, keep_for_reader(follower))
    first, handle, _ = await finished(prefill, source)
    assert handle is not None
    assert handle.params[LIFE_PARAM] >= life
    first = first if hands_token else []
    await decode.post(wire.GO_ON, wire.pack(wire.GoOn(reader, first, dict(handle.params))))
    rest, _, stats = await finished(decode, reader)
    return first + rest, stats


async def quiet(*engines: Process) -> None:
    """No block is in use."""
    async with asyncio.timeout(20):
        for engine in engines:
            while not engine.loads or engine.loads[-1].kv_usage > 0 or engine.loads[-1].running:
                await engine.step()


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [1, 200, CHUNK, CHUNK + 1, 5 * CHUNK, 1500, *(rng.randrange(300, 2000) for _ in range(6))]
    return [[rng.randrange(100, 4000) for _ in range(length)] for length in lengths]


async def check_tokens(prefill: Process, decode: Process) -> None:
    """At any length, with the first token from the source and without it."""
    for number, prompt in enumerate(prompts(1)):
        hands_token = number % 3 != 2 or len(prompt) == 1
        whole, _, _ = await decode.generate(f"whole-{number}", prompt, TOKENS)
        assert await decode.call("reset_prefix_cache")
        tokens, stats = await overlapped(prefill, decode, f"o{number}", prompt, hands_token=hands_token)
        assert tokens == whole, len(prompt)
        assert stats.num_external_cached_tokens == len(prompt) - (not hands_token)
        await quiet(prefill, decode)


async def check_what_is_left(prefill: Process, decode: Process) -> None:
    """Of 1,500 tokens in chunks of 256, at most a quarter of the bytes move after the last chunk."""
    rng = random.Random(2)
    before = {name: sum(decode.transfers[name]) for name in (EARLY_BYTES, "bytes_transferred")}
    for number in range(3):
        prompt = [rng.randrange(100, 4000) for _ in range(1500)]
        await overlapped(prefill, decode, f"left-{number}", prompt)
    await quiet(prefill, decode)
    early, moved = (sum(decode.transfers[name]) - before[name] for name in before)
    assert moved == 3 * 12 * BLOCK * decode.facts["kv_bytes_per_token"]
    assert early / moved >= 0.75


async def check_cached_part(prefill: Process, decode: Process) -> None:
    """What either side has in its own cache is not moved."""
    rng = random.Random(3)
    shared = [rng.randrange(100, 4000) for _ in range(3 * BLOCK)]
    await decode.generate("shared", shared, 2)
    prompt = shared + [rng.randrange(100, 4000) for _ in range(900)]
    await prefill.generate("warm", prompt[: 4 * BLOCK], 2)
    tokens, stats = await overlapped(prefill, decode, "cached", prompt)
    assert (stats.num_local_cached_tokens, stats.num_external_cached_tokens) == (3 * BLOCK, 900)
    whole, _, _ = await decode.generate("cached-whole", prompt, TOKENS)
    assert tokens == whole


async def check_aborts(prefill: Process, decode: Process) -> None:
    """A client that leaves at any time leaves no block behind, and others get right tokens meanwhile."""
    rng = random.Random(4)
    for number in range(12):
        prompt = [rng.randrange(100, 4000) for _ in range(1800)]
        source, reader = f"gone-{number}-p", f"gone-{number}-d"
        await decode.add(reader, list(prompt), 9, follow(len(prompt)))
        await prefill.add(source, prompt, 1, keep_for_reader(Follower(decode.facts["news_address"], reader)))
        await asyncio.sleep(rng.uniform(0, 0.08))
        for engine, name in rng.sample([(prefill, source), (decode, reader)], 2):
            await engine.post(wire.ABORT, wire.pack([name]))
            await asyncio.sleep(rng.uniform(0, 0.02))
        await prefill.post(wire.RELEASE, wire.pack([source]))
        # Someone whose blocks are those that were free a moment ago.
        other = [rng.randrange(100, 4000) for _ in range(700)]
        whole, _, _ = await prefill.generate(f"other-{number}", other, TOKENS)
        tokens, _ = await overlapped(prefill, decode, f"after-{number}", other)
        assert tokens == whole
        await quiet(prefill, decode)


async def test_a_prompt_is_read_chunk_by_chunk(model: Path) -> None:
    async with pair(model, "thread", {"engine_options": OPTIONS}) as (prefill, decode):
        assert prefill.facts["chunk_tokens"] == CHUNK
        await check_tokens(prefill, decode)
        await check_what_is_left(prefill, decode)
        await check_cached_part(prefill, decode)
        await check_aborts(prefill, decode)
        measured = decode.transfers | {RELEASE: prefill.transfers[RELEASE]}
        assert {stage for stage in STAGES if not measured[seconds_key(stage)]} == set()


async def test_a_source_that_begins_anew_is_read_anew(model: Path) -> None:
    """A prompt that loses its blocks at the source, after most of them were read."""
    small = {
        "kv_cache_memory_bytes": 20 * BLOCK * 4096,
        "max_model_len": 2048,
        "scheduler_reserve_full_isl": False,
    }
    overrides = {"engine_options": OPTIONS, "prefill": {"engine_options": small}}
    rng = random.Random(5)
    async with pair(model, "thread", overrides) as (prefill, decode):
        prompt = [rng.randrange(100, 4000) for _ in range(1500)]
        whole, _, _ = await decode.generate("whole", prompt, TOKENS)
        assert await decode.call("reset_prefix_cache")
        # With the first one's eight or nine blocks there is no room for all twelve of the prompt.
        first = [rng.randrange(100, 4000) for _ in range(8 * BLOCK - 60)]
        await prefill.add("first", first, 150)
        while not any(output.new_token_ids for output in await prefill.step()):
            pass
        tokens, stats = await overlapped(prefill, decode, "anew", prompt, life=1)
        assert tokens == whole
        assert stats.num_external_cached_tokens == len(prompt)
        moved, early = (sum(decode.transfers[name]) for name in ("bytes_transferred", EARLY_BYTES))
        size = 12 * BLOCK * decode.facts["kv_bytes_per_token"]
        assert early > size / 2
        assert moved > size  # much of it twice
        await quiet(prefill, decode)


async def test_sliding_windows(tmp_path: Path) -> None:
    async with pair(build_hybrid_model(tmp_path), "thread", {"engine_options": OPTIONS}) as (prefill, decode):
        await check_tokens(prefill, decode)


@pytest.mark.skipif(not MANY, reason="PDSERVE_HAND_OFFS is not set; test_parallel_vllm has one to two")
@pytest.mark.parametrize(("prefill_ranks", "decode_ranks"), [(1, 2), (2, 1)])
async def test_unequal_tensor_parallelism(model: Path, prefill_ranks: int, decode_ranks: int) -> None:
    overrides = {
        "engine_options": OPTIONS,
        "prefill": {"tensor_parallel_size": prefill_ranks},
        "decode": {"tensor_parallel_size": decode_ranks},
    }
    cores = "0|1" if prefill_ranks == 2 else "0", "0|1" if decode_ranks == 2 else "1"
    async with pair(model, "own", overrides, cores) as (prefill, decode):
        await check_tokens(prefill, decode)
        await check_what_is_left(prefill, decode)
        await check_aborts(prefill, decode)
