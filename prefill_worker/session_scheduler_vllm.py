"""Kept sessions in vLLM: its scheduler, that holds the blocks of an ended prompt for the session's next turn.

A request says for how long (`wire.KEEP_PARAM`, decided by `router.session_ttl`). What is held has one more
user than vLLM knows of, so it is not evicted. It is let go when its time is over, when vLLM would otherwise
refuse or preempt somebody for want of blocks (what was held last first: the program that came last, as in
Continuum), when the cache is reset, and when the engine stops. Nobody waits for it: its time is looked at
when there is something to decide.
"""

from __future__ import annotations

import time
from typing import Any

from cluster import vllm_api
from cluster.wire import KEEP_PARAM
from prefill_worker import deadline_scheduler_vllm, length_scheduler_vllm

_ENDED_WELL = (vllm_api.FinishReason.STOP, vllm_api.FinishReason.LENGTH)


class _KeepsSessions:
    """What is added to any scheduler."""

    # vLLM's, used here.
    kv_cache_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # (until when, blocks in the order of the prompt), the latest last.
        self._held: list[tuple[float, list[Any]]] = []
        self._until_s: dict[str, float] = {}
        self._allocate = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_slots

    def schedule(self, throttle_prefills: bool = False) -> Any:
        if self._held:
            now_s = time.monotonic()
            over = [blocks for until_s, blocks in self._held if until_s <= now_s]
            self._held = [entry for entry in self._held if entry[0] > now_s]
            for blocks in over:
                self._let_go(blocks)
        return super().schedule(throttle_prefills)  # type: ignore[misc]

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        extra = request.sampling_params.extra_args if request.sampling_params is not None else None
        # Who was aborted has no next turn.
        if extra and KEEP_PARAM in extra and request.get_finished_reason() in _ENDED_WELL:
            self._until_s[request.request_id] = time.monotonic() + extra[KEEP_PARAM]
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def _free_blocks(self, request: Any) -> None:
        """It has ended, and nobody is to read its blocks any more."""
        until_s = self._until_s.pop(request.request_id, 0.0)
        if until_s > time.monotonic():
            groups = self.kv_cache_manager.get_blocks(request.request_id).blocks
            # Others than full ones nobody finds.
            blocks = [one for group in groups for one in group if one.block_hash is not None]
            if blocks:
                self.kv_cache_manager.block_pool.touch(blocks)
                self._held.append((until_s, blocks))
        super()._free_blocks(request)  # type: ignore[misc]

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> Any:
        self._let_all_go()
        return super().reset_prefix_cache(*args, **kwargs)  # type: ignore[misc]

    def shutdown(self) -> None:
        self._let_all_go()
        super().shutdown()  # type: ignore[misc]

    def _allocate_slots(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, which has None for too few blocks."""
        while (blocks := self._allocate(*args, **kwargs)) is None and self._held:
            self._let_go(self._held.pop()[1])
        return blocks

    def _let_all_go(self) -> None:
        while self._held:
            self._let_go(self._held.pop()[1])

    def _let_go(self, blocks: list[Any]) -> None:
        # As vLLM frees a request's: the end of a prompt is evicted first.
        self.kv_cache_manager.block_pool.free_blocks(reversed(blocks))


def __getattr__(name: str) -> Any:
    """`Keeping` and the name of a scheduler, vLLM's or one of ours: that one, with sessions kept."""
    other = name.removeprefix("Keeping")
    for module in (length_scheduler_vllm, deadline_scheduler_vllm, vllm_api):
        if name != other and other.endswith("Scheduler") and hasattr(module, other):
            made = type(name, (_KeepsSessions, getattr(module, other)), {"__module__": __name__})
            globals()[name] = made
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
