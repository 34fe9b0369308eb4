"""Where an instance runs: one placement group and one actor per life. The only code that creates workers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import ServingError
from cluster.instance import Role
from cluster.ray_worker import StartFailed
from cluster.spec import ClusterSpec
from cluster.worker import Ready


class RayWorker:
    """A life in a Ray actor, as the controller handles it (`deploy.controller.WorkerHandle`)."""

    def __init__(self, actor: Any, group: Any) -> None:
        self._actor = actor
        self._group = group

    async def start(self) -> Ready:
        """Load the engine. Raises the worker's own ServingError, or StartFailed when its process died."""
        try:
            ready: Ready = await self._actor.start.remote()
            return ready
        except RayTaskError as error:
            if isinstance(error.cause, ServingError):
                raise error.cause from None
            raise StartFailed(detail=str(error)) from None
        except RayError as error:
            raise StartFailed(detail=f"its process died: {_first_line(error)}") from None

    async def ended(self) -> str:
        """How the life ended; a call that runs as long as the actor, so its death is known at once."""
        try:
            return str(await self._actor.run.remote())
        except RayError as error:  # also memory pressure and lost nodes, each an error of its own
            return f"its process died: {_first_line(error)}"

    async def drain(self, deadline_s: float) -> bool:
        return bool(await self._actor.drain.remote(deadline_s))

    async def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)
        remove_placement_group(self._group)


def _first_line(error: RayError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class RayLauncher:
    """Starts lives as Ray actors (`deploy.controller.Launcher`)."""

    def __init__(self, spec: ClusterSpec, controller: Any, actor_classes: Mapping[Role, type]) -> None:
        self._spec = spec
        self._controller = controller
        self._actor_classes = actor_classes

    async def launch(self, instance_id: str, role: Role, *, index: int, incarnation: str) -> RayWorker:
        """Raises StartFailed when no node has the resources within `startup_s`; one may join later."""
        group = await self._place(instance_id, role)
        try:
            actor = (
                ray.remote(self._actor_classes[role])
                .options(
                    name=f"{self._spec.name}:{instance_id}:{incarnation}",
                    num_cpus=self._spec.pool(role).cpus,
                    num_gpus=self._gpus(role),
                    max_restarts=0,
                    max_concurrency=100,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        placement_group=group, placement_group_capture_child_tasks=True
                    ),
                )
                .remote(
                    self._spec,
                    instance_id=instance_id,
                    incarnation=incarnation,
                    cores=self._cores(role, index),
                    controller=self._controller,
                )
            )
        except BaseException:
            remove_placement_group(group)
            raise
        return RayWorker(actor, group)

    async def _place(self, instance_id: str, role: Role) -> Any:
        pool = self._spec.pool(role)
        bundle = {"CPU": pool.cpus, **pool.resources}
        if gpus := self._gpus(role):
            bundle["GPU"] = float(gpus)
        # All ranks of an instance on one node: its tensor parallelism needs NVLink.
        group = placement_group([bundle], strategy="STRICT_PACK", name=f"{self._spec.name}:{instance_id}")
        try:
            async with asyncio.timeout(self._spec.deadlines.startup_s):
                await group.ready()
        except TimeoutError:
            remove_placement_group(group)
            nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
            names = ("CPU", "GPU", *pool.resources)
            has = "; ".join(", ".join(f"{name} {n.get(name, 0):g}" for name in names) for n in nodes)
            raise StartFailed(
                detail=f"{instance_id} needs {bundle} on one node, and no node has that free (nodes: {has}); "
                "add nodes, or lower the pool's count, parallelism or cpus in the spec"
            ) from None
        return group

    def _gpus(self, role: Role) -> int:
        needs_gpus = self._spec.device == "gpu" and self._spec.engine != "sim"
        return self._spec.pool(role).ranks if needs_gpus else 0

    def _cores(self, role: Role, index: int) -> str:
        before = sum(self._spec.pool(r).ranks for _, r in self._spec.places()[:index])
        cores = os.cpu_count() or 1
        return "|".join(str((before + rank) % cores) for rank in range(self._spec.pool(role).ranks))
