"""A small random Gemma 3: sliding-window and full attention in turn, so its KV cache has hybrid groups."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from deploy.tiny_model_torch import build_tiny_model

WINDOW = 256


def build_hybrid_model(directory: Path) -> Path:
    """A checkpoint of six layers, every third with full attention, with the tiny model's tokenizer."""
    tiny = build_tiny_model(directory / "tiny")
    target = directory / "hybrid"
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=32,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = Gemma3ForCausalLM(config).float()
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, target / name)
    return target
