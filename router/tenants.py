"""Who has had more than its share: a virtual token counter per tenant.

VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI'24): a counter grows by the tokens that a
tenant is served, output counted twice, divided by its weight; who comes back from a rest begins where the
least served of the others is, so that nobody saves up. There the least counter is served next; here requests
are decided on when they come, so it says who must leave room for others (`admission.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import takewhile

OUTPUT_WEIGHT = 2
# A tenant counts as there for so long after its last request: who is rejected comes back a little later.
ACTIVE_S = 60.0
# Being ahead by less is the size of requests, not of shares.
SLACK_TOKENS = 20_000
# Who is served least is looked up no more often.
LEAST_AGE_S = 0.1
# Tenants that have been away are forgotten when there are more.
MOST_TENANTS = 10_000


class Tenants:
    """The tenants of late."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """
        Args:
            weights: shares of those that have more, or less, than 1.
        """
        self._weights = dict(weights or {})
        # By tenant, in the order in which they last came: (tokens by weight, when it last came).
        self._known: dict[str, tuple[float, float]] = {}
        self._least = 0.0
        self._least_at_s = -math.inf

    def came(self, tenant: str, now_s: float) -> None:
        """A request of the tenant is there, to be served or not."""
        served, last_s = self._known.pop(tenant, (0.0, -ACTIVE_S))
        if now_s - last_s >= ACTIVE_S:
            self._forget(now_s)
            served = max(served, self._least_served(now_s))
            self._least_at_s = -math.inf  # with this one it may be another
        self._known[tenant] = served, now_s

    def served(self, tenant: str, input_tokens: int, output_tokens: int) -> None:
        """So many tokens were, or will be, computed for it; negative ones will not be after all."""
        known = self._known.get(tenant)
        if known is not None:
            tokens = (input_tokens + OUTPUT_WEIGHT * output_tokens) / self._weights.get(tenant, 1.0)
            self._known[tenant] = known[0] + tokens, known[1]

    def is_ahead(self, tenant: str, now_s: float) -> bool:
        """Whether it has had more than another tenant that is there."""
        if len(self._known) < 2:
            return False
        mine, _ = self._known.get(tenant, (0.0, 0.0))
        return mine > self._least_served(now_s) + SLACK_TOKENS / self._weights.get(tenant, 1.0)

    def _least_served(self, now_s: float) -> float:
        """Tokens of the tenant that has had least, of those that are there; 0 without any."""
        if now_s - self._least_at_s >= LEAST_AGE_S:
            active = takewhile(lambda known: now_s - known[1] < ACTIVE_S, reversed(self._known.values()))
            self._least = min((tokens for tokens, _ in active), default=0.0)
            self._least_at_s = now_s
        return self._least

    def _forget(self, now_s: float) -> None:
        while len(self._known) > MOST_TENANTS:
            tenant = next(iter(self._known))
            if now_s - self._known[tenant][1] < ACTIVE_S:
                return
            del self._known[tenant]
