"""S-EDF in vLLM: its scheduler, with prompts in the order of `deadline_order`, between any two iterations.

vLLM schedules what runs before what waits, so a long prompt under way would go first whatever waits. Prompts
that shall give way are therefore taken out of `running` while an iteration is decided, and put back; their KV
blocks stay theirs. This is preemption at a chunk's end (FlowPrefill, arXiv 2602.16603, has it at operators).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from cluster import vllm_api
from cluster.learned_latency import LearnedLatency
from cluster.wire import DUE_PARAM
from prefill_worker.deadline_order import DeadlineOrder

_Scheduler: Any = vllm_api.Scheduler
_AsyncScheduler: Any = vllm_api.AsyncScheduler


class Timed:
    """What is added to either of vLLM's schedulers to know when requests came and are due, and what prompts
    take here."""

    # vLLM's, used here.
    running: list[Any]
    waiting: Any
    requests: dict[str, Any]
    max_num_active_reqs: int
    lora_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._speed = LearnedLatency()
        self._due_s: dict[str, float] = {}
        # Iterations that were decided and have not ended: (what, prompt tokens, when), the oldest first.
        self._under_way: deque[tuple[Any, int, float]] = deque()
        self._last_end_s = 0.0

    def add_request(self, request: Any) -> None:
        extra = request.sampling_params.extra_args if request.sampling_params is not None else None
        if extra and DUE_PARAM in extra:
            self._due_s[request.request_id] = time.monotonic() + extra[DUE_PARAM]
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, throttle_prefills: bool = False) -> Any:
        now_s = time.monotonic()
        output = super().schedule(throttle_prefills)  # type: ignore[misc]
        self._under_way.append((output, self._prompt_tokens(output), now_s))
        return output

    @contextmanager
    def parked(self, requests: Sequence[Any]) -> Iterator[None]:
        """Decide an iteration without some that run: they are out of `running` already and come back to it.
        They hold their places in the batch, and their adapters' slots: with more adapters running than there
        are slots the engine would end."""
        lora_config = self.lora_config
        self.max_num_active_reqs -= len(requests)
        if lora_config and (held := _adapters(requests) - _adapters(self.running)):
            self.lora_config = SimpleNamespace(max_loras=lora_config.max_loras - len(held))
        try:
            yield
        finally:
            self.max_num_active_reqs += len(requests)
            self.lora_config = lora_config
            self.running.extend(requests)

    def update_from_output(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        now_s = time.monotonic()
        while self._under_way:
            output, tokens, decided_s = self._under_way.popleft()
            if output is scheduled:
                if tokens:
                    self._speed.prefilled(tokens, now_s - max(decided_s, self._last_end_s))
                break
        self._last_end_s = now_s
        return super().update_from_output(scheduled, *args, **kwargs)  # type: ignore[misc]

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._due_s.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def _prompt_tokens(self, output: Any) -> int:
        """Tokens of an iteration that computes prompts only; 0 for any other."""
        for name, tokens in output.num_scheduled_tokens.items():
            if tokens == 1 and not self.requests[name].is_prefill_chunk:
                return 0
        return int(output.total_num_scheduled_tokens)


class ByDeadline(Timed):
    """S-EDF, added to either of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._order = DeadlineOrder(self._speed)
        self._got_stuck = False

    def schedule(self, throttle_prefills: bool = False) -> Any:
        late, hidden = self._give_way(time.monotonic()) if self._due_s else ([], [])
        try:
            with self.parked(late):
                output = super().schedule(throttle_prefills)
        finally:
            self.waiting.extend(hidden)
        # What was to go first may find no memory, and those who gave way have it.
        self._got_stuck = bool(late) and not output.total_num_scheduled_tokens
        return output

    def _give_way(self, now_s: float) -> tuple[list[Any], list[Any]]:
        """Order prompts by rank; take out running ones that rank behind one that waits, and waiting ones
        that rank behind those. Returns both."""
        waiting = self.waiting
        if not isinstance(waiting, deque):  # vLLM's own order by priority was asked for
            return [], []
        prompts = [request for request in self.running if request.is_prefill_chunk]
        ranks = {id(request): self.rank(request, now_s) for request in (*waiting, *prompts)}
        if len(waiting) > 1:
            ordered = sorted(waiting, key=lambda request: ranks[id(request)])
            waiting.clear()
            waiting.extend(ordered)
        if not prompts:
            return [], []
        prompts.sort(key=lambda request: ranks[id(request)])
        late: list[Any] = []
        if waiting and not self._got_stuck:
            first = ranks[id(waiting[0])]
            late = [request for request in prompts if ranks[id(request)] > first]
        going = prompts[: len(prompts) - len(late)]
        self.running[:] = [request for request in self.running if not request.is_prefill_chunk] + going
        hidden: list[Any] = []
        if late:
            limit = ranks[id(late[0])]
            while waiting and not ranks[id(waiting[-1])] < limit:
                hidden.append(waiting.pop())
        return late, hidden[::-1]

    def rank(self, request: Any, now_s: float) -> tuple[bool, float]:
        """Where a prompt stands in the order."""
        left = request.num_tokens - request.num_computed_tokens
        due_s = self._due_s.get(request.request_id, math.inf)
        return self._order.rank(left, request.num_computed_tokens, due_s, now_s)


def _adapters(requests: Iterable[Any]) -> set[int]:
    return {request.lora_request.lora_int_id for request in requests if request.lora_request}


class DeadlineScheduler(ByDeadline, _Scheduler):  # type: ignore[misc]
    """In place of vLLM's `Scheduler`."""


class AsyncDeadlineScheduler(ByDeadline, _AsyncScheduler):  # type: ignore[misc]
    """In place of vLLM's `AsyncScheduler`, which decides the next iteration while one runs."""
