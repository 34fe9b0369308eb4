"""How long answers will be: quantiles over the answers that ended lately, by class of request.

A mean says little of lengths that spread over two orders of magnitude, and what has not ended yet is longer
than what has: quantiles are of the answers that were longer than what is there already (Past-Future,
LightLLM).
"""

from __future__ import annotations

from bisect import bisect_right

from cluster.length_window import LengthWindow

# Recent enough to follow a change of traffic, many enough for a 95th percentile.
WINDOW = 1000
# With fewer answers of a class, those of all classes say more.
LEAST = 20
# Before anything has ended: conversations' usual length (Azure 2023's conversation trace has a mean of 211).
PRIOR_TOKENS = 256


class OutputLengths:
    """Lengths of answers by class."""

    def __init__(self) -> None:
        self._all = LengthWindow(WINDOW)
        self._of: dict[str, LengthWindow] = {}

    def add(self, slo_class: str, tokens: int) -> None:
        """An answer has ended, complete, with so many tokens."""
        self._all.add(tokens)
        if slo_class not in self._of:
            self._of[slo_class] = LengthWindow(WINDOW)
        self._of[slo_class].add(tokens)

    def quantile(self, slo_class: str, share: float, *, limit: int, generated: int = 0) -> int:
        """Tokens that `share` (0 to 1) of such answers do not exceed, at most `limit`.

        Args:
            limit: the request's `max_tokens`.
            generated: tokens that are there already; the answer is longer.
        """
        lengths = self._lengths(slo_class)
        if not lengths:
            return min(limit, max(PRIOR_TOKENS, 2 * generated))
        first = bisect_right(lengths, generated)
        if first == len(lengths):  # longer than any before it: who has come far goes on
            return min(limit, max(generated + 1, 2 * generated))
        return min(limit, int(lengths[first + int(share * (len(lengths) - 1 - first))]))

    def _lengths(self, slo_class: str) -> list[float]:
        of_class = self._of.get(slo_class)
        if of_class is not None and len(of_class.lengths) >= LEAST:
            return of_class.lengths
        return self._all.lengths
