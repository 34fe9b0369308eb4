"""Which node an instance runs on. Pure values, the same live and simulated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cluster.instance import Role
from cluster.spec import ClusterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where an instance runs: `gpus` of node number `node`, or whole nodes, `nodes` of them from `node`
    on."""

    instance_id: str
    node: int
    gpus: int
    nodes: int = 1

    def __post_init__(self) -> None:
        for name, least in (("node", 0), ("gpus", 1), ("nodes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{self.instance_id}: {name} is {getattr(self, name)}, expected >= {least}")


def place(
    counts: Mapping[str, int],
    gpus_per_instance: Mapping[str, int],
    gpus_per_node: int,
    *,
    mixed: bool = False,
    together: Mapping[str, int] | None = None,
) -> tuple[Placement, ...]:
    """Put `counts[role]` instances `role-0`, `role-1`, ... on nodes, roles in the order of `counts`.

    An instance goes to the first node with enough free GPUs; one larger than a node takes new nodes for
    itself, the last of them too if it needs only a part of it. Raises ValueError for a size below one or a
    missing role.

    Args:
        mixed: whether the roles take turns, by their counts, so that nodes have instances of each, as
            DistServe places for a slow network between nodes (OSDI'24, algorithm 2).
        together: by role, how many instances in a row compute together: on one node if they fit it, else on
            nodes of their own.
    """
    if gpus_per_node < 1:
        raise ValueError(f"gpus_per_node is {gpus_per_node}, expected at least 1")
    if missing := [role for role in counts if gpus_per_instance.get(role, 0) < 1]:
        raise ValueError(f"gpus_per_instance of {', '.join(missing)} is missing or below 1")
    placements: list[Placement] = []
    free: dict[int, int] = {}  # only nodes with room, so that the search doesn't grow with the cluster
    fresh = 0
    for role, index in _by_turns(counts) if mixed else _by_role(counts):
        gpus = gpus_per_instance[role]
        nodes = math.ceil(gpus / gpus_per_node)
        size = (together or {}).get(role, 1)
        if index % size:  # beside the one before it
            before = placements[-1].node
            node = before if free.get(before, 0) >= gpus else fresh
        else:
            need = min(gpus * size, gpus_per_node) if size > 1 else gpus
            node = next((n for n, room in free.items() if room >= need), fresh)
        placements.append(Placement(instance_id=f"{role}-{index}", node=node, gpus=gpus, nodes=nodes))
        if node == fresh:
            fresh += nodes
        if nodes == 1:
            free[node] = free.get(node, gpus_per_node) - gpus
            if not free[node]:
                del free[node]
    return tuple(placements)


def placements_of(spec: ClusterSpec) -> tuple[Placement, ...]:
    """Where the instances of a spec are in the simulator, and with `colocate` live too. Pools of different
    GPUs share no node."""
    roles = {str(role): spec.pool(role) for role in Role}
    counts = {name: pool.count for name, pool in roles.items()}
    ranks = {name: pool.ranks for name, pool in roles.items()}
    together = {name: pool.data_parallel_size for name, pool in roles.items()}
    if not spec.sim.is_mixed:
        per_node = gpus_per_node(spec, Role.PREFILL)
        return place(counts, ranks, per_node, mixed=spec.colocate is not None, together=together)
    placed: list[Placement] = []
    for role in Role:
        first = max((one.node + one.nodes for one in placed), default=0)
        alone = place({str(role): counts[role]}, ranks, gpus_per_node(spec, role), together=together)
        placed += (replace(one, node=first + one.node) for one in alone)
    return tuple(placed)


def sharing(spec: ClusterSpec) -> tuple[tuple[str, ...], ...]:
    """The instances of each node."""
    nodes: dict[int, list[str]] = {}
    for one in placements_of(spec):
        nodes.setdefault(one.node, []).append(one.instance_id)
    return tuple(map(tuple, nodes.values()))


def gpus_per_node(spec: ClusterSpec, role: Role) -> int:
    """Of a pool, as far as the spec says."""
    return spec.colocate or spec.sim.links_of(role).gpus_per_node


def _by_role(counts: Mapping[str, int]) -> Iterable[tuple[str, int]]:
    return ((role, index) for role, count in counts.items() for index in range(count))


def _by_turns(counts: Mapping[str, int]) -> Iterable[tuple[str, int]]:
    """Each role evenly over the whole order; of those that are due at once the earlier role first."""
    due = [
        ((index + 0.5) / count, number, role, index)
        for number, (role, count) in enumerate(counts.items())
        for index in range(count)
    ]
    return ((role, index) for _, _, role, index in sorted(due))
