"""Which node an instance runs on."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import SpecError
from cluster.placement import Placement, place, placements_of, sharing
from cluster.spec import ClusterSpec, parse_spec
from kv_transfer.topology import LinkRates, Topology

NVLINK = LinkRates(nic_bytes_per_s=50.0, nvlink_bytes_per_s=450.0)


def nodes_of(placements: tuple[Placement, ...]) -> list[tuple[str, int, int]]:
    return [(p.instance_id, p.node, p.nodes) for p in placements]


def test_instances_fill_the_nodes_in_the_order_of_the_spec() -> None:
    placements = place({"prefill": 3, "decode": 3}, {"prefill": 2, "decode": 4}, 8)
    assert nodes_of(placements) == [
        ("prefill-0", 0, 1),
        ("prefill-1", 0, 1),
        ("prefill-2", 0, 1),
        ("decode-0", 1, 1),
        ("decode-1", 1, 1),
        ("decode-2", 2, 1),
    ]


def test_a_later_small_instance_takes_the_room_a_larger_one_left() -> None:
    placements = place({"prefill": 2, "decode": 1}, {"prefill": 6, "decode": 2}, 8)
    assert nodes_of(placements)[-1] == ("decode-0", 0, 1)


def test_an_instance_larger_than_a_node_has_whole_nodes_for_itself() -> None:
    placements = place({"prefill": 1, "decode": 1, "spare": 1}, {"prefill": 4, "decode": 20, "spare": 4}, 8)
    assert nodes_of(placements) == [("prefill-0", 0, 1), ("decode-0", 1, 3), ("spare-0", 0, 1)]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=4), st.integers(1, 8))
def test_no_node_holds_more_than_it_has_and_a_topology_takes_every_placement(
    pools: list[tuple[int, int]], gpus_per_node: int
) -> None:
    counts = {f"pool{i}": count for i, (count, _) in enumerate(pools)}
    placements = place(counts, {f"pool{i}": gpus for i, (_, gpus) in enumerate(pools)}, gpus_per_node)
    assert len(placements) == sum(counts.values())
    held: Counter[int] = Counter()
    for p in placements:
        assert p.nodes == math.ceil(p.gpus / gpus_per_node)
        for node in range(p.node, p.node + p.nodes):
            held[node] += p.gpus if p.nodes == 1 else gpus_per_node
    assert all(gpus <= gpus_per_node for gpus in held.values())
    assert sorted(held) == list(range(len(held)))
    Topology(placements, NVLINK)


@pytest.mark.parametrize(
    ("gpus", "per_node", "says"), [({"a": 1}, 0, "gpus_per_node"), ({}, 8, "of a"), ({"a": 0}, 8, "of a")]
)
def test_a_size_that_is_none_is_refused(gpus: dict[str, int], per_node: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        place({"a": 1}, gpus, per_node)


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_mixed_nodes_have_the_same_instances_on_as_few_nodes(
    p: int, d: int, p_gpus: int, d_gpus: int
) -> None:
    counts, gpus = {"prefill": p, "decode": d}, {"prefill": p_gpus, "decode": d_gpus}
    apart, mixed = place(counts, gpus, 8), place(counts, gpus, 8, mixed=True)
    assert {(one.instance_id, one.gpus) for one in apart} == {(one.instance_id, one.gpus) for one in mixed}
    held: Counter[int] = Counter()
    for one in mixed:
        held[one.node] += one.gpus
    assert max(held.values()) <= 8
    # Sizes that divide a node leave no holes that another order would have used.
    assert len(held) <= len({one.node for one in apart}) + 1


def test_mixed_nodes_have_both_roles_in_their_ratio() -> None:
    mixed = place({"prefill": 6, "decode": 3}, {"prefill": 2, "decode": 4}, 8, mixed=True)
    by_node: dict[int, Counter[str]] = {}
    for one in mixed:
        by_node.setdefault(one.node, Counter())[one.instance_id.partition("-")[0]] += 1
    assert by_node == {node: {"prefill": 2, "decode": 1} for node in range(3)}


def spec_of(**more: Any) -> ClusterSpec:
    pools = {"prefill": {"count": 2, "tensor_parallel_size": 2}, "decode": {"count": 2}}
    return parse_spec({"model": "llama-3-8b", **pools, **more})


def test_a_spec_says_who_shares_a_node() -> None:
    assert sharing(spec_of()) == (("prefill-0", "prefill-1", "decode-0", "decode-1"),)
    assert sharing(spec_of(colocate=3)) == (("prefill-0", "decode-0"), ("prefill-1", "decode-1"))
    network = {"network": {"gpus_per_node": 4}}
    assert sharing(spec_of(sim=network)) == (("prefill-0", "prefill-1"), ("decode-0", "decode-1"))


def test_pools_of_different_gpus_share_no_node() -> None:
    mixed = spec_of(sim={"hardware": {"prefill": "h100", "decode": "a100"}})
    assert [(one.instance_id, one.node) for one in placements_of(mixed)] == [
        ("prefill-0", 0),
        ("prefill-1", 0),
        ("decode-0", 1),
        ("decode-1", 1),
    ]
    with pytest.raises(SpecError, match="different GPUs"):
        spec_of(colocate=8, sim={"hardware": {"prefill": "h100", "decode": "a100"}})
    with pytest.raises(SpecError, match="names none for decode"):
        spec_of(sim={"hardware": {"prefill": "h100"}})
    with pytest.raises(SpecError, match="all of them on one node"):
        spec_of(colocate=1)


def test_a_group_that_fits_a_node_is_on_one() -> None:
    counts, sizes = {"prefill": 3, "decode": 8}, {"prefill": 2, "decode": 1}
    placed = nodes_of(place(counts, sizes, 8, together={"decode": 8}))
    assert {node for name, node, _ in placed if name.startswith("decode")} == {1}


def test_a_group_larger_than_a_node_begins_on_a_new_one_and_leaves_what_it_does_not_need() -> None:
    sizes = {"decode": 2, "prefill": 1}
    placed = nodes_of(place({"decode": 6, "prefill": 3}, sizes, 8, together={"decode": 6}))
    assert [node for name, node, _ in placed if name.startswith("decode")] == [0, 0, 0, 0, 1, 1]
    assert [node for name, node, _ in placed if name.startswith("prefill")] == [1, 1, 1]


def test_groups_are_not_colocated() -> None:
    with pytest.raises(SpecError, match="data-parallel group are beside each other instead"):
        parse_spec({"model": "m", "colocate": 8, "decode": {"count": 2, "data_parallel_size": 2}})
