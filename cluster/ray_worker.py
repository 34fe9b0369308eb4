"""WorkerShell: what a worker actor adds to a Worker. Constructs, forwards, reports; nothing else."""

from __future__ import annotations

import logging
from typing import Any

import ray

from cluster.engine import Doorman
from cluster.errors import ServingError
from cluster.instance import GroupRank, Role
from cluster.spec import ClusterSpec
from cluster.worker import Ready, TwinParts, Worker


class WorkerShell:
    """Base of the actor classes in `prefill_worker` and `decode_worker`.

    Args:
        controller: the controller's actor handle, told every phase of the start.
        cores: CPU cores of the ranks, in vLLM's notation; CPU clusters only.
        twin_parts, doorman: see `Worker`.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        role: Role,
        phase_options: dict[str, Any],
        *,
        instance_id: str,
        incarnation: str,
        cores: str,
        controller: Any,
        twin_parts: TwinParts | None = None,
        doorman: Doorman | None = None,
    ) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
        self._worker = Worker(
            spec,
            role,
            instance_id=instance_id,
            incarnation=incarnation,
            host=ray.util.get_node_ip_address(),
            cores=cores,
            phase_options=phase_options,
            on_phase=lambda phase: controller.progress.remote(instance_id, incarnation, phase),
            twin_parts=twin_parts,
            doorman=doorman,
        )

    async def meeting(self) -> tuple[str, int]:
        """See `Worker.meeting`."""
        return self._worker.meeting()

    async def start(self, group: GroupRank | None) -> Ready:
        """Load the engine; see `Worker.start`. Raises ServingError, whatever went wrong."""
        try:
            return await self._worker.start(group)
        except ServingError:
            raise
        except Exception as error:
            logging.getLogger(__name__).exception("the engine did not start")
            raise StartFailed(detail=f"{type(error).__name__}: {error}") from None

    async def run(self) -> str:
        """Serve until the end; see `Worker.run`."""
        return await self._worker.run()

    async def quiet(self, deadline_s: float) -> bool:
        """See `Worker.quiet`."""
        return await self._worker.quiet(deadline_s)

    async def drain(self, deadline_s: float) -> bool:
        """See `Worker.drain`."""
        return await self._worker.drain(deadline_s)


class StartFailed(ServingError):
    """An engine did not start; a new attempt may. Facts: `detail`."""

    retryable = True
    reason = "start-failed"

    detail: str

    def describe(self) -> str:
        return f"the engine did not start: {self.detail}"
