"""Real vLLM engines over other transports than NIXL: the tokens are the same."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from cluster.handle import keep_for_reader
from deploy.tiny_model_torch import build_tiny_model
from tests.hybrid_model_torch import build_hybrid_model
from tests.test_engines_vllm import (
    Process,
    check_hand_off,
    check_idle,
    check_part_of_the_prompt_cached,
    check_release,
    pair,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
# The docs' figures are of all pairs and 200 requests (PDSERVE_HAND_OFFS=200), which takes seven minutes.
MANY = "PDSERVE_HAND_OFFS" in os.environ
REQUESTS = int(os.environ.get("PDSERVE_HAND_OFFS", "12"))
UNEQUAL = [("nixl", 1, 2), ("nixl", 2, 1), ("torch", 1, 2), ("torch", 2, 1)]
ALONE = ["torch", *(["local"] if MANY else [])]


async def check_many(prefill: Process, decode: Process) -> None:
    """Requests of any length, each beside the same on one engine."""
    rng = random.Random(7)
    for number in range(REQUESTS):
        prompt = [rng.randrange(100, 4000) for _ in range(rng.randrange(1, 400))]
        whole, _, _ = await prefill.generate(f"many-whole-{number}", prompt, 6)
        first, handle, _ = await prefill.generate(f"many-p-{number}", prompt, 1, keep_for_reader())
        assert handle is not None
        rest, _, stats = await decode.generate(f"many-d-{number}", prompt + first, 5, dict(handle.params))
        assert first + rest == whole
        assert stats.num_external_cached_tokens + stats.num_local_cached_tokens == len(prompt)


@pytest.mark.parametrize("transport", ALONE)
async def test_hand_off(tmp_path: Path, transport: str) -> None:
    model = build_tiny_model(tmp_path / "tiny")
    async with pair(model, "thread", {"transfer": {"transport": transport}}) as (prefill, decode):
        if transport == "torch":
            await check_hand_off(prefill, decode)
        await check_part_of_the_prompt_cached(prefill, decode)
        await check_many(prefill, decode)
        await check_release(prefill)
        await check_idle(prefill, decode)


@pytest.mark.skipif(not MANY, reason="PDSERVE_HAND_OFFS is not set; test_parallel_vllm has one to two")
@pytest.mark.parametrize(("transport", "prefill_ranks", "decode_ranks"), UNEQUAL)
async def test_unequal_tensor_parallelism(
    tmp_path: Path, transport: str, prefill_ranks: int, decode_ranks: int
) -> None:
    model = build_tiny_model(tmp_path / "tiny")
    overrides = {
        "transfer": {"transport": transport},
        "prefill": {"tensor_parallel_size": prefill_ranks},
        "decode": {"tensor_parallel_size": decode_ranks},
    }
    cores = "0|1" if prefill_ranks == 2 else "0", "0|1" if decode_ranks == 2 else "1"
    async with pair(model, "own", overrides, cores) as (prefill, decode):
        await check_many(prefill, decode)
        await check_release(prefill)


@pytest.mark.skipif(not MANY, reason="PDSERVE_HAND_OFFS is not set; test_engines_vllm has them over NIXL")
async def test_sliding_windows_over_gloo(tmp_path: Path) -> None:
    async with pair(build_hybrid_model(tmp_path), "thread", {"transfer": {"transport": "torch"}}) as (
        prefill,
        decode,
    ):
        await check_hand_off(prefill, decode)
