from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import Placement
from kv_transfer.topology import LinkRates, Topology, exposed_bytes

NVLINK = LinkRates(nic_bytes_per_s=50.0, nvlink_bytes_per_s=450.0)


def placed(*where: tuple[str, int, int], nodes: int = 1) -> list[Placement]:
    return [Placement(instance_id=name, node=node, gpus=gpus, nodes=nodes) for name, node, gpus in where]


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


def test_each_instance_has_the_links_of_its_own_gpus() -> None:
    rates = {"p": NVLINK, "d": LinkRates(nic_bytes_per_s=12.5, pcie_bytes_per_s=32.0)}
    topology = Topology(placed(("p", 0, 2), ("d", 1, 4)), rates)
    assert topology.path("p", "d") == ("p/nic-out", "d/nic-in", "d/pcie-in")
    assert topology.path("d", "p") == ("d/pcie-out", "d/nic-out", "p/nic-in")
    assert topology.path_bytes_per_s("p", "d") == 4 * 12.5
    assert topology.links_of("d") == ("d/nic-out", "d/nic-in", "d/pcie-out", "d/pcie-in")


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
