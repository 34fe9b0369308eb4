"""The prefill actor: a worker shell with the prefill phase's options."""

from __future__ import annotations

from functools import partial
from typing import Any

from cluster.instance import Role
from cluster.ray_worker import WorkerShell
from cluster.spec import ClusterSpec
from prefill_worker.phase import doorman_of, phase_options, twin_parts


class PrefillActor(WorkerShell):
    """One prefill instance."""

    def __init__(self, spec: ClusterSpec, **place: Any) -> None:
        super().__init__(
            spec,
            Role.PREFILL,
            phase_options(spec),
            twin_parts=partial(twin_parts, spec),
            doorman=doorman_of(spec),
            **place,
        )
