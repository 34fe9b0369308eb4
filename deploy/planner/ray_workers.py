"""Trials on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray

from deploy.planner.goal import Goal

# A trial takes seconds; one that takes that long never ends.
TRIAL_TIMEOUT_S = 3600.0


class RayWorkers:
    """A task for every call, one core each. The six packages must be in the cluster's image."""

    def __init__(self, goal: Goal, address: str) -> None:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        self._goal = ray.put(goal)
        self._run = ray.remote(num_cpus=1)(_call)

    def map(self, what: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """In the order of the calls. Raises ray's GetTimeoutError after an hour without an answer."""
        tasks = [self._run.remote(what, self._goal, args) for args in calls]
        return list(ray.get(tasks, timeout=TRIAL_TIMEOUT_S))


def _call(what: Callable[..., Any], goal: Goal, args: tuple[Any, ...]) -> Any:
    return what(goal, *args)
