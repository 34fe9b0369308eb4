"""Engine options of the prefill phase, and the order of its prompts."""

from __future__ import annotations

from typing import Any

from cluster.attention import attention_backend
from cluster.latency import LatencyModel
from cluster.spec import ClusterSpec
from prefill_worker.deadline_order import DeadlineOrder


def phase_options(spec: ClusterSpec) -> dict[str, Any]:
    """vLLM engine options of a prefill instance, under what the spec says.

    Chunked prefill stays on: a chunk boundary is where a long prompt can yield to a short one. Raises as
    `attention_backend`.
    """
    return {"enable_chunked_prefill": True, "attention_backend": attention_backend(spec)}


def prompt_order(spec: ClusterSpec, latency: LatencyModel) -> DeadlineOrder | None:
    """The order in which a twin computes prompts; None for that of their arrival."""
    return DeadlineOrder(latency) if spec.prefill_order == "deadline" else None
