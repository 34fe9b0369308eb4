"""The instances that a router reaches, kept in the order of their outstanding tokens.

A decision among thousands of instances must not look at thousands: the order is kept up with every
reservation, so the least loaded ones are at hand.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from cluster.adapter_slots import AdapterSlots
from cluster.instance import InstanceInfo, InstanceState, Role
from cluster.request import ServeRequest
from cluster.wire import Blocks
from router.decode_batch import DecodeBatch
from router.prefix_index import Prefixes
from router.prompt_queue import PromptPool, PromptQueue
from router.view import ClusterView, InstanceView, Loaded, Reservations, View, as_value, cached_of

L = TypeVar("L", bound=Loaded)


@dataclass(slots=True, eq=False)
class Member(Generic[L]):
    """An instance, the way to it and what policies see of it."""

    info: InstanceInfo
    link: L
    view: InstanceView


class Fleet(Generic[L]):
    """The members, and the live `View` of those that are READY.

    Args:
        by_deadline: whether prefill instances compute prompts in the order of their deadlines.
        with_prefixes: whether it is known what their caches hold.
    """

    def __init__(self, *, by_deadline: bool = False, with_prefixes: bool = False) -> None:
        self._by_deadline = by_deadline
        self._prefixes = Prefixes() if with_prefixes else None
        self.reservations = Reservations(self._move)
        self._members: dict[str, Member[L]] = {}
        # (outstanding tokens, engine index, instance id) of the READY ones, in order.
        self._order: dict[Role, list[tuple[int, int, str]]] = {role: [] for role in Role}
        self._placed: dict[str, tuple[int, int, str]] = {}
        self._ready: dict[Role, tuple[InstanceView, ...] | None] = dict.fromkeys(Role)
        # The READY ones by node; as `_ready`, until somebody asks.
        self._by_node: dict[Role, dict[str, list[InstanceView]]] = {}
        self._bounds: dict[Role, dict[float, int]] = {role: {} for role in Role}
        self._pending = {role: PromptPool() for role in Role}

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._members

    @property
    def size(self) -> int:
        """Members."""
        return len(self._members)

    def get(self, instance_id: str) -> Member[L] | None:
        return self._members.get(instance_id)

    def count(self, role: Role, state: InstanceState) -> int:
        """Members of a role in a state."""
        if state is InstanceState.READY:
            return len(self._order[role])
        return sum(m.info.role is role and m.info.state is state for m in self._members.values())

    # --- they come and go

    def join(self, info: InstanceInfo, link: L) -> None:
        """An instance can be reached."""
        self._unplace(info.instance_id)
        self._retire(info.instance_id)
        view = InstanceView(
            info=info,
            link=link,
            prompts=PromptQueue(
                self._pending[info.role], by_deadline=self._by_deadline and info.role is Role.PREFILL
            ),
            decodes=DecodeBatch(self._bounds[info.role]),
        )
        if info.facts is not None:
            view.adapters = AdapterSlots(info.facts.max_loras, info.facts.max_cpu_loras)
        view.outstanding_tokens = self.reservations.tokens(info.instance_id)
        view.outstanding_requests = self.reservations.requests(info.instance_id)
        self._members[info.instance_id] = Member(info, link, view)
        self._place(info)

    def leave(self, instance_id: str) -> Member[L] | None:
        """It can't be reached any more; None when it was none of ours."""
        self._unplace(instance_id)
        self._retire(instance_id)
        if self._prefixes is not None:
            self._prefixes.forget(instance_id)
        return self._members.pop(instance_id, None)

    def update(self, info: InstanceInfo) -> bool:
        """News of a member; False when it is none of ours."""
        member = self._members.get(info.instance_id)
        if member is None:
            return False
        self._unplace(info.instance_id)
        member.info = member.view.info = info
        if info.state is not InstanceState.READY:
            member.view.leave_pool()
        self._place(info)
        return True

    def blocks_changed(self, instance_id: str, changes: Blocks) -> None:
        """A member's prefix cache has changed."""
        if self._prefixes is not None and (member := self._members.get(instance_id)) is not None:
            self._prefixes.changed(member.info, changes)

    # --- the view of the READY ones

    def of(self, role: Role) -> tuple[InstanceView, ...]:
        ready = self._ready[role]
        if ready is None:
            ordered = sorted(self._order[role], key=lambda entry: entry[1])
            ready = self._ready[role] = tuple(self._members[entry[2]].view for entry in ordered)
        return ready

    def by_tokens(self, role: Role) -> Iterator[InstanceView]:
        return (self._members[entry[2]].view for entry in self._order[role])

    def beside(self, instance: InstanceView, role: Role) -> Sequence[InstanceView]:
        by_node = self._by_node.get(role)
        if by_node is None:
            by_node = self._by_node[role] = {}
            for view in self.of(role):
                by_node.setdefault(view.info.node, []).append(view)
        return by_node.get(instance.info.node, ())

    def view_of(self, instance_id: str) -> InstanceView | None:
        """What policies see of a member."""
        member = self._members.get(instance_id)
        return None if member is None else member.view

    def bounds(self, role: Role) -> Mapping[float, int]:
        return self._bounds[role]

    def pending(self, role: Role) -> PromptPool:
        return self._pending[role]

    def cached(self, request: ServeRequest) -> Mapping[str, int]:
        return cached_of(self._prefixes, request)

    def without(self, instance_ids: frozenset[str]) -> View:
        return _Without(self, instance_ids)

    def snapshot(self) -> ClusterView:
        """The view as a value."""
        prefill, decode = (tuple(map(as_value, self.of(role))) for role in Role)
        return ClusterView(prefill=prefill, decode=decode, prefixes=self._prefixes)

    def _retire(self, instance_id: str) -> None:
        """What the member has to do is nobody's now."""
        if (member := self._members.get(instance_id)) is not None:
            member.view.leave_pool()

    # --- the order

    def _place(self, info: InstanceInfo) -> None:
        if info.state is InstanceState.READY:
            entry = (self.reservations.tokens(info.instance_id), info.engine_index, info.instance_id)
            insort(self._order[info.role], entry)
            self._placed[info.instance_id] = entry
            self._changed(info.role)

    def _unplace(self, instance_id: str) -> None:
        entry = self._placed.pop(instance_id, None)
        if entry is not None:
            role = self._members[instance_id].info.role
            order = self._order[role]
            del order[bisect_left(order, entry)]
            self._changed(role)

    def _changed(self, role: Role) -> None:
        """Others are READY."""
        self._ready[role] = None
        self._by_node.pop(role, None)

    def _move(self, instance_id: str) -> None:
        """Its reservations have changed."""
        member = self._members.get(instance_id)
        if member is None:
            return
        view = member.view
        view.outstanding_tokens = self.reservations.tokens(instance_id)
        view.outstanding_requests = self.reservations.requests(instance_id)
        before = self._placed.get(instance_id)
        if before is not None:
            order = self._order[member.info.role]
            del order[bisect_left(order, before)]
            entry = self._placed[instance_id] = (view.outstanding_tokens, *before[1:])
            insort(order, entry)


class _Without:
    """A view without some instances."""

    def __init__(self, view: View, instance_ids: frozenset[str]) -> None:
        self._view = view
        self._out = instance_ids

    def of(self, role: Role) -> tuple[InstanceView, ...]:
        instances = self._view.of(role)
        return tuple(v for v in instances if v.instance_id not in self._out) or instances

    def by_tokens(self, role: Role) -> Iterator[InstanceView]:
        left = (v for v in self._view.by_tokens(role) if v.instance_id not in self._out)
        for first in left:
            yield first
            yield from left
            return
        yield from self._view.by_tokens(role)

    def beside(self, instance: InstanceView, role: Role) -> Sequence[InstanceView]:
        return [v for v in self._view.beside(instance, role) if v.instance_id not in self._out]

    def bounds(self, role: Role) -> Mapping[float, int]:
        return self._view.bounds(role)

    def pending(self, role: Role) -> PromptPool:
        return self._view.pending(role)

    def cached(self, request: ServeRequest) -> Mapping[str, int]:
        return self._view.cached(request)

    def without(self, instance_ids: frozenset[str]) -> View:
        return _Without(self._view, self._out | instance_ids)
