"""Which links a KV transfer between two instances takes, and how fast each link is. Pure values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from cluster.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRates:
    """Bandwidths in bytes per second and direction; `node_nic_bytes_per_s` is per node, the rest per GPU.

    Attributes:
        nic_bytes_per_s: between nodes.
        nvlink_bytes_per_s: within a node; 0 for GPUs without NVLink, whose traffic all goes over PCIe.
        pcie_bytes_per_s: GPU to host; needed only where there is no NVLink.
        node_nic_bytes_per_s: what all instances of a node can send (and receive) together; None for no cap.
    """

    nic_bytes_per_s: float
    nvlink_bytes_per_s: float = 0.0
    pcie_bytes_per_s: float = 0.0
    node_nic_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(
                    f"{field.name} is {value!r}, expected a finite number of bytes per second >= 0"
                )
        if not self.nic_bytes_per_s or self.node_nic_bytes_per_s == 0:
            raise ValueError("the NIC has no bandwidth: give nic_bytes_per_s (and a node's cap) above 0")
        if not self.nvlink_bytes_per_s and not self.pcie_bytes_per_s:
            raise ValueError(
                "nvlink_bytes_per_s is 0: give pcie_bytes_per_s, which then carries the transfers"
            )

    @property
    def inside(self) -> str:
        """What carries a transfer within a node: `nvlink` or `pcie`."""
        return "nvlink" if self.nvlink_bytes_per_s else "pcie"


class Topology:
    """The links of a cluster, one direction each, named after what owns them.

    `prefill-0/nic-out` and `/nic-in` carry what `prefill-0` exchanges with other nodes, `/nvlink-out` and
    `/nvlink-in` what it exchanges within its node, `node-3/nic-out` and `/nic-in` are a node's cap. Without
    NVLink, `/pcie-out` and `/pcie-in` carry both.

    Attributes:
        links: capacity of every link, in bytes per second.
    """

    def __init__(self, placements: Iterable[Placement], rates: LinkRates | Mapping[str, LinkRates]) -> None:
        """Raises ValueError for two placements of one instance, and for one on a spanning instance's node.

        Args:
            rates: of all instances, or of each by its id.
        """
        self._placements: dict[str, Placement] = {}
        self._rates: dict[str, LinkRates] = {}
        self.links: dict[str, float] = {}
        for placement in placements:
            if placement.instance_id in self._placements:
                raise ValueError(f"instance {placement.instance_id} is placed twice")
            self._placements[placement.instance_id] = placement
            of_it = rates if isinstance(rates, LinkRates) else rates[placement.instance_id]
            self._rates[placement.instance_id] = of_it
            self._add_links(placement, of_it)
        self._refuse_shared_nodes()

    def path(self, source: str, target: str) -> tuple[str, ...]:
        """Names of the links that bytes from `source` to `target` take. Raises ValueError for unknown or
        equal."""
        if source == target:
            raise ValueError(f"{source} can't send KV to itself: a transfer needs two instances")
        a, b = self._placement(source), self._placement(target)
        inside = self._rates[source].inside, self._rates[target].inside
        inside_out, inside_in = f"{source}/{inside[0]}-out", f"{target}/{inside[1]}-in"
        if a.node == b.node:
            return inside_out, inside_in
        path = [inside_out] * (inside[0] == "pcie") + [f"{source}/nic-out"]
        path += [f"node-{a.node}/nic-out"] * (f"node-{a.node}/nic-out" in self.links)
        path += [f"node-{b.node}/nic-in"] * (f"node-{b.node}/nic-in" in self.links)
        path += [f"{target}/nic-in"] + [inside_in] * (inside[1] == "pcie")
        return tuple(path)

    def path_bytes_per_s(self, source: str, target: str) -> float:
        """What a transfer gets that is alone on its path. Raises ValueError as `path` does."""
        return min(self.links[name] for name in self.path(source, target))

    def links_of(self, instance_id: str) -> tuple[str, ...]:
        """Names of the links that the instance owns. Raises ValueError for an unknown one."""
        self._placement(instance_id)
        kinds = "nic", self._rates[instance_id].inside
        return tuple(f"{instance_id}/{kind}-{way}" for kind in kinds for way in ("out", "in"))

    def _placement(self, instance_id: str) -> Placement:
        try:
            return self._placements[instance_id]
        except KeyError:
            raise ValueError(
                f"instance {instance_id!r} is not placed; there are {len(self._placements)}: "
                f"{', '.join(list(self._placements)[:8])}{', ...' if len(self._placements) > 8 else ''}"
            ) from None

    def _add_links(self, placement: Placement, rates: LinkRates) -> None:
        nic = placement.gpus * rates.nic_bytes_per_s
        if rates.node_nic_bytes_per_s is not None:
            # A spanning instance has its nodes for itself, so their caps are its own.
            nic = min(nic, placement.nodes * rates.node_nic_bytes_per_s)
        inside = placement.gpus * (rates.nvlink_bytes_per_s or rates.pcie_bytes_per_s)
        for way in ("out", "in"):
            self.links[f"{placement.instance_id}/nic-{way}"] = nic
            self.links[f"{placement.instance_id}/{rates.inside}-{way}"] = inside
            if rates.node_nic_bytes_per_s is not None and placement.nodes == 1:
                self.links[f"node-{placement.node}/nic-{way}"] = rates.node_nic_bytes_per_s

    def _refuse_shared_nodes(self) -> None:
        owner: dict[int, Placement] = {}
        for placement in self._placements.values():
            for node in range(placement.node, placement.node + placement.nodes):
                other = owner.setdefault(node, placement)
                if other is not placement and max(other.nodes, placement.nodes) > 1:
                    raise ValueError(
                        f"{placement.instance_id} and {other.instance_id} share node {node}, but an instance "
                        "over several nodes needs them for itself"
                    )


def exposed_bytes(
    total_bytes: float, last_chunk_bytes: float, since_first_chunk_s: float, rate_bytes_per_s: float
) -> float:
    """Bytes still to be moved when a prefill ends whose chunks were sent as each was finished.

    The last chunk can't have left yet; of the others, `since_first_chunk_s` seconds (from the end of the
    first chunk to the end of the prefill) at `rate_bytes_per_s` are gone. A prefill of one chunk has 0
    seconds and exposes all. Raises ValueError for a negative or infinite argument.
    """
    for name, value in (
        ("total_bytes", total_bytes),
        ("last_chunk_bytes", last_chunk_bytes),
        ("since_first_chunk_s", since_first_chunk_s),
        ("rate_bytes_per_s", rate_bytes_per_s),
    ):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}, expected a finite number >= 0")
    return min(total_bytes, max(last_chunk_bytes, total_bytes - rate_bytes_per_s * since_first_chunk_s))
