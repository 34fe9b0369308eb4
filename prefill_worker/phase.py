"""Engine options of the prefill phase, who goes next in it, and who may join."""

from __future__ import annotations

from typing import Any

from cluster.attention import attention_backend
from cluster.latency import LatencyModel
from cluster.spec import UNSPLIT, ClusterSpec
from prefill_worker.deadline_order import DeadlineOrder
from prefill_worker.doorman import LearningDoorman
from prefill_worker.length_batching import LengthBatching

# Prompt tokens that keep a GPU busy: more in an iteration make no token cheaper, and all prompts of an
# iteration wait for its end (DistServe's L_m; Sarathi-Serve and Splitwise use the same).
SATURATING_TOKENS = 2048
# By order and batching: module and class in vLLM's scheduler's place, without "Async".
_SCHEDULERS = {
    ("arrival", "mixed"): ("", "Scheduler"),
    ("deadline", "mixed"): ("deadline_scheduler_vllm", "DeadlineScheduler"),
    ("arrival", "by_length"): ("length_scheduler_vllm", "LengthScheduler"),
    ("deadline", "by_length"): ("length_scheduler_vllm", "DeadlineLengthScheduler"),
}


def phase_options(spec: ClusterSpec) -> dict[str, Any]:
    """vLLM engine options of a prefill instance, under what the spec says.

    Chunked prefill stays on: a chunk boundary is where a long prompt can yield to a short one. Raises as
    `attention_backend`.
    """
    options: dict[str, Any] = {"enable_chunked_prefill": True, "attention_backend": attention_backend(spec)}
    if spec.device == "gpu":
        options["max_num_batched_tokens"] = SATURATING_TOKENS
    if (scheduler := _scheduler(spec)) is not None:
        options["scheduler_cls"] = scheduler
    return options


def _scheduler(spec: ClusterSpec) -> str | None:
    """What is in the place of vLLM's scheduler; None for nothing. By name: whoever makes the options need
    not have vLLM."""
    module, name = _SCHEDULERS[spec.prefill_order, spec.prefill_batching]
    # On CPUs vLLM decides nothing ahead.
    name = f"Async{name}" if spec.device == "gpu" else name
    if spec.keep_sessions:
        module, name = "session_scheduler_vllm", f"Keeping{name}"
    return f"prefill_worker.{module}.{name}" if module else None


def twin_parts(spec: ClusterSpec, latency: LatencyModel) -> dict[str, Any]:
    """What makes a twin prefill as the spec says: arguments of `SimEngine`."""
    by_length = spec.prefill_batching == "by_length"
    return {
        "order": DeadlineOrder(latency) if spec.prefill_order == "deadline" else None,
        "batching": LengthBatching(latency, SATURATING_TOKENS) if by_length else None,
    }


def doorman_of(spec: ClusterSpec) -> LearningDoorman | None:
    """Who decides whether a prefill instance takes a prompt; None where it takes all.

    Under `unsplit` a prompt waits for the memory of decodes too, of which the doorman knows nothing, and only
    half of the instances would have one.
    """
    if spec.prefill_queue == "open" or spec.policy == UNSPLIT:
        return None
    pool = spec.prefill
    # On CPUs what vLLM 0.32 takes by default (`EngineArgs.get_batch_defaults`); each stage has a batch.
    usual = SATURATING_TOKENS * (pool.ranks if spec.device == "cpu" else 1)
    options = {"max_num_batched_tokens": usual, **spec.engine_options, **pool.engine_options}
    return LearningDoorman(
        spec.deadlines.prefill_s,
        batch_tokens=int(options["max_num_batched_tokens"] or usual) * pool.pipeline_parallel_size,
        by_deadline=spec.prefill_order == "deadline",
    )
