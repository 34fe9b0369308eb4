"""Which prompts share an iteration, and when a short one waits for others: LAPS.

A prompt is short when an instance computes it alone at less than half of its full speed: it pays for weights
that are read whatever is computed. Short ones share iterations with each other and not with chunks of long
ones, for whose computing they would wait. Where both are there and no order says who goes first, they take
turns. On an idle instance short ones wait a little for others to share the cost of an iteration (adaptive
wait): until the window ends, they are enough together, or one of them has little time left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cluster.latency import Batch, LatencyModel

# LAPS finds 6 to 8 ms best.
WINDOW_S = 0.007
# What is short is asked anew after so many decisions: a latency model may be learning.
_DECISIONS_AN_ANSWER = 64
_LONGEST = 1 << 40
ALL: Final = range(_LONGEST)
NOBODY: Final = range(0)


class LengthBatching:
    """Decides whose turn it is.

    Attributes:
        short_tokens: the longest prompt that counts as short.
        held_until_s: when the turn of NOBODY ends, if nothing comes before.
    """

    def __init__(self, latency: LatencyModel, full_tokens: int, window_s: float = WINDOW_S) -> None:
        """
        Args:
            full_tokens: with so many in an iteration an instance has its full speed.
            window_s: how long a short prompt waits for others at most; also what it must have to spare to
                wait at all.
        """
        self._latency = latency
        self._full_tokens = full_tokens
        self._window_s = window_s
        self._decisions = 0
        self._was_short = False
        self.short_tokens = 0
        self.held_until_s = 0.0

    def turn(
        self,
        prompts: Sequence[tuple[int, float, float]],
        now_s: float,
        *,
        first_tokens: int | None,
        is_idle: bool,
    ) -> range:
        """Lengths of the prompts that may be computed in the next iteration.

        Args:
            prompts: that could be, each with all its tokens, when it came, and when its first token is due.
            first_tokens: length of the one that goes first, if there is an order.
            is_idle: whether the instance has nothing else to do.
        """
        if self._decisions % _DECISIONS_AN_ANSWER == 0:
            self.short_tokens = short_tokens(self._latency, self._full_tokens)
        self._decisions += 1
        limit = self.short_tokens
        short = [prompt for prompt in prompts if prompt[0] <= limit]
        if not short:
            self._was_short = False
            return ALL
        if len(short) < len(prompts):
            self._was_short = first_tokens <= limit if first_tokens is not None else not self._was_short
            return range(limit + 1) if self._was_short else range(limit + 1, _LONGEST)
        if is_idle:
            self.held_until_s = self._go_s(short)
            if now_s < self.held_until_s:
                return NOBODY
        self._was_short = True
        return ALL

    def _go_s(self, short: Sequence[tuple[int, float, float]]) -> float:
        """When these are to be computed, if no other comes."""
        first_s = min(came_s for _, came_s, _ in short)
        tokens = sum(count for count, _, _ in short)
        if tokens > self.short_tokens:
            return first_s
        batch = Batch(tokens, sum(count * count for count, _, _ in short), len(short))
        due_s = min(deadline_s for _, _, deadline_s in short)
        return min(first_s + self._window_s, due_s - self._latency.iteration_s(batch) - self._window_s)


def short_tokens(latency: LatencyModel, full_tokens: int) -> int:
    """The longest prompt that is computed alone at less than half the speed of `full_tokens` tokens; 0 where
    none is. LAPS' and DistServe's L_m: where computing begins to take longer than reading the weights."""
    full_s = _alone_s(latency, full_tokens)
    low, high = 0, full_tokens
    while low < high:
        tokens = (low + high + 1) // 2
        if 2 * tokens * full_s < full_tokens * _alone_s(latency, tokens):
            low = tokens
        else:
            high = tokens - 1
    return low


def _alone_s(latency: LatencyModel, tokens: int) -> float:
    return latency.iteration_s(Batch(tokens, tokens * tokens, 1))
