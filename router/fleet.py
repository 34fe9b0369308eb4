"""The instances that a router reaches, kept in the order of their outstanding tokens.

A decision among thousands of instances must not look at thousands: the order is kept up with every
reservation, so the least loaded ones are at hand.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from cluster.instance import InstanceInfo, InstanceLoad, InstanceState, Role
from router.view import ClusterView, InstanceView, Reservations, View


class Loaded(Protocol):
    """The way to an instance, as far as a view needs it."""

    load: InstanceLoad


L = TypeVar("L", bound=Loaded)


@dataclass(slots=True, eq=False)
class Member(Generic[L]):
    """An instance and the way to it."""

    info: InstanceInfo
    link: L


class Fleet(Generic[L]):
    """The members, and the live `View` of those that are READY."""

    def __init__(self) -> None:
        self.reservations = Reservations(self._move)
        self._members: dict[str, Member[L]] = {}
        # (outstanding tokens, engine index, instance id) of the READY ones, in order.
        self._order: dict[Role, list[tuple[int, int, str]]] = {role: [] for role in Role}
        self._placed: dict[str, tuple[int, int, str]] = {}

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
        self._members[info.instance_id] = Member(info, link)
        self._place(info)

    def leave(self, instance_id: str) -> Member[L] | None:
        """It can't be reached any more; None when it was none of ours."""
        self._unplace(instance_id)
        return self._members.pop(instance_id, None)

    def update(self, info: InstanceInfo) -> bool:
        """News of a member; False when it is none of ours."""
        member = self._members.get(info.instance_id)
        if member is None:
            return False
        self._unplace(info.instance_id)
        member.info = info
        self._place(info)
        return True

    # --- the view of the READY ones

    def of(self, role: Role) -> tuple[InstanceView, ...]:
        ordered = sorted(self._order[role], key=lambda entry: entry[1])
        return tuple(self._view(entry) for entry in ordered)

    def by_tokens(self, role: Role) -> Iterator[InstanceView]:
        return (self._view(entry) for entry in self._order[role])

    def without(self, instance_ids: frozenset[str]) -> View:
        return _Without(self, instance_ids)

    def snapshot(self) -> ClusterView:
        """The view as a value."""
        return ClusterView(prefill=self.of(Role.PREFILL), decode=self.of(Role.DECODE))

    def _view(self, entry: tuple[int, int, str]) -> InstanceView:
        tokens, _, instance_id = entry
        member = self._members[instance_id]
        return InstanceView(
            info=member.info,
            outstanding_tokens=tokens,
            outstanding_requests=self.reservations.requests(instance_id),
            load=member.link.load,
        )

    # --- the order

    def _place(self, info: InstanceInfo) -> None:
        if info.state is InstanceState.READY:
            entry = (self.reservations.tokens(info.instance_id), info.engine_index, info.instance_id)
            insort(self._order[info.role], entry)
            self._placed[info.instance_id] = entry

    def _unplace(self, instance_id: str) -> None:
        entry = self._placed.pop(instance_id, None)
        if entry is not None:
            order = self._order[self._members[instance_id].info.role]
            del order[bisect_left(order, entry)]

    def _move(self, instance_id: str) -> None:
        if instance_id in self._placed:
            self._unplace(instance_id)
            self._place(self._members[instance_id].info)


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

    def without(self, instance_ids: frozenset[str]) -> View:
        return _Without(self._view, self._out | instance_ids)
