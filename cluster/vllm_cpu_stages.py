"""Pipeline stages on CPUs: the buffer for what one stage hands to the next.

vLLM makes it in a trial run of the model. On CPUs (0.32) there is none without compilation, and with it the
first request of an engine with stages ends the engine.
"""

from __future__ import annotations

from typing import Any

from cluster import vllm_api


def make_buffers_between_stages() -> None:
    """Let it be made when it is first needed, in this process; any number of times."""
    runner_class = vllm_api.GPUModelRunner
    stock = runner_class.sync_and_gather_intermediate_tensors
    if hasattr(stock, "pdserve_stock"):
        return

    def gather(runner: Any, *args: Any, **kwargs: Any) -> Any:
        if runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )
        return stock(runner, *args, **kwargs)

    gather.pdserve_stock = stock  # type: ignore[attr-defined]
    runner_class.sync_and_gather_intermediate_tensors = gather
