"""Hugging Face configs become shapes. The configs are the published ones, cut down to sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import SpecError
from cluster.model_shape import ModelShape, named_shape, shape_from_config

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
MIXTRAL = LLAMA | {
    "model_type": "mixtral", "vocab_size": 32000, "max_position_embeddings": 32768,
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
OPT: dict[str, Any] = {
    "model_type": "opt", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
    "ffn_dim": 20480, "vocab_size": 50272, "max_position_embeddings": 2048, "torch_dtype": "float16",
}  # fmt: skip
BLOOM: dict[str, Any] = {
    "model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112, "vocab_size": 250880,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "intermediate_size": 18432, "vocab_size": 129280,
    "max_position_embeddings": 163840, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "n_shared_experts": 1, "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "tie_word_embeddings": False, "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip


def read(tmp_path: Path, config: object) -> ModelShape:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return shape_from_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA, "llama-3-8b"),
        (MIXTRAL, "mixtral-8x7b"),
        (OPT, "opt-13b"),
        (BLOOM, "bloom-176b"),
        (DEEPSEEK, "deepseek-v3"),
    ],
)
def test_a_config_gives_the_shape_that_is_known_by_name(
    tmp_path: Path, config: dict[str, Any], name: str
) -> None:
    assert replace(read(tmp_path, config), name=name) == named_shape(name)


def test_the_file_itself_and_the_language_half_of_a_multimodal_config(tmp_path: Path) -> None:
    nested = {"model_type": "a_vision_model", "text_config": LLAMA, "tie_word_embeddings": True}
    read(tmp_path, nested)
    shape = shape_from_config(tmp_path / "config.json")
    assert shape.tied_embeddings
    assert shape.name == tmp_path.name
    assert shape.layers == 32


def test_head_dim_of_its_own(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | {"head_dim": 256}).head_dim == 256


def test_qwen_experts(tmp_path: Path) -> None:
    qwen = LLAMA | {
        "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "decoder_sparse_step": 2, "mlp_only_layers": [1], "shared_expert_intermediate_size": 512,
    }  # fmt: skip
    experts = read(tmp_path, qwen).experts
    assert experts is not None
    assert (experts.count, experts.active, experts.ffn, experts.shared_ffn) == (128, 8, 768, 512)
    assert experts.dense_layers == 32 - (16 - 1)


@pytest.mark.parametrize(
    ("change", "weight_bytes"),
    [
        ({"torch_dtype": "float32"}, 4),
        ({"dtype": "float16"}, 2),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, 0.5),
        ({"quantization_config": {"quant_method": "fp8"}}, 1),
    ],
)
def test_bytes_of_a_weight(tmp_path: Path, change: dict[str, Any], weight_bytes: float) -> None:
    assert read(tmp_path, LLAMA | change).dtype_bytes == weight_bytes


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_size_is_named(tmp_path: Path, missing: str) -> None:
    config = {key: value for key, value in LLAMA.items() if key != missing}
    with pytest.raises(SpecError) as caught:
        read(tmp_path, config)
    assert caught.value.path == missing
    with pytest.raises(SpecError) as caught:
        read(tmp_path, {"text_config": config})
    assert caught.value.path == f"text_config.{missing}"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LLAMA | {"hidden_size": "wide"}, "whole number"),
        (LLAMA | {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ([LLAMA], "JSON object"),
    ],
)
def test_what_is_no_shape_is_told(tmp_path: Path, config: object, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        read(tmp_path, config)


def test_what_is_no_json_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(SpecError, match="JSON"):
        shape_from_config(tmp_path)
    with pytest.raises(SpecError, match="name a config"):
        shape_from_config(tmp_path / "nothing.json")
