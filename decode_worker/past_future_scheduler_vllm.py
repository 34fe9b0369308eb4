"""Past-Future admission in vLLM: its scheduler, to which requests are shown only when they will fit."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any

from cluster import vllm_api
from decode_worker.past_future import Growing, PastFuture

_Scheduler: Any = vllm_api.Scheduler
_AsyncScheduler: Any = vllm_api.AsyncScheduler


class _ByPeak:
    """What is added to either of vLLM's schedulers."""

    # vLLM's, used here.
    running: list[Any]
    waiting: Any
    kv_holding_waiting: Any
    cache_config: Any
    kv_cache_manager: Any
    block_size: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gate = PastFuture(Random(0))
        # Nothing was freed since the first that waits did not fit.
        self._is_full = False

    def schedule(self, throttle_prefills: bool = False) -> Any:
        hidden = self._hide()
        try:
            return super().schedule(throttle_prefills)  # type: ignore[misc]
        finally:
            self.waiting.extend(hidden)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        # Who was aborted tells nothing of how long answers are.
        if request.get_finished_reason() in (vllm_api.FinishReason.STOP, vllm_api.FinishReason.LENGTH):
            self._gate.ended(request.num_output_tokens)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def _free_request_blocks(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._is_full = False
        return super()._free_request_blocks(request, *args, **kwargs)  # type: ignore[misc]

    def _hide(self) -> list[Any]:
        """Take out of `waiting` what would not fit, from the first that does not on."""
        waiting = self.waiting
        if not waiting or not isinstance(waiting, deque):
            return []
        holding = [_growing(request) for request in (*self.running, *self.kv_holding_waiting)]
        shown = 0
        if not self._is_full:
            pool = self.kv_cache_manager.block_pool
            capacity = (pool.num_gpu_blocks - 1) * self.block_size
            for request in waiting:
                holding.append(_growing(request))
                # Alone it may have all.
                if len(holding) > 1 and not self._gate.fits(holding, capacity):
                    self._is_full = True
                    break
                shown += 1
        hidden = [waiting.pop() for _ in range(len(waiting) - shown)]
        return hidden[::-1]


def _growing(request: Any) -> Growing:
    generated = request.num_output_tokens
    return Growing(tokens=request.num_tokens, generated=generated, limit=max(generated, request.max_tokens))


class PastFutureScheduler(_ByPeak, _Scheduler):  # type: ignore[misc]
    """In place of vLLM's `Scheduler`."""


class AsyncPastFutureScheduler(_ByPeak, _AsyncScheduler):  # type: ignore[misc]
    """In place of vLLM's `AsyncScheduler`."""
