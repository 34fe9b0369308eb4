"""The controller's actor: one per cluster, detached, found by name. A shell around `deploy.controller`."""

from __future__ import annotations

from typing import Any

import ray

from cluster.errors import EnvironmentProblem
from cluster.instance import Role
from cluster.ray_placement import RayLauncher
from cluster.registry import Membership
from cluster.spec import ClusterSpec
from decode_worker.ray_actor import DecodeActor
from deploy.controller import Controller
from prefill_worker.ray_actor import PrefillActor

NAMESPACE = "pdserve"
# Every Ray head has one.
HEAD_NODE_RESOURCE_NAME = "node:__internal_head__"


def controller_name(spec: ClusterSpec) -> str:
    """Name of the cluster's controller actor in NAMESPACE."""
    return f"{spec.name}:controller"


class ControllerActor:
    """Forwards to a Controller."""

    def __init__(self, spec: ClusterSpec) -> None:
        me = ray.get_runtime_context().current_actor
        actor_classes = {Role.PREFILL: PrefillActor, Role.DECODE: DecodeActor}
        self._spec = spec
        self._controller = Controller(spec, RayLauncher(spec, me, actor_classes))
        self._started = False

    async def start(self) -> ClusterSpec:
        """Begin to fill the places, once; returns the spec that the cluster runs."""
        if not self._started:
            self._started = True
            await self._controller.start()
        return self._spec

    async def watch(self, version: int, deadline_s: float) -> Membership:
        return await self._controller.watch(version, deadline_s)

    async def progress(self, instance_id: str, incarnation: str, phase: str) -> None:
        await self._controller.progress(instance_id, incarnation, phase)

    async def drain(self, instance_id: str, deadline_s: float) -> bool:
        return await self._controller.drain(instance_id, deadline_s)

    async def stop(self, deadline_s: float) -> bool:
        return await self._controller.stop(deadline_s)


def require_same_spec(running: ClusterSpec, wanted: ClusterSpec) -> None:
    """Raise EnvironmentProblem when the cluster of this name runs another spec: new front ends would speak to
    old engines."""
    if running != wanted:
        differing = [key for key in ClusterSpec.model_fields if getattr(running, key) != getattr(wanted, key)]
        raise EnvironmentProblem(
            problem=f"cluster {wanted.name!r} is up with another spec (other: {', '.join(differing)})",
            remedy="stop it first, or give this spec another name",
        )


def get_or_create_controller(spec: ClusterSpec) -> Any:
    """Handle of the cluster's controller, created when there is none."""
    return (
        ray.remote(ControllerActor)
        .options(
            name=controller_name(spec),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            # Beside Ray's own head and not on a node that may go: instances end with their controller.
            resources={HEAD_NODE_RESOURCE_NAME: 0.001},
            max_restarts=-1,
            max_concurrency=1000,
        )
        .remote(spec)
    )
