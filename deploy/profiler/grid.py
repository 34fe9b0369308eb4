"""Which batches `pdserve profile` measures: points of a grid over what an iteration's time depends on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["prefill", "decode", "mixed"]

SHORTEST_PROMPT = 16
# Prompts longer than this fill an iteration on their own, several of them tell nothing new.
LONGEST_PROMPT_OF_SEVERAL = 512
AT_ONCE = (1, 4, 16)
# Near a full cache vLLM preempts, and then the batch is not the one that was asked for.
KV_SHARE = 0.75
# Tokens that decoding requests may get before the last of them has its prompt computed, and while measured.
DECODE_HEADROOM_TOKENS = 160


class Point(NamedTuple):
    """What to measure.

    Attributes:
        kind: prompts alone, decodes alone, or prompts beside decodes.
        requests: prompts at once; for `decode` and `mixed`, decodes in the batch.
        tokens: length of each of their prompts.
        beside: length of the prompts that join the decodes; `mixed` only.
    """

    kind: Kind
    requests: int
    tokens: int
    beside: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far the grid may go.

    Attributes:
        max_prompt: longest prompt, in tokens.
        max_requests: requests at once.
        kv_tokens: capacity of the KV cache.

    Raises ValueError for a grid without points.
    """

    max_prompt: int
    max_requests: int
    kv_tokens: int

    def __post_init__(self) -> None:
        if self.max_prompt < SHORTEST_PROMPT:
            raise ValueError(
                f"max-prompt is {self.max_prompt}, expected at least {SHORTEST_PROMPT}: shorter prompts tell "
                "nothing of the cost of a token"
            )
        if self.max_requests < 1:
            raise ValueError(f"max-concurrency is {self.max_requests}, expected at least 1")

    def fits(self, requests: int, tokens: int) -> bool:
        """Whether so many requests with such prompts can decode without preemption."""
        return requests * (tokens + DECODE_HEADROOM_TOKENS) <= self.kv_tokens * KV_SHARE


def steps(low: int, high: int, factor: int) -> Iterator[int]:
    """`low`, `low` * factor, ... up to `high`, and `high` itself."""
    value = low
    while value < high:
        yield value
        value *= factor
    yield high


def batch_sizes(high: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ... up to `high`, and `high` itself."""
    doublings = [*steps(1, high, 2)]
    return sorted({*doublings, *(size // 2 * 3 for size in doublings if size > 1 and size // 2 * 3 < high)})


def grid(limits: Limits) -> list[Point]:
    """All points within the limits, each once, in a fixed order."""
    points = [
        Point("prefill", requests, tokens)
        for tokens in steps(SHORTEST_PROMPT, limits.max_prompt, 2)
        for requests in AT_ONCE
        if requests == 1 or (tokens <= LONGEST_PROMPT_OF_SEVERAL and requests <= limits.max_requests)
    ]
    points += [
        Point("decode", requests, tokens)
        for tokens in steps(SHORTEST_PROMPT, limits.max_prompt, 8)
        # Long prompts take long to compute before anything can be measured.
        for requests in (
            batch_sizes(limits.max_requests)
            if tokens <= LONGEST_PROMPT_OF_SEVERAL
            else steps(1, limits.max_requests, 4)
        )
        if limits.fits(requests, tokens)
    ]
    half = max(1, limits.max_requests // 2)
    points += [
        Point("mixed", requests, tokens, beside)
        # Large ones too: what is beyond the last counts as if it were the last. The largest has no room.
        for requests in sorted({1, min(4, half), half, max(1, limits.max_requests * 3 // 4)})
        for tokens in (min(128, limits.max_prompt),)
        for beside in sorted({min(64, limits.max_prompt), min(512, limits.max_prompt)})
        if limits.fits(requests + 1, max(tokens, beside))
    ]
    return points
