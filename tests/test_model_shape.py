"""Model shapes: sizes against the published ones, and what follows from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import SpecError
from cluster.model_shape import named_shape, shape_of


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("opt-13b", 12.85),
        ("opt-66b", 65.7),
        ("opt-175b", 174.6),
        ("llama-2-7b", 6.74),
        ("llama-2-70b", 68.98),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.6),
        ("codellama-34b", 33.7),
        ("internlm-20b", 20.1),
        ("qwen-72b", 72.3),
        ("qwen3-32b", 32.8),
        ("phi-2", 2.78),
        ("bloom-176b", 176.2),
        ("mixtral-8x7b", 46.7),
        ("deepseek-v3", 671),
    ],
)
def test_parameters_are_the_published_ones(name: str, billions: float) -> None:
    assert named_shape(name).parameters / 1e9 == pytest.approx(billions, rel=0.003)


@pytest.mark.parametrize(
    ("name", "billions"), [("mixtral-8x7b", 12.9), ("deepseek-v3", 37), ("opt-13b", 12.85)]
)
def test_active_parameters_are_the_published_ones(name: str, billions: float) -> None:
    assert named_shape(name).active_parameters / 1e9 == pytest.approx(billions, rel=0.02)


def test_kv_of_each_kind_of_attention() -> None:
    assert named_shape("opt-13b").kv_bytes_per_token == 2 * 40 * 5120 * 2
    assert named_shape("llama-3-70b").kv_bytes_per_token == 2 * 80 * 8 * 128 * 2
    # DeepSeek-V2 (arXiv 2405.04434), 2.1.4: kv_rank + rope_dim for each layer.
    assert named_shape("deepseek-v3").kv_bytes_per_token == 61 * (512 + 64) * 2


def test_kv_of_a_rank() -> None:
    llama, deepseek = named_shape("llama-3-70b"), named_shape("deepseek-v3")
    whole = llama.kv_bytes_per_token
    assert llama.kv_bytes_per_token_and_rank(1) == whole
    assert llama.kv_bytes_per_token_and_rank(4) == whole / 4
    assert llama.kv_bytes_per_token_and_rank(16) == whole / 8  # 8 KV heads, each on two ranks
    assert llama.kv_bytes_per_token_and_rank(2, 2) == whole / 4
    assert deepseek.kv_bytes_per_token_and_rank(8) == deepseek.kv_bytes_per_token
    assert deepseek.kv_bytes_per_token_and_rank(8, 2) == deepseek.kv_bytes_per_token / 61 * 31


def test_weights_in_eight_bits() -> None:
    shape = named_shape("llama-3-8b")
    assert shape.weight_bytes == 2 * shape.parameters
    assert replace(shape, dtype_bytes=1).weight_bytes == shape.parameters


def test_work_of_a_dense_model() -> None:
    shape = named_shape("llama-3-8b")
    layer = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336
    assert shape.flops_per_token == 2 * 32 * layer
    # n^2 / 2 pairs of tokens, each 2 x (128 + 128) for each of 32 heads.
    assert shape.attention_flops_per_square_token == 32 * 32 * (128 + 128)
    assert shape.decode_flops_per_context_token == 2 * shape.attention_flops_per_square_token


def test_experts_count_only_where_tokens_go() -> None:
    shape = named_shape("mixtral-8x7b")
    assert shape.moe_layers == 32
    routed = 32 * shape.expert_parameters
    assert shape.parameters - shape.active_parameters == 6 * routed
    assert shape.flops_per_token == 2 * (shape.shared_parameters + 2 * routed)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(SpecError) as caught:
        shape_of("gpt-9")
    assert "llama-3-8b" in str(caught.value)
    assert "config.json" in str(caught.value)


def test_names_go_without_case_and_paths_to_the_config(tmp_path: Path) -> None:
    assert shape_of("Llama-3-8B") is named_shape("llama-3-8b")
    with pytest.raises(SpecError, match=r"config\.json"):
        shape_of(str(tmp_path))  # a directory without one
