"""A LoRA adapter with random weights for the tiny model, in PEFT's files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from deploy.tiny_model_torch import HEAD_DIM, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, QUERY_HEADS

RANK = 8
# (input width, output width). Keys and values are among them: KV of one adapter is wrong for every other.
_MODULES = {
    "self_attn.q_proj": (HIDDEN, QUERY_HEADS * HEAD_DIM),
    "self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}


def build_tiny_adapter(directory: Path, *, seed: int) -> Path:
    """Write an adapter into a new `directory` and return it."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for module, (width_in, width_out) in _MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            down = torch.randn(RANK, width_in, generator=generator) / math.sqrt(width_in)
            up = torch.randn(width_out, RANK, generator=generator) / math.sqrt(RANK)
            weights |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(weights, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted(module.rpartition(".")[2] for module in _MODULES),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
