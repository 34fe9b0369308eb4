"""Every byte of a request arrives once, from the right layer, head and token, whatever the layouts are."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kv_transfer.layout import KvLayout, LayoutError, Order
from kv_transfer.plan import Runs, make_plan

PLACE = 8
Memory = dict[tuple[int, int], NDArray[numpy.uint8]]
EMPTY = 0xFF


def _memory(layout: KvLayout) -> Memory:
    return {
        (rank, region): numpy.full(layout.region_bytes(rank), EMPTY, dtype=numpy.uint8)
        for rank in range(layout.ranks)
        for region in range(layout.regions_of(rank))
    }


def _place(layout: KvLayout, rank: int, key: tuple[int, int, int], blocks: list[int]) -> tuple[int, int]:
    """(region, offset) of a layer's head's token, from the axes' order alone."""
    layer, head, token = key
    layers, heads = layout.layers_of(rank), layout.heads_of(rank)
    index, slot, n, h = layers.index(layer), heads.index(head), layout.block_tokens, len(heads)
    block, within = blocks[token // n], token % n
    match layout.order:
        case Order.LBHNC:
            return index, ((block * h + slot) * n + within) * PLACE
        case Order.LBNHC:
            return index, ((block * n + within) * h + slot) * PLACE
        case Order.BLHNC:
            return 0, (((block * len(layers) + index) * h + slot) * n + within) * PLACE


def _content(layer: int, head: int, token: int) -> NDArray[numpy.uint8]:
    return numpy.array([layer, head, token % 256, token // 256, 1, 2, 3, 4], dtype=numpy.uint8)


def _fill(layout: KvLayout, blocks: list[int], tokens: int) -> Memory:
    memory = _memory(layout)
    for rank in range(layout.ranks):
        for layer in layout.layers_of(rank):
            for head in layout.heads_of(rank):
                for token in range(tokens):
                    region, at = _place(layout, rank, (layer, head, token), blocks)
                    memory[rank, region][at : at + PLACE] = _content(layer, head, token)
    return memory


def _copy(runs: Runs, source: Memory, target: Memory, written: Memory, pair: tuple[int, int]) -> None:
    for i in range(len(runs)):
        begin, size = int(runs.source_offset[i]), int(runs.size[i])
        to = int(runs.target_offset[i])
        key = pair[1], int(runs.target_region[i])
        assert (written[key][to : to + size] == EMPTY).all(), "written twice"
        written[key][to : to + size] = 0
        target[key][to : to + size] = source[pair[0], int(runs.source_region[i])][begin : begin + size]


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[KvLayout, KvLayout]:
    is_mla = draw(st.booleans())
    kv_heads = 1 if is_mla else draw(st.sampled_from([1, 2, 4, 8]))
    layers = draw(st.integers(1, 5))
    both = []
    for _ in range(2):
        both.append(
            KvLayout(
                layers=layers,
                kv_heads=kv_heads,
                place_bytes=PLACE,
                block_tokens=draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16])),
                blocks=30,
                order=draw(st.sampled_from(Order)),
                tensor_parallel=draw(st.sampled_from([1, 2, 4, 8])),
                pipeline_parallel=draw(st.integers(1, min(3, layers))),
                is_mla=is_mla,
            )
        )
    return both[0], both[1]


def _blocks_for(draw: st.DrawFn, layout: KvLayout, tokens: int) -> list[int]:
    ids = draw(st.permutations(range(layout.blocks)))
    return list(ids[: math.ceil(tokens / layout.block_tokens)])


