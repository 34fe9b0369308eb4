"""A hop: one stay of a request on one engine, and what its outputs mean for the client."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Protocol

from cluster.errors import EngineFailure, ReplayDiverged, ServingError
from cluster.handle import Follower, KvHandle, follow, handle_of, keep_for_reader
from cluster.request import ServeRequest
from cluster.wire import FINISH_ABORT, FINISH_ERROR, FINISH_LENGTH, GoOn, Offer


class HopKind(StrEnum):
    """PREFILL: one token, blocks kept for a reader. DECODE: reads them first. WHOLE: both phases here."""

    PREFILL = "prefill"
    DECODE = "decode"
    WHOLE = "whole"


class EngineOutput(Protocol):
    """The part of vLLM's `EngineCoreOutput` (or `wire.TokenOutput`) that the router reads and writes."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: Any
    finish_reason: Any
    stop_reason: Any
    events: Any
    kv_transfer_params: Any
    prefill_stats: Any


class Hop:
    """One stay on one engine.

    Attributes:
        hop_id: the engine's request id, unique per hop: a second request of the same id kills an engine.
        prompt_token_ids: the request's prompt and what was generated elsewhere.
        generated: the request's output tokens that went to the client; one list for all its hops.
        cached_tokens: of its prompt, that need no computing there as far as is known.
        deadline_s: loop time by which the client shall have its first token; infinite where it has one.
        keep_s: how long its blocks are worth keeping when it has ended.
        swallow: output tokens that the client has already, generated again here (replay).
        deliver: whether its tokens go to the client.
        source: the hop whose blocks it reads.
        follows: tokens that a decode sent while its prompt is computed will read; 0 once it has its prompt.
        unknown: how many of them at its prompt's end only keep places of tokens that are not there yet.
        follower: of a prefill, where its engine tells how far it is.
        hands_over: whether its engine was told to keep its blocks for another: always of a prefill.
        handle: the blocks it kept, when it has ended and its engine did.
        is_first: whether the client had nothing of this request when the hop began.
        is_last: whether its last output ended the request.
        engine_ended: whether the engine said it ended; one that timed out may still be running there.
        stats: the engine's prefill statistics, known when it has started.
        has_started: whether the engine gave a first output; a decode has then read its blocks.
        has_ended: whether it gave its last output, or an error ended it.
    """

    __slots__ = (
        "_error",
        "_overdue_after_s",
        "_timer",
        "_waiter",
        "cached_tokens",
        "deadline_s",
        "deliver",
        "engine_ended",
        "follower",
        "follows",
        "generated",
        "handle",
        "hands_over",
        "has_ended",
        "has_started",
        "hop_id",
        "instance_id",
        "is_first",
        "is_last",
        "keep_s",
        "kind",
        "max_tokens",
        "progress_s",
        "prompt_token_ids",
        "request",
        "source",
        "stats",
        "swallow",
        "unknown",
    )

    def __init__(
        self,
        *,
        hop_id: str,
        instance_id: str,
        kind: HopKind,
        request: ServeRequest,
        prompt_token_ids: list[int],
        generated: list[int],
        max_tokens: int,
        deliver: bool,
        swallow: int,
        source: Hop | None = None,
        cached_tokens: int = 0,
        deadline_s: float = math.inf,
        keep_s: float = 0.0,
    ) -> None:
        self.hop_id = hop_id
        self.instance_id = instance_id
        self.kind = kind
        self.request = request
        self.prompt_token_ids = prompt_token_ids
        self.generated = generated
        self.max_tokens = max_tokens
        self.deliver = deliver
        self.swallow = swallow
        self.source = source
        self.cached_tokens = cached_tokens
        self.deadline_s = deadline_s
        self.keep_s = keep_s
        self.follows = self.unknown = 0
        self.follower: Follower | None = None
        self.hands_over = kind is HopKind.PREFILL
        self.handle: KvHandle | None = None
        self.is_first = not generated
        self.is_last = False
        self.engine_ended = False
        self.stats: Any = None
        self.progress_s = 0.0
        self.has_started = False
        self.has_ended = False
        self._error: ServingError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._overdue_after_s = 0.0

    @property
    def kv_params(self) -> Mapping[str, Any] | None:
        """What its engine shall do with KV, as `kv_transfer_params`."""
        if self.kind is HopKind.PREFILL:
            return keep_for_reader(self.follower)
        if self.follows:
            return follow(self.follows, self.unknown)
        return (
            self.source.handle.params if self.source is not None and self.source.handle is not None else None
        )

    @property
    def awaits(self) -> bool:
        """Whether its source's last token will belong to its prompt, as one more."""
        return self.follows > 0 and self.source is not None and self.source.deliver

    def follow(self, news_address: str, tokens: int = 1) -> None:
        """Before it is sent: let its engine read what its source computes meanwhile, until `go_on`.

        Args:
            tokens: which its source gives until then.
        """
        assert self.source is not None
        if self.source.kind is HopKind.PREFILL:
            self.follows = len(self.source.prompt_token_ids)
        else:
            self.unknown = tokens - 1
            self.prompt_token_ids = self.prompt_token_ids + [0] * self.unknown
            self.follows = len(self.prompt_token_ids)
        if self.awaits:
            self.max_tokens -= tokens
            self.is_first = False
        self.source.follower = Follower(news_address, self.hop_id)

    def go_on(self, handle: KvHandle, now_s: float) -> GoOn:
        """Its prompt is computed: what to tell its engine."""
        replaces = self.unknown
        token_ids = self.generated[-1 - replaces :] if self.awaits else []
        known = len(self.prompt_token_ids) - replaces
        self.prompt_token_ids = self.prompt_token_ids[:known] + token_ids
        self.follows = self.unknown = 0
        self.progress_s = now_s
        return GoOn(self.hop_id, token_ids, dict(handle.params), replaces)

    def offer(self, now_s: float) -> Offer:
        """How the instance is asked to take it."""
        reads = self.kind is HopKind.DECODE
        return Offer(
            request_id=self.hop_id,
            tokens=1 if reads else max(1, len(self.prompt_token_ids) - self.cached_tokens),
            due_in_s=None if self.deadline_s == math.inf else self.deadline_s - now_s,
            must_take=reads or bool(self.generated),
        )

    def waits_for(self, instance_id: str) -> bool:
        """Whether it can't go on without that instance."""
        if self.instance_id == instance_id:
            return True
        return self.source is not None and self.source.instance_id == instance_id and not self.has_started

    def fail(self, error: ServingError) -> None:
        """End it with an error, unless it has ended."""
        if not self.has_ended:
            self._error = error
            self.has_ended = True
            self._wake()

    async def until_started(self, deadline_s: float) -> None:
        """Wait for the first output, at most so long after the last progress. Raises TimeoutError, and the
        error that ended it."""
        if not (self.has_started or self.has_ended):
            await self._news(deadline_s)
        if not self.has_started and self._error is not None:
            raise self._error

    async def until_ended(self, stall_s: float) -> None:
        """Wait for the last output, at most so long for each. Raises as `until_started`."""
        if not self.has_ended:
            await self._news(stall_s)
        if self._error is not None:
            raise self._error

    def receive(self, output: EngineOutput, now_s: float) -> EngineOutput | None:
        """Take one output of the engine; returns it rewritten for the client, or None if none of it is
        for the client."""
        if self.has_ended:
            return None
        self.progress_s = now_s
        finish = output.finish_reason
        self.engine_ended = finish is not None
        if finish in (FINISH_ERROR, FINISH_ABORT):
            self.fail(self._failure(output))
            return None
        if not self.has_started:
            self.stats = output.prefill_stats
            self.has_started = True
            self._wake()
        if finish is not None and self.hands_over:
            self.handle = handle_of(output.kv_transfer_params)
        self.is_last = finish is not None and not self._goes_on(output)
        forward = self._for_client(output) if self.deliver else None
        if finish is not None and not self.has_ended:
            self.has_ended = True
            self._wake()
        return forward

    def _goes_on(self, output: EngineOutput) -> bool:
        """Whether the request goes on at another engine after this last output."""
        if output.finish_reason != FINISH_LENGTH:
            return False
        if self.kind is HopKind.PREFILL:
            return True
        # Told to, the engine ends a request earlier than its client asked for; or it had all its tokens.
        left = self.request.max_tokens - len(self.generated) - len(output.new_token_ids)
        return self.handle is not None and left > 0

    # A wait is one future and one timer: `asyncio.timeout` around a shielded future would be two futures, a
    # callback between them and a timer for every wait, and every request waits four times.

    async def _news(self, deadline_s: float) -> None:
        """Wait until it starts or ends."""
        loop = asyncio.get_running_loop()
        self._overdue_after_s = deadline_s
        self._waiter = loop.create_future()
        self._timer = loop.call_at(self.progress_s + deadline_s, self._expire)
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _expire(self) -> None:
        if self._waiter is None or self._waiter.done():
            return
        loop = asyncio.get_running_loop()
        due_s = self.progress_s + self._overdue_after_s
        if loop.time() < due_s:  # there was progress since
            self._timer = loop.call_at(due_s, self._expire)
        else:
            self._waiter.set_exception(TimeoutError())

    def _failure(self, output: EngineOutput) -> ServingError:
        detail = "the engine aborted it"
        if output.finish_reason == FINISH_ERROR:
            detail = str(output.stop_reason or "internal engine error")
        return EngineFailure(instance=self.instance_id, stage=self.kind.value, detail=detail)

    def _for_client(self, output: EngineOutput) -> EngineOutput | None:
        if self.swallow and not self._swallowed(output):
            return None
        self.generated.extend(output.new_token_ids)
        output.request_id = self.request.request_id
        output.kv_transfer_params = None
        if not self.is_first:
            # Queue times and prefill counts of later hops would be counted as the request's own.
            output.events = None
            output.prefill_stats = None
        elif output.prefill_stats is not None and self.source is not None:
            output.prefill_stats = self.source.stats
        if not self.is_last:
            output.finish_reason = None  # the limit of one token of a prefill is ours, not the client's
        return output

    def _swallowed(self, output: EngineOutput) -> bool:
        """Drop tokens the client has; True when something is left of the output."""
        tokens = output.new_token_ids
        position = len(self.generated) - self.swallow
        known = self.generated[position : position + len(tokens)]
        if tokens[: len(known)] != known:
            differing = next(
                i for i, pair in enumerate(zip(tokens, known, strict=False)) if pair[0] != pair[1]
            )
            self.fail(ReplayDiverged(position=position + differing, instance=self.instance_id))
            self.deliver = False
            return False
        self.swallow -= len(known)
        rest = len(tokens) - len(known)
        if rest == 0 and output.finish_reason is None:
            return False
        if output.new_logprobs is not None:
            output.new_logprobs = output.new_logprobs.slice_request(len(known), rest) if rest else None
        output.new_token_ids = tokens[len(known) :]
        return True
