"""The kernels of a model: which, how much work they are, and what becomes of their times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import SpecError
from cluster.hardware import hardware_named
from cluster.model_shape import named_shape
from deploy.profiler.kernels import (
    AttentionShape,
    GemmShape,
    Kernel,
    kernel_grid,
    kernels_table,
    save_kernels,
    time_kernels,
)

LLAMA = named_shape("llama-3-8b")
H100 = hardware_named("h100")


class KnownTimer:
    """A GPU that reaches half of its roofline in everything."""

    def __init__(self, share: float = 0.5) -> None:
        self.share = share
        self.versions = {"torch": "2.0", "flashinfer": "0.7"}

    def time_s(self, kernel: Kernel) -> float:
        return kernel.roofline_s(H100) / self.share


def kernels(tensor_parallel_size: int = 1) -> list[Kernel]:
    return kernel_grid(LLAMA, tensor_parallel_size=tensor_parallel_size, max_prompt=2048, max_requests=64)


def test_the_products_of_a_layer_are_its_parameters() -> None:
    one = [k.shape for k in kernels() if isinstance(k.shape, GemmShape) and k.shape.tokens == 1]
    assert sum(shape.inner * shape.outer for shape in one) * LLAMA.layers == LLAMA.shared_parameters


def test_the_work_of_attention_is_the_models() -> None:
    whole = next(
        k
        for k in kernels()
        if k.name == "prefill_attention"
        and isinstance(k.shape, AttentionShape)
        and (k.shape.requests, k.shape.context_tokens, k.shape.new_tokens) == (1, 2048, 2048)
    )
    model = LLAMA.attention_flops_per_square_token * 2048**2 / LLAMA.layers
    assert whole.flops == pytest.approx(model, rel=1e-3)
    decode = next(
        k
        for k in kernels()
        if k.name == "decode_attention"
        and isinstance(k.shape, AttentionShape)
        and (k.shape.requests, k.shape.context_tokens) == (1, 2048)
    )
    kv = LLAMA.kv_bytes_per_token * 2048 / LLAMA.layers
    assert kv < decode.bytes < kv * 1.01
    assert decode.flops == pytest.approx(LLAMA.decode_flops_per_context_token * 2048 / LLAMA.layers, rel=0.01)


def test_a_chunk_is_what_is_left_of_the_whole() -> None:
    by_new = {
        k.shape.new_tokens: k.flops
        for k in kernels()
        if k.name == "prefill_attention"
        and isinstance(k.shape, AttentionShape)
        and (k.shape.requests, k.shape.context_tokens) == (1, 2048)
    }
    first_half = next(
        k.flops
        for k in kernels()
        if isinstance(k.shape, AttentionShape)
        and (k.shape.requests, k.shape.context_tokens, k.shape.new_tokens) == (1, 1024, 1024)
    )
    assert by_new[1024] + first_half == pytest.approx(by_new[2048])


def test_ranks_share_heads_and_mlp() -> None:
    whole = {(k.shape.layer, k.shape.tokens): k.flops for k in kernels() if isinstance(k.shape, GemmShape)}
    part = {(k.shape.layer, k.shape.tokens): k.flops for k in kernels(4) if isinstance(k.shape, GemmShape)}
    assert {name: flops / 4 for name, flops in whole.items()} == part


@pytest.mark.parametrize(
    ("name", "ranks", "told"), [("deepseek-v3", 1, "grouped-query"), ("llama-3-8b", 3, "divisor")]
)
def test_shapes_that_cant_be_measured_are_refused(name: str, ranks: int, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        kernel_grid(named_shape(name), tensor_parallel_size=ranks, max_prompt=128, max_requests=1)


def test_an_expert_is_measured_as_one_mlp() -> None:
    mixtral = named_shape("mixtral-8x7b")
    assert mixtral.experts is not None
    narrow = replace(mixtral, experts=replace(mixtral.experts, ffn=999))
    grid = kernel_grid(narrow, tensor_parallel_size=1, max_prompt=128, max_requests=1)
    assert {k.shape.inner for k in grid if isinstance(k.shape, GemmShape) and k.shape.layer == "mlp out"} == {
        999
    }


def test_efficiency_is_the_share_of_the_roofline() -> None:
    said: list[str] = []
    times = time_kernels(kernels(), KnownTimer(), H100, said.append)
    assert {round(time.efficiency, 9) for time in times} == {0.5}
    bounds = {
        (t.kernel.name, t.kernel.shape.tokens): t.bound
        for t in times
        if isinstance(t.kernel.shape, GemmShape)
    }
    assert bounds["gemm", 1] == "memory"
    assert bounds["gemm", 2048] == "compute"
    assert said[-1] == f"{len(times)} of {len(times)} kernels"
    assert "50%" in kernels_table(times)


@pytest.mark.parametrize("share", [3.0, -1.0])
def test_an_impossible_time_is_another_gpu(share: float) -> None:
    with pytest.raises(ValueError, match="--hardware"):
        time_kernels(kernels(), KnownTimer(share), H100, lambda line: None)


def test_the_file_holds_every_kernel(tmp_path: Path) -> None:
    times = time_kernels(kernels(), KnownTimer(), H100, lambda line: None)
    path = tmp_path / "kernels.json"
    save_kernels(path, times, shape=LLAMA, ranks=2, hardware=H100, versions=KnownTimer().versions)
    document = json.loads(path.read_text())
    assert (document["model"], document["hardware"]) == ("llama-3-8b", "h100-80gb")
    assert document["tensor_parallel_size"] == 2
    assert len(document["kernels"]) == len(times)
    first = document["kernels"][0]
    assert set(first) == {"kernel", "shape", "time_s", "flops", "bytes", "efficiency", "bound"}
    assert first["flops"] / first["time_s"] <= H100.flops
