"""The exchange of tokens with experts, beside what DeepEP's authors measured (docs/legacy.md there)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.expert_exchange import ExpertExchange
from cluster.hardware import hardware_named
from cluster.model_shape import named_shape

SHAPE = named_shape("deepseek-v3")
# NVLink at 160 GB/s and a NIC of 400 Gbit/s.
H800 = replace(hardware_named("h100"), nvlink_bytes_per_s=160e9, nic_bytes_per_s=50e9)
# GPUs: microseconds of dispatch and combine, one layer, 128 tokens of each GPU.
DIRECT_US = {8: 77 + 114, 16: 118 + 195, 32: 155 + 273, 64: 173 + 314, 128: 192 + 369, 256: 194 + 360}


@pytest.mark.parametrize("gpus", DIRECT_US)
def test_few_tokens_take_what_was_measured(gpus: int) -> None:
    layer_s = ExpertExchange(SHAPE, H800, 1, gpus).seconds(128) / SHAPE.moe_layers
    assert layer_s * 1e6 == pytest.approx(DIRECT_US[gpus], rel=0.17)


def test_many_tokens_go_once_to_each_node() -> None:
    exchange = ExpertExchange(SHAPE, H800, 1, 16)
    assert exchange.seconds(256) < exchange.seconds(8192) < 32 * exchange.seconds(256) / 2


def test_ranks_of_an_instance_share_its_tokens() -> None:
    one, two = (ExpertExchange(SHAPE, H800, ranks, 32 // ranks).seconds(128) for ranks in (1, 2))
    assert two == pytest.approx(one / 2)


@given(st.sampled_from([2, 8, 16, 64]), st.integers(1, 20_000), st.integers(0, 20_000))
def test_more_tokens_never_take_less(groups: int, tokens: int, more: int) -> None:
    exchange = ExpertExchange(SHAPE, H800, 1, groups)
    assert 0 < exchange.seconds(tokens) <= exchange.seconds(tokens + more)
