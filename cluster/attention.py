"""Which attention kernels the engines of a cluster run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from cluster.errors import EnvironmentProblem, SpecError
from cluster.spec import ClusterSpec

FLASHINFER = "FLASHINFER"


def attention_backend(spec: ClusterSpec) -> str | None:
    """vLLM's name of the attention backend of both pools; None leaves the choice to vLLM.

    One for both: KV is read as it lies, and backends lay it out differently (NIXL's handshake refuses another
    backend). On GPUs the default is FlashInfer, whose decode kernels balance long and short contexts in one
    batch; a model with latent attention (MLA) has kernels of its own, and vLLM chooses them.

    Raises:
        SpecError: the pools ask for different ones.
        EnvironmentProblem: FlashInfer is asked for and can't run here.
    """
    asked = {b for b in (spec.prefill.attention_backend, spec.decode.attention_backend) if b is not None}
    if len(asked) > 1:
        raise SpecError(
            file="(spec)",
            path="decode.attention_backend",
            value=spec.decode.attention_backend,
            allowed=f"prefill has {spec.prefill.attention_backend}; KV is read as it lies, so name one",
        )
    if spec.engine == "sim":
        return None
    default = FLASHINFER if spec.device == "gpu" and not _has_latent_attention(spec.model) else None
    backend = asked.pop() if asked else default
    if backend == FLASHINFER:
        _require_flashinfer(spec)
    return backend


def _require_flashinfer(spec: ClusterSpec) -> None:
    if spec.device != "gpu":
        raise EnvironmentProblem(
            problem="attention_backend FLASHINFER needs a GPU and the spec says 'device: cpu'",
            remedy="remove attention_backend",
        )
    if importlib.util.find_spec("flashinfer") is None:
        raise EnvironmentProblem(
            problem="the engines run on FlashInfer, which is not installed",
            remedy="install pdserve's 'gpu' extra, or set attention_backend: FLASH_ATTN in both pools",
        )


def _has_latent_attention(model: str) -> bool:
    config = Path(model) / "config.json"
    if not config.is_file():
        return "deepseek" in model.lower()
    return bool(json.loads(config.read_text(encoding="utf-8")).get("kv_lora_rank"))
