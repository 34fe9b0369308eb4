from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.topology import LinkRates, Placement, Topology, exposed_bytes, place

NVLINK = LinkRates(nic_bytes_per_s=50.0, nvlink_bytes_per_s=450.0)


def placed(*where: tuple[str, int, int], nodes: int = 1) -> list[Placement]:
    return [Placement(instance_id=name, node=node, gpus=gpus, nodes=nodes) for name, node, gpus in where]


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


def test_within_a_node_nvlink_between_nodes_the_nic() -> None:
    topology = Topology(placed(("p", 0, 4), ("d", 0, 2), ("e", 1, 8)), NVLINK)
    assert topology.path("p", "d") == ("p/nvlink-out", "d/nvlink-in")
    assert topology.path_bytes_per_s("p", "d") == 2 * 450
    assert topology.path("p", "e") == ("p/nic-out", "e/nic-in")
    assert topology.path_bytes_per_s("p", "e") == 4 * 50
    assert topology.links_of("d") == ("d/nic-out", "d/nic-in", "d/nvlink-out", "d/nvlink-in")
    assert set(topology.links_of("d")) < set(topology.links)


def test_without_nvlink_pcie_carries_both() -> None:
    rates = LinkRates(nic_bytes_per_s=50.0, pcie_bytes_per_s=32.0)
    topology = Topology(placed(("p", 0, 1), ("d", 0, 2), ("e", 1, 1)), rates)
    assert topology.path("p", "d") == ("p/pcie-out", "d/pcie-in")
    assert topology.path("p", "e") == ("p/pcie-out", "p/nic-out", "e/nic-in", "e/pcie-in")
    assert topology.path_bytes_per_s("p", "e") == 32
    assert topology.links_of("p") == ("p/nic-out", "p/nic-in", "p/pcie-out", "p/pcie-in")


def test_a_nodes_cap_holds_for_all_its_instances_together() -> None:
    rates = LinkRates(nic_bytes_per_s=50.0, nvlink_bytes_per_s=450.0, node_nic_bytes_per_s=60.0)
    topology = Topology(placed(("p", 0, 2), ("q", 0, 2), ("d", 1, 8)), rates)
    assert topology.path("p", "d") == ("p/nic-out", "node-0/nic-out", "node-1/nic-in", "d/nic-in")
    assert topology.path("q", "d")[1] == "node-0/nic-out"
    assert topology.path("p", "q") == ("p/nvlink-out", "q/nvlink-in")
    assert topology.links["node-0/nic-out"] == 60


def test_a_spanning_instance_has_its_nodes_caps_for_itself() -> None:
    rates = LinkRates(nic_bytes_per_s=50.0, nvlink_bytes_per_s=450.0, node_nic_bytes_per_s=60.0)
    topology = Topology([*placed(("p", 0, 16), nodes=2), *placed(("d", 2, 1))], rates)
    assert topology.path("p", "d") == ("p/nic-out", "node-2/nic-in", "d/nic-in")
    assert topology.links["p/nic-out"] == 120


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="placed twice"):
        Topology(placed(("p", 0, 1), ("p", 1, 1)), NVLINK)
    with pytest.raises(ValueError, match="share node 1"):
        Topology([*placed(("p", 0, 16), nodes=2), *placed(("d", 1, 1))], NVLINK)
    topology = Topology(placed(("p", 0, 1), ("d", 0, 1)), NVLINK)
    with pytest.raises(ValueError, match="'x' is not placed; there are 2: p, d"):
        topology.path("p", "x")
    with pytest.raises(ValueError, match="two instances"):
        topology.path("p", "p")
    with pytest.raises(ValueError, match="gpus is 0"):
        placed(("p", 0, 0))


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        ({"nic_bytes_per_s": 0.0, "nvlink_bytes_per_s": 1.0}, "NIC"),
        ({"nic_bytes_per_s": 1.0}, "pcie_bytes_per_s"),
        ({"nic_bytes_per_s": 1.0, "nvlink_bytes_per_s": -1.0}, "nvlink_bytes_per_s is -1.0"),
        ({"nic_bytes_per_s": math.inf, "nvlink_bytes_per_s": 1.0}, "nic_bytes_per_s is inf"),
        ({"nic_bytes_per_s": 1.0, "nvlink_bytes_per_s": 1.0, "node_nic_bytes_per_s": 0.0}, "cap"),
    ],
)
def test_rates_that_carry_nothing_are_refused(rates: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LinkRates(**rates)


@pytest.mark.parametrize(
    ("total", "last", "since_s", "exposed"),
    [
        (1000, 1000, 0, 1000),  # one chunk
        (1000, 250, 3, 700),  # the link is slower than the prefill
        (1000, 250, 30, 250),  # and faster
        (1000, 250, 0, 1000),
        (100, 250, 3, 100),
        (0, 0, 3, 0),
    ],
)
def test_what_the_overlap_leaves(total: float, last: float, since_s: float, exposed: float) -> None:
    assert exposed_bytes(total, last, since_s, 100.0) == exposed


bytes_ = st.floats(0, 1e12)


@given(bytes_, bytes_, st.floats(0, 1e3), st.floats(0, 1e12))
def test_the_overlap_never_exposes_more_than_all_nor_less_than_the_last_chunk(
    total: float, last: float, since_s: float, rate: float
) -> None:
    exposed = exposed_bytes(total, last, since_s, rate)
    assert min(total, last) <= exposed <= total
    assert exposed_bytes(total, last, since_s, 2 * rate) <= exposed


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("position", range(4))
def test_an_overlap_of_nonsense_is_refused(position: int, bad: float) -> None:
    arguments = [1.0, 1.0, 1.0, 1.0]
    arguments[position] = bad
    with pytest.raises(ValueError, match="expected a finite number"):
        exposed_bytes(*arguments)
