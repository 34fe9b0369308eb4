"""Who is in the cluster. Pure: the controller owns one, feeds it events and publishes its snapshots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.errors import IncompatiblePeer
from cluster.instance import EngineFacts, Fingerprint, InstanceInfo, InstanceState, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """A snapshot; `version` grows with every change, so a watcher can ask for what is newer."""

    version: int
    instances: tuple[InstanceInfo, ...]

    def ready(self, role: Role) -> tuple[InstanceInfo, ...]:
        """READY instances of a role, in the order of the spec."""
        return tuple(i for i in self.instances if i.role is role and i.state is InstanceState.READY)


class Registry:
    """The places of a spec and the life each is in.

    The first engine to become READY sets the cluster's fingerprint; one that differs is refused at
    registration (`IncompatiblePeer`), not at its first request. When no READY life is left the next one
    sets it anew, so a cluster can be rolled to another model version through zero.
    """

    def __init__(self, places: Iterable[tuple[str, Role]]) -> None:
        self._instances = {
            instance_id: InstanceInfo(instance_id=instance_id, role=role, engine_index=index)
            for index, (instance_id, role) in enumerate(places)
        }
        self._version = 0

    def snapshot(self) -> Membership:
        return Membership(version=self._version, instances=tuple(self._instances.values()))

    def get(self, instance_id: str) -> InstanceInfo:
        return self._instances[instance_id]

    @property
    def fingerprint(self) -> Fingerprint | None:
        """What the READY and DRAINING instances agree on; None when there are none."""
        for info in self._instances.values():
            if info.state in (InstanceState.READY, InstanceState.DRAINING) and info.facts is not None:
                return info.facts.fingerprint
        return None

    def starting(self, instance_id: str, *, incarnation: str, detail: str = "") -> None:
        """A new life begins in this place."""
        fresh = InstanceInfo(
            instance_id=instance_id,
            role=self._instances[instance_id].role,
            engine_index=self._instances[instance_id].engine_index,
            incarnation=incarnation,
            detail=detail,
        )
        self._put(fresh)

    def progress(self, instance_id: str, *, incarnation: str, detail: str) -> None:
        """What a STARTING life is doing now; ignored when that life is over."""
        if (info := self._current(instance_id, incarnation)) and info.state is InstanceState.STARTING:
            self._put(replace(info, detail=detail))

    def register(
        self, instance_id: str, *, incarnation: str, address: str, node: str, pid: int, facts: EngineFacts
    ) -> None:
        """The life is READY.

        Raises:
            IncompatiblePeer: its fingerprint differs from that of the instances already READY.
        """
        if (info := self._current(instance_id, incarnation)) is None:
            return
        ours = self.fingerprint
        if ours is not None and ours != facts.fingerprint:
            raise IncompatiblePeer(ours=ours, theirs=facts.fingerprint, instance=instance_id)
        self._put(
            replace(
                info, state=InstanceState.READY, address=address, node=node, pid=pid, facts=facts, detail=""
            )
        )

    def draining(self, instance_id: str) -> None:
        """The place takes no new requests."""
        info = self._instances[instance_id]
        if info.state is InstanceState.READY:
            self._put(replace(info, state=InstanceState.DRAINING))

    def gone(self, instance_id: str, *, incarnation: str, detail: str, hopeless: str = "") -> None:
        """The life is over; an event about an earlier life changes nothing."""
        if (info := self._current(instance_id, incarnation)) and info.state is not InstanceState.GONE:
            self._put(replace(info, state=InstanceState.GONE, address="", detail=detail, hopeless=hopeless))

    def _current(self, instance_id: str, incarnation: str) -> InstanceInfo | None:
        info = self._instances[instance_id]
        return info if info.incarnation == incarnation else None

    def _put(self, info: InstanceInfo) -> None:
        self._instances[info.instance_id] = info
        self._version += 1
