"""Engine options of the decode phase, and who is let into its memory."""

from __future__ import annotations

from random import Random
from typing import Any

from cluster.attention import attention_backend
from cluster.latency import LatencyModel
from cluster.spec import ClusterSpec
from decode_worker.past_future import PastFuture


def phase_options(spec: ClusterSpec) -> dict[str, Any]:
    """vLLM engine options of a decode instance, under what the spec says.

    Raises as `attention_backend`.
    """
    options: dict[str, Any] = {"attention_backend": attention_backend(spec)}
    if spec.decode_admission == "predicted_peak":
        # By name: whoever makes the options need not have vLLM. On CPUs it decides nothing ahead.
        kind = "AsyncPastFutureScheduler" if spec.device == "gpu" else "PastFutureScheduler"
        options["scheduler_cls"] = f"decode_worker.past_future_scheduler_vllm.{kind}"
    return options


def twin_parts(spec: ClusterSpec, latency: LatencyModel) -> dict[str, Any]:
    """What makes a twin decode as the spec says: arguments of `SimEngine`."""
    return {"gate": PastFuture(Random(spec.seed)) if spec.decode_admission == "predicted_peak" else None}
