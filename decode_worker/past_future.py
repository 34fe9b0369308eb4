"""Whether one more request will fit, when all of them have grown: the Past-Future scheduler of LightLLM.

Blocks that are free now are not free when the answers under way are long. How long they will be is drawn from
the lengths of answers that ended, given what is there already; from that follows the most memory there will
be at any time, and a request is admitted only if that fits. So nothing is evicted later, and nothing waits
for memory that nobody would have used (Gong et al., ASPLOS'25).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from cluster.length_window import LengthWindow

# Answers that are remembered; to begin with, half of them are as long as they may be.
WINDOW = 200
# Of the memory, kept free for what was drawn too short.
RESERVE = 0.05
# Times that the future is drawn; the worst counts.
SAMPLES = 5


class Growing(NamedTuple):
    """A request that holds memory.

    Attributes:
        tokens: in its KV cache now.
        generated, limit: output tokens so far, and at most.
    """

    tokens: int
    generated: int
    limit: int


class PastFuture:
    """Lengths of answers that ended, and the peak of memory to come."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._window = LengthWindow(WINDOW)
        for _ in range(WINDOW // 2):
            self._window.add(math.inf)

    def ended(self, output_tokens: int) -> None:
        """An answer has ended, complete."""
        self._window.add(output_tokens)

    def fits(self, holding: Sequence[tuple[int, int, int]], capacity_tokens: int) -> bool:
        """Whether these, the new one among them, will fit at all times.

        Args:
            holding: as `Growing`.
        """
        room = capacity_tokens * (1 - RESERVE)
        if sum(tokens + limit - generated for tokens, generated, limit in holding) <= room:
            return True  # whatever their lengths
        return all(self._peak_tokens(holding) <= room for _ in range(SAMPLES))

    def _peak_tokens(self, holding: Sequence[tuple[int, int, int]]) -> int:
        """The most tokens at any time, for lengths that are drawn now."""
        ends = sorted(((self._left(done, limit), tokens) for tokens, done, limit in holding), reverse=True)
        peak = total = 0
        for alive, (left, tokens) in enumerate(ends, 1):
            # When this one ends, those that end later have grown as much as it has.
            total += tokens
            peak = max(peak, left * alive + total)
        return peak

    def _left(self, generated: int, limit: int) -> int:
        """Tokens that an answer will still get: one that ended, longer than what is there."""
        lengths = self._window.lengths
        first = bisect_right(lengths, generated)
        if first == len(lengths):
            return limit - generated
        drawn = lengths[self._rng.randrange(first, len(lengths))]
        return int(min(drawn, limit)) - generated
