"""LAPS in vLLM: its scheduler, with short and long prompts in iterations of their own (`length_batching`).

Who is not to be computed in an iteration is not shown to vLLM while it decides that iteration, and keeps
blocks and place. An engine that computes nothing while requests wait asks again after a millisecond
(vllm/v1/engine/core.py), so the end of a waiting window needs no alarm.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

from cluster import vllm_api
from prefill_worker.deadline_scheduler_vllm import ByDeadline, Timed
from prefill_worker.length_batching import LengthBatching
from prefill_worker.phase import SATURATING_TOKENS

_Scheduler: Any = vllm_api.Scheduler
_AsyncScheduler: Any = vllm_api.AsyncScheduler


class _ByLength(Timed):
    """What is added to either of vLLM's schedulers, or to one with an order."""

    # vLLM's, used here.
    kv_holding_waiting: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batching = LengthBatching(self._speed, SATURATING_TOKENS)
        self._came_s: dict[str, float] = {}
        # Those whose turn it was found no memory, and the others may have it.
        self._has_no_room = False

    def add_request(self, request: Any) -> None:
        self._came_s[request.request_id] = time.monotonic()
        super().add_request(request)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._came_s.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def schedule(self, throttle_prefills: bool = False) -> Any:
        lengths = None if self._has_no_room else self._lengths(time.monotonic())
        if lengths is None:
            output = super().schedule(throttle_prefills)
            self._has_no_room = False
            return output
        output = self._schedule_only(lengths, throttle_prefills)
        self._has_no_room = bool(lengths) and not output.total_num_scheduled_tokens
        return output

    def _schedule_only(self, lengths: range, throttle_prefills: bool) -> Any:
        """An iteration in which prompts of other lengths have no part."""
        parked = [one for one in self.running if one.is_prefill_chunk and one.num_tokens not in lengths]
        everybody = list(self.waiting)
        shown = [one for one in everybody if _reads(one) or one.num_tokens in lengths]
        left_out = set(map(id, parked))
        self.running[:] = [one for one in self.running if id(one) not in left_out]
        self.waiting.clear()
        self.waiting.extend(shown)
        try:
            with self.parked(parked):
                return super().schedule(throttle_prefills)
        finally:
            known, left = set(map(id, everybody)), set(map(id, self.waiting))
            gone = {id(one) for one in shown} - left
            preempted = [one for one in self.waiting if id(one) not in known]
            self.waiting.clear()
            self.waiting.extend(preempted + [one for one in everybody if id(one) not in gone])

    def _lengths(self, now_s: float) -> range | None:
        """Lengths of the prompts whose turn it is; None for all."""
        if not isinstance(self.waiting, deque):  # vLLM's own order by priority was asked for
            return None
        prompts = [one for one in self.running if one.is_prefill_chunk]
        prompts += [one for one in self.waiting if not _reads(one)]
        if not prompts:
            return None
        first_tokens = None
        if isinstance(self, ByDeadline):
            first_tokens = min(prompts, key=lambda one: self.rank(one, now_s)).num_tokens
        lengths = self._batching.turn(
            [
                (one.num_tokens, self._came_s[one.request_id], self._due_s.get(one.request_id, math.inf))
                for one in prompts
            ],
            now_s,
            first_tokens=first_tokens,
            is_idle=not (self.running or self.kv_holding_waiting),
        )
        return None if all(one.num_tokens in lengths for one in prompts) else lengths


def _reads(request: Any) -> bool:
    """Whether its KV is to be read from elsewhere: it computes nothing here."""
    return bool((request.kv_transfer_params or {}).get("do_remote_prefill"))


class LengthScheduler(_ByLength, _Scheduler):  # type: ignore[misc]
    """In place of vLLM's `Scheduler`."""


class AsyncLengthScheduler(_ByLength, _AsyncScheduler):  # type: ignore[misc]
    """In place of vLLM's `AsyncScheduler`."""


class DeadlineLengthScheduler(_ByLength, ByDeadline, _Scheduler):  # type: ignore[misc]
    """The same by deadline."""


class AsyncDeadlineLengthScheduler(_ByLength, ByDeadline, _AsyncScheduler):  # type: ignore[misc]
    """The same by deadline, where vLLM decides the next iteration while one runs."""
