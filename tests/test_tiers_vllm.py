"""Real vLLM engines that keep in main memory, and in a directory, what they have no room for."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.fingerprint import model_fingerprint
from cluster.handle import keep_for_reader
from cluster.prefix_hash import chain_hashes
from deploy.tiny_model_torch import build_tiny_model
from kv_transfer.tiered_vllm import TieredConnector
from tests.test_engines_vllm import BLOCK, Process, check_release, pair
from tests.test_overlap_vllm import OPTIONS, quiet
from tests.test_transports_vllm import check_many

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

# Room for 20 blocks in the engine.
SMALL = OPTIONS | {
    "kv_cache_memory_bytes": 20 * BLOCK * 4096,
    "max_model_len": 2048,
    "scheduler_reserve_full_isl": False,
}
WHOLE = 5 * BLOCK


def prompts(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(100, 4000) for _ in range(WHOLE + 30)] for _ in range(count)]


def kept_for(directory: Path) -> set[str]:
    """The models of which blocks are kept: none is a folder in another one's."""
    folders = [str(path.relative_to(directory)).split("/") for path in directory.rglob("*.bin")]
    fingerprint = folders[0][0]
    assert all(folder.count(fingerprint) == 1 for folder in folders)
    return {folder[0] for folder in folders}


def left_in_shared_memory() -> list[Path]:
    return list(Path("/dev/shm").glob("vllm_offload_*"))


async def check_kept(engine: Process) -> None:
    """What was evicted is read again, and right."""
    asked = prompts(1, 12)
    first = [(await engine.generate(f"first-{n}", prompt, 8))[0] for n, prompt in enumerate(asked)]
    # As far as routers know, it is there as it was.
    for prompt in asked[:6]:
        await engine.until_cached(list(chain_hashes(prompt, BLOCK)), True)
    for number, prompt in enumerate(asked):
        tokens, _, stats = await engine.generate(f"again-{number}", prompt, 8)
        assert tokens == first[number]
        assert stats.num_local_cached_tokens + stats.num_external_cached_tokens == WHOLE, number
        if number < 6:
            assert stats.num_external_cached_tokens == WHOLE
    await quiet(engine)


async def test_what_an_engine_has_no_room_for_waits_in_main_memory(tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"engine_options": SMALL, "tiers": {"host_gib": 0.25}}
    async with pair(build_tiny_model(tmp_path / "tiny"), "thread", overrides) as (prefill, decode):
        await check_kept(prefill)
        # Handed over are blocks that were read from there as well.
        prompt = prompts(1, 12)[0]
        whole, _, _ = await decode.generate("whole", prompt, 8)
        assert await decode.call("reset_prefix_cache")
        first, handle, stats = await prefill.generate("p", prompt, 1, keep_for_reader())
        assert handle is not None
        assert stats.num_external_cached_tokens == WHOLE
        rest, _, stats = await decode.generate("d", prompt + first, 7, dict(handle.params))
        assert first + rest == whole
        assert stats.num_external_cached_tokens == len(prompt)
        await check_many(prefill, decode)
        await check_release(prefill)


async def test_what_one_instance_has_kept_another_one_finds(tmp_path: Path) -> None:
    """In a directory: neither is told of the other."""
    directory = tmp_path / "kept"
    directory.mkdir()
    overrides: dict[str, Any] = {
        "engine_options": SMALL,
        "tiers": {"host_gib": 0.125, "directory": str(directory)},
    }
    model = build_tiny_model(tmp_path / "tiny")
    async with pair(model, "own", overrides) as (prefill, decode):
        (prompt,) = prompts(2, 1)
        first, _, _ = await prefill.generate("here", prompt, 8)
        async with asyncio.timeout(20):
            while len(list(directory.rglob("*.bin"))) < WHOLE // BLOCK:
                await asyncio.sleep(0.05)
        tokens, _, stats = await decode.generate("there", prompt, 8)
        assert tokens == first
        assert stats.num_external_cached_tokens == WHOLE
        assert kept_for(directory) == {model_fingerprint(str(model))}
        await check_kept(decode)
        await quiet(prefill, decode)
    assert left_in_shared_memory() == []


def test_blocks_that_others_will_write_to_are_told_to_who_copies_from_them() -> None:
    """KV of another instance is written before its reader is scheduled."""
    noted: set[int] = set()
    asked: list[int] = []

    def alloc(_request: Any, _blocks: Any, tokens: int) -> None:
        asked.append(tokens)

    half = SimpleNamespace(_current_batch_allocated_block_ids=noted)
    connector = TieredConnector.__new__(TieredConnector)
    connector._connectors = [
        SimpleNamespace(update_state_after_alloc=alloc),
        SimpleNamespace(update_state_after_alloc=alloc, connector_scheduler=half),
    ]
    connector._requests_to_connector = {"a": 0}
    group = [SimpleNamespace(block_id=n, is_null=n == 0) for n in (0, 4, 7)]
    blocks = SimpleNamespace(blocks=(group,))
    connector.update_state_after_alloc(SimpleNamespace(request_id="a"), blocks, 300)
    assert asked == [300, 0]
    assert noted == {4, 7}
