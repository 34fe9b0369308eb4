"""The controller's heart: keeps every place of the spec filled with a running life, and says who is there.

Free of Ray: it starts workers through a `Launcher`. Events come in, the registry changes, watchers wake.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from typing import Protocol

from cluster.errors import EnvironmentProblem, IncompatiblePeer, ServingError, SpecError, UnknownInstance
from cluster.instance import InstanceState, Role
from cluster.registry import Membership, Registry
from cluster.spec import ClusterSpec
from cluster.worker import Ready

logger = logging.getLogger(__name__)

# Pauses before a life that ended is followed by another, in seconds; the last one repeats.
RESTART_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
# A life this long wipes the slate of the ones that failed before it.
HEALTHY_S = 60.0

# Starting again would end the same way.
_HOPELESS = (SpecError, EnvironmentProblem, IncompatiblePeer)


class WorkerHandle(Protocol):
    """One life of one instance."""

    async def start(self) -> Ready:
        """Load the engine."""
        ...

    async def ended(self) -> str:
        """Wait for the end of this life; returns how it ended, never raises for a death."""
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


class Controller:
    """Supervises the instances of a spec."""

    def __init__(self, spec: ClusterSpec, launcher: Launcher) -> None:
        self._spec = spec
        self._launcher = launcher
        self._registry = Registry(spec.places())
        self._handles: dict[str, WorkerHandle] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._changed = asyncio.Condition()
        self._jitter = random.Random(spec.seed)
        self._stopping = False

    async def start(self) -> None:
        """Begin to fill the places; returns at once."""
        for index, (instance_id, role) in enumerate(self._spec.places()):
            task = asyncio.create_task(self._keep(instance_id, role, index), name=f"keep-{instance_id}")
            self._keepers.append(task)

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
        """Let one instance's requests end or go on elsewhere, end it, and start another life in its place;
        False when the deadline cut requests off. Raises UnknownInstance for one that is not READY."""
        handle = self._handles.get(instance_id)
        if handle is None or self._registry.get(instance_id).state is not InstanceState.READY:
            raise UnknownInstance(instance=instance_id, known=tuple(dict(self._spec.places())))
        self._registry.draining(instance_id)
        await self._announce()
        return await self._drain(handle, deadline_s)

    async def stop(self, deadline_s: float) -> bool:
        """Drain every instance and end it; False when the deadline cut requests off."""
        self._stopping = True
        for instance_id in self._handles:
            self._registry.draining(instance_id)
        await self._announce()
        drained = await asyncio.gather(
            *(self._drain(handle, deadline_s) for handle in list(self._handles.values()))
        )
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        return all(drained)

    @staticmethod
    async def _drain(handle: WorkerHandle, deadline_s: float) -> bool:
        try:
            async with asyncio.timeout(deadline_s + 5.0):
                return await handle.drain(deadline_s)
        except Exception as error:  # the instance may be dying while it is asked
            logger.warning("an instance did not drain: %s", error)
            return False

    async def _keep(self, instance_id: str, role: Role, index: int) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while not self._stopping:
            incarnation = uuid.uuid4().hex[:12]
            began_s = loop.time()
            self._registry.starting(instance_id, incarnation=incarnation, detail="waiting for resources")
            await self._announce()
            hopeless = ""
            try:
                why = await self._live(instance_id, role, index, incarnation)
            except _HOPELESS as error:
                why, hopeless = str(error), error.reason
            except TimeoutError:
                why = f"not ready after {self._spec.deadlines.startup_s:g} s"
            except ServingError as error:
                why = str(error)
            except Exception as error:  # the place must be filled again, whatever ended this life
                logger.exception("%s (%s)", instance_id, incarnation)
                why = repr(error)
            logger.warning("%s (%s) ended: %s", instance_id, incarnation, why)
            self._registry.gone(instance_id, incarnation=incarnation, detail=why, hopeless=hopeless)
            await self._announce()
            if hopeless:
                return
            failures = 0 if loop.time() - began_s > HEALTHY_S else failures + 1
            pause_s = RESTART_S[min(failures, len(RESTART_S) - 1)] if failures else 0.0
            await asyncio.sleep(pause_s * self._jitter.uniform(0.8, 1.2))

    async def _live(self, instance_id: str, role: Role, index: int, incarnation: str) -> str:
        """One life from launch to end; returns how it ended."""
        handle: WorkerHandle | None = None
        try:
            handle = await self._launcher.launch(instance_id, role, index=index, incarnation=incarnation)
            self._handles[instance_id] = handle
            async with asyncio.timeout(self._spec.deadlines.startup_s):
                ready = await handle.start()
            self._registry.register(
                instance_id,
                incarnation=incarnation,
                address=ready.address,
                node=ready.node,
                pid=ready.pid,
                facts=ready.facts,
            )
            await self._announce()
            return await handle.ended()
        finally:
            self._handles.pop(instance_id, None)
            if handle is not None:
                await handle.kill()

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()
