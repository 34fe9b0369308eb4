"""GPUs by name."""

from __future__ import annotations

import pytest

from cluster.errors import SpecError
from cluster.hardware import hardware_named

NAMES = ("a100-80gb", "h100-80gb", "h200-141gb", "b200-192gb", "l40s-48gb", "generic")


@pytest.mark.parametrize("name", NAMES)
def test_known_by_name_and_by_family(name: str) -> None:
    found = hardware_named(name)
    assert found.name == name
    assert hardware_named(name.partition("-")[0].upper()) is found


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_what_the_name_says(name: str) -> None:
    if name != "generic":
        said = float(name.partition("-")[2].removesuffix("gb"))
        assert 0.9 * said < hardware_named(name).memory_bytes / 2**30 <= said or name == "b200-192gb"


def test_b200_counts_in_powers_of_ten() -> None:
    assert hardware_named("b200").memory_bytes == pytest.approx(192e9, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_links_are_slower_than_memory_and_never_none(name: str) -> None:
    found = hardware_named(name)
    assert 0 < found.nic_bytes_per_s <= found.link_bytes_per_s < found.memory_bytes_per_s


def test_without_nvlink_the_link_is_pcie() -> None:
    l40s, h100 = hardware_named("l40s"), hardware_named("h100")
    assert l40s.link_bytes_per_s == l40s.pcie_bytes_per_s
    assert h100.link_bytes_per_s == h100.nvlink_bytes_per_s


def test_an_unknown_one_lists_the_known() -> None:
    with pytest.raises(SpecError) as caught:
        hardware_named("h1000")
    for name in NAMES:
        assert name in str(caught.value)
