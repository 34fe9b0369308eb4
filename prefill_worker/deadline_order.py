"""Which prompt a prefill instance computes next: S-EDF, the order of FlowPrefill (arXiv 2602.16603).

Among prompts that can still make their deadlines the earliest one; those without a bound after them; those
that can't make it any more last, since nothing is won by them. The order is asked for before every iteration,
so a long prompt that is under way gives way to a more urgent one between two of its chunks, and keeps its
blocks.
"""

from __future__ import annotations

import math

from cluster.latency import Batch, LatencyModel


class DeadlineOrder:
    """Ranks prompts; the lowest rank is computed first."""

    def __init__(self, latency: LatencyModel) -> None:
        self._latency = latency

    def rank(
        self, left_tokens: int, computed_tokens: int, deadline_s: float, now_s: float
    ) -> tuple[bool, float]:
        """(whether it is too late for it, its deadline).

        Args:
            left_tokens, computed_tokens: of the prompt.
            deadline_s: time by which it shall have its first token, on the clock of `now_s`.
        """
        if deadline_s == math.inf:
            return False, deadline_s
        whole = left_tokens + computed_tokens
        batch = Batch(left_tokens, whole * whole - computed_tokens * computed_tokens, 1)
        return now_s + self._latency.iteration_s(batch) > deadline_s, deadline_s