@settings(max_examples=150, deadline=None)
@given(data=st.data(), both=_pairs(), wanted=st.integers(1, 30), skipped=st.integers(0, 29))
def test_every_byte_arrives_once_and_from_its_place(
    data: st.DataObject, both: tuple[KvLayout, KvLayout], wanted: int, skipped: int
) -> None:
    source, target = both
    plan = make_plan(source, target)
    begin = min(skipped, wanted - 1) // plan.unit_tokens * plan.unit_tokens
    # What is moved with the last tokens has content, too, as far as both have room.
    full = math.ceil(wanted / plan.unit_tokens) * plan.unit_tokens
    from_blocks = _blocks_for(data.draw, source, full)
    to_blocks = _blocks_for(data.draw, target, full)
    theirs, mine, written = _fill(source, from_blocks, full), _memory(target), _memory(target)

    for pair in plan.pairs:
        runs = plan.runs(pair, from_blocks, to_blocks, range(begin, wanted))
        _copy(runs, theirs, mine, written, pair)

    expected = _memory(target)
    for rank in range(target.ranks):
        for layer in target.layers_of(rank):
            for head in target.heads_of(rank):
                for token in range(begin, full):
                    region, at = _place(target, rank, (layer, head, token), to_blocks)
                    expected[rank, region][at : at + PLACE] = _content(layer, head, token)
    for key, memory in expected.items():
        assert (mine[key] == memory).all(), key


def _layout(**values: Any) -> KvLayout:
    usual: dict[str, Any] = {
        "layers": 4,
        "kv_heads": 8,
        "place_bytes": 256,
        "block_tokens": 16,
        "blocks": 100,
    }
    return KvLayout(**(usual | values))


def test_equal_layouts_move_whole_blocks_and_blocks_in_order_are_one_run() -> None:
    plan = make_plan(_layout(), _layout())
    runs = plan.runs((0, 0), [5, 6, 7, 20], [30, 31, 32, 33], range(64))
    block = _layout().block_bytes(0)
    assert plan.pairs == [(0, 0)]
    assert runs.size.tolist() == [3 * block, block] * 4  # each layer has its own memory


def test_heads_first_a_rank_of_two_reads_half_of_each_block_in_one_run() -> None:
    plan = make_plan(_layout(), _layout(tensor_parallel=2))
    assert plan.pairs == [(0, 0), (0, 1)]
    runs = plan.runs((0, 1), [3], [4], range(16))
    half = _layout().block_bytes(0) // 2
    assert runs.size.tolist() == [half] * 4
    assert runs.source_offset.tolist() == [3 * 2 * half + half] * 4


def test_tokens_first_a_rank_of_two_reads_token_by_token() -> None:
    plan = make_plan(_layout(order=Order.LBNHC), _layout(order=Order.LBNHC, tensor_parallel=2))
    assert plan.runs((0, 0), [0], [0], range(16)).size.tolist() == [4 * 256] * (16 * 4)


def test_readers_of_the_same_heads_are_spread_over_the_ranks_that_have_them() -> None:
    eight = _layout(kv_heads=2, tensor_parallel=8)
    assert make_plan(eight, eight).pairs == [(rank, rank) for rank in range(8)]
    assert make_plan(eight, _layout(kv_heads=2, tensor_parallel=2)).pairs == [(0, 0), (5, 1)]


def test_stages_exchange_only_the_layers_both_have() -> None:
    plan = make_plan(_layout(pipeline_parallel=2), _layout(stage_layers=(1, 3), pipeline_parallel=2))
    assert plan.pairs == [(0, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kv_heads": 6, "tensor_parallel": 4}, "6 KV heads can't be shared by 4"),
        ({"is_mla": True}, "give kv_heads=1"),
        ({"pipeline_parallel": 5}, "4 layers can't be split into 5 stages"),
        ({"pipeline_parallel": 2, "stage_layers": (1, 2)}, "add up to 4"),
        ({"block_tokens": 0}, "block_tokens is 0"),
    ],
)
def test_layouts_that_no_engine_has_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        _layout(**values)


def test_engines_of_two_models_have_no_plan() -> None:
    with pytest.raises(LayoutError, match="not of one model"):
        make_plan(_layout(), _layout(layers=5))


def test_tokens_without_blocks_and_from_within_a_unit_are_refused() -> None:
    plan = make_plan(_layout(), _layout(block_tokens=32))
    with pytest.raises(ValueError, match="need more than 2 blocks"):
        plan.runs((0, 0), [1, 2], [1, 2], range(33))
    with pytest.raises(ValueError, match="multiple of 16"):
        plan.runs((0, 0), [1, 2], [1], range(8, 32))
