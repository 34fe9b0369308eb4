"""The process in which vLLM coordinates a data-parallel group: it ends with the process that started it.

vLLM's own goes on when the process of the group's first instance is killed.
"""

from __future__ import annotations

from typing import Any

from cluster import vllm_api
from cluster.orphan import end_with_parent


class Coordinator:
    """In the place of vLLM's, whose process is found by this name."""

    @staticmethod
    def run_coordinator(**options: Any) -> None:
        """vLLM's own, in its process."""
        end_with_parent()
        vllm_api.DPCoordinatorProc.run_coordinator(**options)


def end_coordinators_with_parent() -> None:
    """For groups that this process starts from now on."""
    assert vllm_api.DPCoordinatorProc is not Coordinator  # loaded, and known by its own name
    vllm_api.coordinator.DPCoordinatorProc = Coordinator
