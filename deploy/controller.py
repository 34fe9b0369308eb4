"""The controller's heart: keeps every place of the spec filled with a running life, and says who is there.

Free of Ray: it starts workers through a `Launcher`. Events come in, the registry changes, watchers wake.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from cluster.errors import EnvironmentProblem, IncompatiblePeer, ServingError, SpecError, UnknownInstance
from cluster.instance import GroupRank, InstanceState, Role
from cluster.registry import Membership, Registry
from cluster.spec import ClusterSpec
from cluster.worker import DRAINED, Ready

logger = logging.getLogger(__name__)

# Pauses before a life that ended is followed by another, in seconds; the last one repeats.
RESTART_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
# A life this long wipes the slate of the ones that failed before it.
HEALTHY_S = 60.0

# For the others of a group to stop when the first of them has.
STOP_S = 10.0

# Starting again would end the same way.
_HOPELESS = (SpecError, EnvironmentProblem, IncompatiblePeer)


class WorkerHandle(Protocol):
    """One life of one instance."""

    async def meeting(self) -> tuple[str, int]:
        """Host and port where the others of its data-parallel group find it."""
        ...

    async def start(self, group: GroupRank | None) -> Ready:
        """Load the engine; of a group, all at the same time."""
        ...

    async def ended(self) -> str:
        """Wait for the end of this life; returns how it ended, never raises for a death."""
        ...

    async def quiet(self, deadline_s: float) -> bool:
        """Let running requests end."""
        ...

    async def drain(self, deadline_s: float) -> bool:
        """Let running requests end, then stop."""
        ...

    async def kill(self) -> None:
        """End it now and give back its resources."""
        ...


class Launcher(Protocol):
    """Starts lives."""

    async def launch(self, instance_id: str, role: Role, *, index: int, incarnation: str) -> WorkerHandle:
        """Reserve resources, waiting for them within a deadline, and create the worker."""
        ...

    def give_up(self, instance_ids: Sequence[str]) -> None:
        """No life of this group will follow: what is still reserved for it can go."""
        ...


class Controller:
    """Supervises the instances of a spec."""

    def __init__(self, spec: ClusterSpec, launcher: Launcher) -> None:
        self._spec = spec
        self._launcher = launcher
        self._roles = dict(spec.places())
        self._registry = Registry(spec.places())
        self._groups = {instance_id: ids for ids in spec.groups() for instance_id in ids}
        self._handles: dict[str, WorkerHandle] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._changed = asyncio.Condition()
        self._jitter = random.Random(spec.seed)
        self._stopping = False

    async def start(self) -> None:
        """Begin to fill the places; returns at once."""
        # Large groups first, while there are whole nodes for them.
        for ids in sorted(self._spec.groups(), key=len, reverse=True):
            self._keepers.append(asyncio.create_task(self._keep(ids), name=f"keep-{ids[0]}"))

    async def watch(self, version: int, deadline_s: float) -> Membership:
        """The membership as soon as it is newer than `version`, or as it is when the deadline passes."""
        try:
            async with asyncio.timeout(deadline_s), self._changed:
                await self._changed.wait_for(lambda: self._registry.snapshot().version > version)
        except TimeoutError:
            pass
        return self._registry.snapshot()

    async def progress(self, instance_id: str, incarnation: str, phase: str) -> None:
        """A worker says what it is doing while it starts."""
        self._registry.progress(instance_id, incarnation=incarnation, detail=phase)
        await self._announce()

    async def drain(self, instance_id: str, deadline_s: float) -> bool:
        """Let one instance's requests end or go on elsewhere, and those of its group, end it, and start
        another life in its place; False when the deadline cut requests off. Raises UnknownInstance for one
        that is not READY."""
        if (
            instance_id not in self._handles
            or self._registry.get(instance_id).state is not InstanceState.READY
        ):
            raise UnknownInstance(instance=instance_id, known=tuple(self._roles))
        ids = self._groups[instance_id]
        for member in ids:
            self._registry.draining(member)
        await self._announce()
        return await self._drain([self._handles[member] for member in ids], deadline_s)

    async def stop(self, deadline_s: float) -> bool:
        """Drain every instance and end it; False when the deadline cut requests off."""
        self._stopping = True
        for instance_id in self._handles:
            self._registry.draining(instance_id)
        await self._announce()
        groups = [[self._handles[one] for one in ids if one in self._handles] for ids in self._spec.groups()]
        drained = await asyncio.gather(*(self._drain(handles, deadline_s) for handles in groups if handles))
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        return all(drained)

    @staticmethod
    async def _drain(handles: list[WorkerHandle], deadline_s: float) -> bool:
        try:
            async with asyncio.timeout(deadline_s + 5.0):
                if len(handles) == 1:
                    return await handles[0].drain(deadline_s)
                # None may stop as long as another computes: it needs the experts of all.
                are_quiet = await asyncio.gather(*(handle.quiet(deadline_s) for handle in handles))
                await asyncio.gather(*(handle.drain(0.0) for handle in handles))
                return all(are_quiet)
        except Exception as error:  # the instance may be dying while it is asked
            logger.warning("an instance did not drain: %s", error)
            return False

    async def _keep(self, ids: tuple[str, ...]) -> None:
        """Keep a group's places filled; most are groups of one."""
        failures = 0
        loop = asyncio.get_running_loop()
        while not self._stopping:
            lives = {instance_id: uuid.uuid4().hex[:12] for instance_id in ids}
            began_s = loop.time()
            for instance_id, incarnation in lives.items():
                self._registry.starting(instance_id, incarnation=incarnation, detail="waiting for resources")
            await self._announce()
            hopeless = ""
            at_fault: list[str] = []
            try:
                why = await self._live(lives, at_fault)
            except _HOPELESS as error:
                why, hopeless = str(error), error.reason
            except TimeoutError:
                why = f"not ready after {self._spec.deadlines.startup_s:g} s"
            except ServingError as error:
                why = str(error)
            except Exception as error:  # the place must be filled again, whatever ended this life
                logger.exception("%s", lives)
                why = repr(error)
            if at_fault and len(ids) > 1:
                why = f"{at_fault[0]}: {why}"
            for instance_id, incarnation in lives.items():
                logger.warning("%s (%s) ended: %s", instance_id, incarnation, why)
                self._registry.gone(instance_id, incarnation=incarnation, detail=why, hopeless=hopeless)
            await self._announce()
            if hopeless:
                self._launcher.give_up(ids)
                return
            failures = 0 if loop.time() - began_s > HEALTHY_S else failures + 1
            pause_s = RESTART_S[min(failures, len(RESTART_S) - 1)] if failures else 0.0
            await asyncio.sleep(pause_s * self._jitter.uniform(0.8, 1.2))

    async def _live(self, lives: Mapping[str, str], at_fault: list[str]) -> str:
        """One life of a group, incarnations by instance, from launch to end; returns how it ended.

        Args:
            at_fault: gets the instance with which it did.
        """
        handles: dict[str, WorkerHandle] = {}

        async def launch(instance_id: str, incarnation: str) -> None:
            handles[instance_id] = await self._launcher.launch(
                instance_id,
                self._roles[instance_id],
                index=list(self._roles).index(instance_id),
                incarnation=incarnation,
            )

        try:
            await _all(launch(*life) for life in lives.items())
            self._handles |= handles
            async with asyncio.timeout(self._spec.deadlines.startup_s):
                started = await self._start({one: handles[one] for one in lives}, at_fault)
            for (instance_id, incarnation), ready in zip(lives.items(), started, strict=True):
                self._registry.register(
                    instance_id,
                    incarnation=incarnation,
                    address=ready.address,
                    node=ready.node,
                    pid=ready.pid,
                    facts=ready.facts,
                )
            await self._announce()
            return await self._end(handles, at_fault)
        finally:
            for instance_id, handle in handles.items():
                self._handles.pop(instance_id, None)
                await handle.kill()

    @staticmethod
    async def _start(handles: Mapping[str, WorkerHandle], at_fault: list[str]) -> list[Ready]:
        async def start(instance_id: str, rank: GroupRank | None) -> Ready:
            try:
                return await handles[instance_id].start(rank)
            except Exception:
                at_fault.append(instance_id)
                raise

        first, *others = handles
        if not others:
            return [await start(first, None)]
        host, port = await handles[first].meeting()
        ranks = (GroupRank(rank=n, size=len(handles), host=host, port=port) for n in range(len(handles)))
        return await _all(start(*one) for one in zip(handles, ranks, strict=True))

    @staticmethod
    async def _end(handles: Mapping[str, WorkerHandle], at_fault: list[str]) -> str:
        """How the first of a group ends: the others can't go on without it."""
        ends = {asyncio.create_task(handle.ended()): instance_id for instance_id, handle in handles.items()}
        try:
            done, others = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            first = done.pop()
            why = first.result()
            if others and why == DRAINED:
                await asyncio.wait(others, timeout=STOP_S)
            at_fault.append(ends[first])
            return why
        finally:
            for end in ends:
                end.cancel()

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()


_Result = TypeVar("_Result")


async def _all(waiting: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """What all of them return; the first error ends the others."""
    tasks = [asyncio.create_task(one) for one in waiting]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
