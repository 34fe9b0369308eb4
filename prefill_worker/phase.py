"""Engine options of the prefill phase, the order of its prompts, and who may join them."""

from __future__ import annotations

from typing import Any

from cluster.attention import attention_backend
from cluster.latency import LatencyModel
from cluster.spec import UNSPLIT, ClusterSpec
from prefill_worker.deadline_order import DeadlineOrder
from prefill_worker.doorman import LearningDoorman

# Prompt tokens that keep a GPU busy: more in an iteration make no token cheaper, and all prompts of an
# iteration wait for its end (DistServe's L_m; Sarathi-Serve and Splitwise use the same).
SATURATING_TOKENS = 2048


def phase_options(spec: ClusterSpec) -> dict[str, Any]:
    """vLLM engine options of a prefill instance, under what the spec says.

    Chunked prefill stays on: a chunk boundary is where a long prompt can yield to a short one. Raises as
    `attention_backend`.
    """
    options: dict[str, Any] = {"enable_chunked_prefill": True, "attention_backend": attention_backend(spec)}
    if spec.device == "gpu":
        options["max_num_batched_tokens"] = SATURATING_TOKENS
    if spec.prefill_order == "deadline":
        # By name: whoever makes the options need not have vLLM. On CPUs it decides nothing ahead.
        kind = "AsyncDeadlineScheduler" if spec.device == "gpu" else "DeadlineScheduler"
        options["scheduler_cls"] = f"prefill_worker.deadline_scheduler_vllm.{kind}"
    return options


def twin_parts(spec: ClusterSpec, latency: LatencyModel) -> dict[str, Any]:
    """What makes a twin prefill as the spec says: arguments of `SimEngine`."""
    return {"order": DeadlineOrder(latency) if spec.prefill_order == "deadline" else None}


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
