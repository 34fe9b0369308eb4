"""Pools with their own parallelism: one rank prefills, two decode, in vLLM's own processes under Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import openai
import pytest

from cluster.instance import Role
from cluster.spec import ClusterSpec
from cluster.vllm_options import engine_options
from deploy.status import read_metric
from deploy.tiny_model_torch import build_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(300)]

PORT = 18213


def parallel_spec(model: Path | str) -> ClusterSpec:
    return ClusterSpec.model_validate(
        {
            "name": "parallel",
            "model": str(model),
            "served_model_name": "tiny",
            "device": "cpu",
            "engine_options": {
                "dtype": "float32",
                "enforce_eager": True,
                "max_model_len": 4096,
                "max_num_seqs": 32,
                "kv_cache_memory_bytes": 128 << 20,
            },
            # The longest prompt is read while it is computed.
            "prefill": {"engine_options": {"max_num_batched_tokens": 256}},
            "decode": {"tensor_parallel_size": 2},
            "ingress": {"cpus": 0, "port": PORT},
        }
    )


class Greedy(Protocol):
    """The tokens that follow a prompt."""

    def __call__(self, prompt: list[int], salt: str, **extra: object) -> list[int]: ...


def greedy_at(url: str) -> Greedy:
    """From a cluster."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def greedy(prompt: list[int], salt: str, **extra: object) -> list[int]:
        answer = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=32, temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True, "cache_salt": salt, **extra},
        )  # fmt: skip
        return list(answer.choices[0].model_extra["token_ids"])

    return greedy


def test_the_executor_is_named() -> None:
    """Inside a Ray actor vLLM would take its Ray executor, which is refused on CPUs and starts Ray anew."""
    spec = parallel_spec("m")
    assert engine_options(spec, Role.PREFILL, {})["distributed_executor_backend"] == "uni"
    assert engine_options(spec, Role.DECODE, {})["distributed_executor_backend"] == "mp"


def test_one_rank_prefills_and_two_decode(tmp_path: Path) -> None:
    from deploy.ray_up import serving

    with serving(parallel_spec(build_tiny_model(tmp_path / "tiny")), say=print) as url:
        greedy = greedy_at(url)
        for length in (1, 127, 128, 129, 700):
            prompt = [(length + i * 37) % 3000 + 100 for i in range(length)]
            whole = greedy(prompt, "whole", vllm_xargs={"pdserve_unsplit": 1})
            assert greedy(prompt, "split") == whole
        assert read_metric(url, "pdserve_kv_bytes_moved_early_total") > 0
