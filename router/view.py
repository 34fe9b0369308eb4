"""What a policy sees: the READY instances, with the router's own reservations in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.instance import InstanceInfo, InstanceLoad, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceView:
    """One READY instance.

    Attributes:
        outstanding_tokens: tokens this router has sent it and that have not ended yet. The router's own
            count, so two picks in a row see each other; the reported load lags behind.
        outstanding_requests: the requests they belong to.
        load: what the instance last said of itself.
    """

    info: InstanceInfo
    outstanding_tokens: int
    outstanding_requests: int
    load: InstanceLoad

    @property
    def instance_id(self) -> str:
        return self.info.instance_id


class View(Protocol):
    """The READY instances at the time of a decision. A policy that must look at a cluster of any size in
    little time asks for the least loaded ones, not for all."""

    def of(self, role: Role) -> tuple[InstanceView, ...]:
        """All of a role, in the order of the spec."""
        ...

    def by_tokens(self, role: Role) -> Iterator[InstanceView]:
        """Those of a role from the fewest outstanding tokens on; ties in the order of the spec."""
        ...

    def without(self, instance_ids: frozenset[str]) -> View:
        """The view without some instances; a role of which nothing would be left is kept whole."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """A view as a value: a snapshot, each role in the order of the spec."""

    prefill: tuple[InstanceView, ...]
    decode: tuple[InstanceView, ...]

    def of(self, role: Role) -> tuple[InstanceView, ...]:
        return self.prefill if role is Role.PREFILL else self.decode

    def by_tokens(self, role: Role) -> Iterator[InstanceView]:
        return iter(sorted(self.of(role), key=lambda v: (v.outstanding_tokens, v.info.engine_index)))

    def without(self, instance_ids: frozenset[str]) -> ClusterView:
        def keep(views: tuple[InstanceView, ...]) -> tuple[InstanceView, ...]:
            return tuple(v for v in views if v.instance_id not in instance_ids) or views

        return ClusterView(prefill=keep(self.prefill), decode=keep(self.decode))


class Hold:
    """A reservation: a context manager, or released by hand; twice is as good as once."""

    __slots__ = ("_instance_id", "_reservations", "_tokens")

    def __init__(self, reservations: Reservations, instance_id: str, tokens: int) -> None:
        self._reservations: Reservations | None = reservations
        self._instance_id = instance_id
        self._tokens = tokens
        reservations.add(instance_id, tokens, 1)

    def release(self) -> None:
        """Give the room back."""
        reservations, self._reservations = self._reservations, None
        if reservations is not None:
            reservations.add(self._instance_id, -self._tokens, -1)

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Reservations:
    """Tokens and requests that this router has under way on each instance.

    Args:
        on_change: told the instance whose counts have changed.
    """

    def __init__(self, on_change: Callable[[str], None] = lambda instance_id: None) -> None:
        self._tokens: dict[str, int] = {}
        self._requests: dict[str, int] = {}
        self._on_change = on_change

    def tokens(self, instance_id: str) -> int:
        return self._tokens.get(instance_id, 0)

    def requests(self, instance_id: str) -> int:
        return self._requests.get(instance_id, 0)

    def hold(self, instance_id: str, tokens: int) -> Hold:
        """Count `tokens` and one request on an instance until the hold is released."""
        return Hold(self, instance_id, tokens)

    def outstanding(self) -> Mapping[str, int]:
        """Tokens by instance, without those that have none."""
        return dict(self._tokens)

    def add(self, instance_id: str, tokens: int, requests: int) -> None:
        """Count more, or less, there."""
        self._tokens[instance_id] = self._tokens.get(instance_id, 0) + tokens
        self._requests[instance_id] = self._requests.get(instance_id, 0) + requests
        if self._requests[instance_id] == 0:
            del self._requests[instance_id], self._tokens[instance_id]
        self._on_change(instance_id)
