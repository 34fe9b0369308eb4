"""vLLM's LoRA operations for CPUs, put right."""

from __future__ import annotations

import pytest

from cluster import vllm_api
from cluster.vllm_cpu_lora import skip_tokens_without_adapter

pytestmark = pytest.mark.vllm


def test_tokens_without_an_adapter_get_none() -> None:
    import torch
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    skip_tokens_without_adapter()
    skip_tokens_without_adapter()
    weights = torch.arange(1.0, 1.0 + 2 * 3 * 4).view(2, 1, 3, 4)  # slots, rank, width
    inputs, indices = torch.ones(3, 4), torch.tensor([0, -1, 1])
    expected = torch.stack([2 * weights[0, 0].sum(1), torch.zeros(3), 2 * weights[1, 0].sum(1)])
    output = torch.zeros(3, 3)
    punica_cpu.bgmv_shrink(inputs, weights, output, indices, 2.0)
    assert torch.equal(output, expected)
    output = torch.zeros(3, 3)
    ones = torch.ones(3, dtype=torch.long)
    lora_ops.sgmv_shrink(inputs, weights, output, ones, ones, indices, 3, 1, 3, 2.0)
    assert torch.equal(output, expected)
    stock = torch.zeros(3, 3)
    vllm_api.bgmv_shrink(inputs, weights, stock, indices, 2.0)
    # With a vLLM where this fails, there is nothing to put right any more.
    assert not torch.equal(stock, expected)
