from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.attention import FLASHINFER, attention_backend
from cluster.errors import EnvironmentProblem, SpecError
from cluster.spec import ClusterSpec
from decode_worker import phase as decode_phase
from prefill_worker import phase as prefill_phase


def spec(model: str = "m/m", device: str = "gpu", **pools: str | None) -> ClusterSpec:
    named = {role: {"attention_backend": backend} for role, backend in pools.items()}
    return ClusterSpec.model_validate({"model": model, "device": device, **named})


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has it."""
    find = importlib.util.find_spec
    found: Any = object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: found if n == "flashinfer" else find(n))


def test_both_phases_run_flashinfer_on_gpus() -> None:
    for phase in (prefill_phase, decode_phase):
        assert phase.phase_options(spec())["attention_backend"] == FLASHINFER


def test_a_backend_named_for_one_pool_is_the_backend_of_both() -> None:
    for pools in ({"decode": "FLASH_ATTN"}, {"prefill": "FLASH_ATTN"}):
        assert attention_backend(spec(**pools)) == "FLASH_ATTN"


def test_two_backends_are_refused() -> None:
    with pytest.raises(SpecError, match="name one"):
        attention_backend(spec(prefill="FLASH_ATTN", decode=FLASHINFER))


def test_on_cpus_the_choice_is_vllms_and_flashinfer_is_refused() -> None:
    assert attention_backend(spec(device="cpu")) is None
    with pytest.raises(EnvironmentProblem, match="needs a GPU"):
        attention_backend(spec(device="cpu", decode=FLASHINFER))


def test_latent_attention_is_left_to_vllm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"kv_lora_rank": 512}))
    assert attention_backend(spec(model=str(tmp_path))) is None
    assert attention_backend(spec(model="deepseek-ai/DeepSeek-V3")) is None


def test_without_flashinfer_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="attention_backend: FLASH_ATTN in both pools"):
        attention_backend(spec())
