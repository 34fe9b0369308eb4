"""Where an instance runs: one actor per life, in a placement group of its own or in one that it shares: that
of its node, or of its data-parallel group. The only code that creates workers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import ServingError
from cluster.instance import GroupRank, Role
from cluster.placement import sharing
from cluster.ray_worker import StartFailed
from cluster.spec import ClusterSpec
from cluster.worker import Ready


class RayWorker:
    """A life in a Ray actor, as the controller handles it (`deploy.controller.WorkerHandle`)."""

    def __init__(self, actor: Any, group: Any) -> None:
        """
        Args:
            group: that ends with the life; None for one that others share.
        """
        self._actor = actor
        self._group = group

    async def meeting(self) -> tuple[str, int]:
        """Where the others of its group find it. Raises as `start`."""
        host, port = await self._asked(self._actor.meeting.remote())
        return host, port

    async def start(self, group: GroupRank | None) -> Ready:
        """Load the engine. Raises the worker's own ServingError, or StartFailed when its process died."""
        ready: Ready = await self._asked(self._actor.start.remote(group))
        return ready

    @staticmethod
    async def _asked(answer: Any) -> Any:
        try:
            return await answer
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

    async def quiet(self, deadline_s: float) -> bool:
        return bool(await self._actor.quiet.remote(deadline_s))

    async def drain(self, deadline_s: float) -> bool:
        return bool(await self._actor.drain.remote(deadline_s))

    async def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)
        if self._group is not None:
            remove_placement_group(self._group)


def _first_line(error: RayError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class RayLauncher:
    """Starts lives as Ray actors (`deploy.controller.Launcher`)."""

    def __init__(self, spec: ClusterSpec, controller: Any, actor_classes: Mapping[Role, type]) -> None:
        self._spec = spec
        self._controller = controller
        self._actor_classes = actor_classes
        # Who shares a placement group, in order, and the group once somebody was launched there. On a node
        # the instances are with `colocate`; a data-parallel group is placed at once.
        shared = sharing(spec) if spec.colocate else [ids for ids in spec.groups() if len(ids) > 1]
        self._sharing = {instance_id: ids for ids in shared for instance_id in ids}
        self._groups: dict[tuple[str, ...], Any] = {}

    async def launch(self, instance_id: str, role: Role, *, index: int, incarnation: str) -> RayWorker:
        """Raises StartFailed when no node has the resources within `startup_s`; one may join later."""
        shared = self._sharing.get(instance_id)
        if shared is None:
            group = self._group([instance_id])
        else:
            if shared not in self._groups:
                self._groups[shared] = self._group(shared)
            group = self._groups[shared]
        own = group if shared is None else None
        try:
            await self._placed(group, shared or (instance_id,))
            actor = (
                ray.remote(self._actor_classes[role])
                .options(
                    name=f"{self._spec.name}:{instance_id}:{incarnation}",
                    num_cpus=self._spec.pool(role).cpus,
                    num_gpus=self._gpus(role),
                    max_restarts=0,
                    max_concurrency=100,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        placement_group=group,
                        placement_group_bundle_index=shared.index(instance_id) if shared else 0,
                        placement_group_capture_child_tasks=True,
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
            if own is not None:
                remove_placement_group(own)
            raise
        return RayWorker(actor, own)

    def give_up(self, instance_ids: Sequence[str]) -> None:
        """See `deploy.controller.Launcher`; a node's instances keep it for the others there."""
        if not self._spec.colocate and (group := self._groups.pop(tuple(instance_ids), None)) is not None:
            remove_placement_group(group)

    def _group(self, instance_ids: Sequence[str]) -> Any:
        """For each a bundle on one node, as tensor parallelism needs NVLink; with `colocate` all of them on
        one, so that KV stays there."""
        name = f"{self._spec.name}:{'+'.join(instance_ids)}"
        return placement_group(self._bundles(instance_ids), strategy=self._strategy, name=name)

    @property
    def _strategy(self) -> str:
        return "STRICT_PACK" if self._spec.colocate else "PACK"

    def _bundles(self, instance_ids: Sequence[str]) -> list[dict[str, float]]:
        roles = dict(self._spec.places())
        found = []
        for role in (roles[instance_id] for instance_id in instance_ids):
            pool = self._spec.pool(role)
            bundle = {"CPU": pool.cpus, **pool.resources}
            if gpus := self._gpus(role):
                bundle["GPU"] = float(gpus)
            found.append(bundle)
        return found

    async def _placed(self, group: Any, instance_ids: Sequence[str]) -> None:
        """Wait until it has its node. A shared group that has none yet stays: a node for it may join."""
        try:
            async with asyncio.timeout(self._spec.deadlines.startup_s):
                await group.ready()
        except TimeoutError:
            bundles = self._bundles(instance_ids)
            needs = {name: sum(b.get(name, 0.0) for b in bundles) for name in dict.fromkeys(chain(*bundles))}
            where = " on one node" if self._spec.colocate or len(instance_ids) == 1 else ""
            nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
            has = "; ".join(", ".join(f"{name} {n.get(name, 0):g}" for name in needs) for n in nodes)
            raise StartFailed(
                detail=f"{' + '.join(instance_ids)} need {needs}{where}, which is not free "
                f"(nodes: {has}); add nodes, or lower the pools' count, parallelism or cpus in the spec"
            ) from None

    def _gpus(self, role: Role) -> int:
        needs_gpus = self._spec.device == "gpu" and self._spec.engine != "sim"
        return self._spec.pool(role).ranks if needs_gpus else 0

    def _cores(self, role: Role, index: int) -> str:
        before = sum(self._spec.pool(r).ranks for _, r in self._spec.places()[:index])
        cores = os.cpu_count() or 1
        return "|".join(str((before + rank) % cores) for rank in range(self._spec.pool(role).ranks))
