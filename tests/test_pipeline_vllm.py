"""Real vLLM engines with pipeline stages as sources of KV: the tokens are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.tiny_model_torch import build_tiny_model
from tests.test_engines_vllm import check_idle, check_release, check_silence, pair
from tests.test_overlap_vllm import OPTIONS, check_tokens, check_what_is_left
from tests.test_transports_vllm import MANY, check_many

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


async def check_stages(model: Path, overrides: dict[str, Any], cores: tuple[str, str]) -> None:
    async with pair(model, "own", overrides, cores) as (prefill, decode):
        for length in (5, 70, 300):
            prompt = [100 + 7 * n % 3000 for n in range(length)]
            whole = [(await one.generate(f"whole-{length}", prompt, 6))[0] for one in (prefill, decode)]
            assert whole[0] == whole[1]
        await check_many(prefill, decode)
        await check_release(prefill)
        await check_silence(prefill)
        await check_idle(prefill, decode)


@pytest.mark.skipif(not MANY, reason="PDSERVE_HAND_OFFS is not set; the next one has stages too")
async def test_two_stages_are_read_as_one(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "tiny")
    await check_stages(model, {"prefill": {"pipeline_parallel_size": 2}}, ("0|1", "1"))


async def test_two_stages_are_read_while_they_compute(tmp_path: Path) -> None:
    """A chunk is told of when all stages have computed it."""
    overrides = {
        "engine_options": OPTIONS,
        "prefill": {"pipeline_parallel_size": 2},
    }
    async with pair(build_tiny_model(tmp_path / "tiny"), "own", overrides, ("0|1", "1")) as (prefill, decode):
        await check_tokens(prefill, decode)
        await check_what_is_left(prefill, decode)
        await check_idle(prefill, decode)


@pytest.mark.parametrize("transport", ["nixl", *(["torch"] if MANY else [])])
async def test_two_stages_to_two_ranks(tmp_path: Path, transport: str) -> None:
    overrides = {
        "transfer": {"transport": transport},
        "prefill": {"pipeline_parallel_size": 2},
        "decode": {"tensor_parallel_size": 2},
    }
    await check_stages(build_tiny_model(tmp_path / "tiny"), overrides, ("0|1", "0|1"))
