"""LoRA adapters through the split, real vLLM and NIXL: each request's tokens are those of a plain vLLM engine
with its adapter, whatever else runs, is cached or was moved."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.spec import ClusterSpec
from deploy.status import fetch_status
from deploy.status import read_metric as metric
from deploy.tiny_model_torch import build_tiny_model
from tests.adapter_torch import build_tiny_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parent.parent
PORT = 18217
# Shorter than a block, at its end, and of several.
LENGTHS = (5, 128, 300)
OUTPUT = 24


def lora_spec(model: Path, adapters: dict[str, str]) -> ClusterSpec:
    return ClusterSpec.model_validate(
        {
            "name": "lora",
            "model": str(model),
            "served_model_name": "tiny",
            "device": "cpu",
            "engine_process": "thread",
            "engine_options": {
                "dtype": "float32",
                "enforce_eager": True,
                "max_model_len": 4096,
                "max_num_seqs": 32,
                "kv_cache_memory_bytes": 128 << 20,
                "enable_lora": True,
                "max_loras": 1,  # so that one must make room for another
                "max_cpu_loras": 2,
                "max_lora_rank": 8,
            },
            "lora": {"adapters": adapters, "runtime_updates": True},
            "ingress": {"cpus": 0, "port": PORT},
        }
    )


def reference(model: Path, requests: list[dict[str, Any]]) -> list[list[int]]:
    answer = subprocess.run(
        [sys.executable, "-m", "tests.reference_vllm", str(model)],
        input=json.dumps(requests), capture_output=True, text=True, cwd=ROOT, timeout=200, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    tokens: list[list[int]] = json.loads(answer.stdout)
    return tokens


async def test_adapters_through_the_split(tmp_path: Path) -> None:
    from deploy.ray_up import serving

    model = build_tiny_model(tmp_path / "tiny")
    paths = {
        name: str(build_tiny_adapter(tmp_path / name, seed=seed))
        for seed, name in enumerate(("sql", "chat", "late"), 1)
    }
    prompts = [[(length + i * 37) % 3000 + 100 for i in range(length)] for length in LENGTHS]
    asked = [(name, prompt) for prompt in prompts for name in ("tiny", *paths)]
    requests = [
        {"prompt": prompt, "max_tokens": OUTPUT} | ({"adapter": paths[name]} if name in paths else {})
        for name, prompt in asked
    ]
    expected = reference(model, requests)
    for first in range(0, len(expected), 4):  # the model and each adapter answer the same prompt differently
        assert len({tuple(tokens) for tokens in expected[first : first + 4]}) == 4

    known = {name: paths[name] for name in ("sql", "chat")} | {"gone": str(tmp_path / "gone")}
    with serving(lora_spec(model, known), say=print) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            await check(client, url, paths["late"], asked, expected)


async def check(
    client: Any, url: str, late: str, asked: list[tuple[str, list[int]]], expected: list[list[int]]
) -> None:
    async def models() -> set[str]:
        return {model.id async for model in client.models.list()}

    async def load(name: str, path: str) -> None:
        await client.post("/load_lora_adapter", body={"lora_name": name, "lora_path": path}, cast_to=str)

    async def greedy(name: str, prompt: list[int]) -> list[int]:
        answer = await client.completions.create(
            model=name, prompt=prompt, max_tokens=OUTPUT, temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        return list(answer.choices[0].model_extra["token_ids"])

    assert await models() == {"tiny", "sql", "chat", "gone"}
    # One that can't be loaded ends its own requests, and no engine.
    with pytest.raises(openai.APIStatusError, match="gone"):
        await greedy("gone", [5, 6, 7])
    with pytest.raises(openai.NotFoundError):
        await load("nowhere", late + "/nowhere")
    with pytest.raises(openai.NotFoundError):
        await greedy("nowhere", [5, 6, 7])
    await load("late", late)
    assert "late" in await models()
    moved = await asyncio.to_thread(metric, url, "pdserve_kv_tokens_moved_total")
    one_by_one = [await greedy(*each) for each in asked]
    assert one_by_one == expected
    read = await asyncio.to_thread(metric, url, "pdserve_kv_tokens_moved_total")
    assert read - moved == sum(len(prompt) for _, prompt in asked)
    # All at once, with one slot for three adapters; the prompts' blocks are cached now, by adapter.
    assert await asyncio.gather(*(greedy(*each) for each in asked)) == expected
    status = await asyncio.to_thread(fetch_status, url)
    assert all(len(row["adapters"]) == 2 for row in status["instances"])
    await client.post("/unload_lora_adapter", body={"lora_name": "late"}, cast_to=str)
    assert "late" not in await models()
