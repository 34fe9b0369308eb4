"""Admission: a request that will miss its SLO beyond repair is told so at once, instead of waiting for it.

The policy has chosen the best place there is and says how likely the request keeps its bounds there, and how
many of the others' would be lost by it. Where the former is next to impossible it gets nothing by being
served, and where the latter are more, they lose more than it gets.

The last part of the time that a request may wait is reserved, as telephone networks reserve their last lines:
not for tenants that have had more than others who ask as well, and not for classes of lower priority. They
are refused a little sooner, so that the others find room when they come, and nobody while there is much room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from cluster.errors import Rejected, RejectedAsCostly, RejectedForOthers
from cluster.request import ServeRequest
from router.predictor import Prediction
from router.tenants import Tenants

# Who has less would, let in, delay others for an answer that is likely late.
LEAST_CHANCE = 0.15
# Of the time a request may wait: for those within their share, and for those of priority 0 or more important.
RESERVED = 0.3
# Nobody is asked to come back sooner, or to plan for longer.
LEAST_RETRY_S, MOST_RETRY_S = 1.0, 60.0


class Admission:
    """Who is let in."""

    def __init__(self, longest_s: float = math.inf, weights: Mapping[str, float] | None = None) -> None:
        """
        Args:
            longest_s: no prompt may take longer, whatever its SLO: then it would be ended anyway.
            weights: of tenants, where it is not 1.
        """
        self._longest_s = longest_s
        self._tenants = Tenants(weights)

    def require(self, request: ServeRequest, predicted: Prediction | None, now_s: float) -> None:
        """Raises Rejected for a request with next to no chance, RejectedAsCostly for one by which more is
        lost than won, RejectedForOthers for one whose place others shall have; nothing is known of one
        without a prediction."""
        self._tenants.came(request.tenant, now_s)
        if predicted is None:
            return
        self.require_chance(request, predicted)
        if predicted.chance < predicted.harm:
            raise RejectedAsCostly(
                chance=predicted.chance,
                harm=predicted.harm,
                ttft_s=predicted.ttft_s,
                retry_after_s=retry_s(predicted.queue_s),
            )
        limit_s = min(request.slo.ttft_s, self._longest_s)
        why = []
        if self._tenants.is_ahead(request.tenant, now_s):
            limit_s *= 1 - RESERVED
            why.append("this tenant has had more than others that ask")
        if request.priority > 0:
            limit_s *= 1 - RESERVED
            why.append("its priority is lower than others'")
        if why and predicted.ttft_s > limit_s:
            raise RejectedForOthers(
                why=" and ".join(why),
                ttft_s=predicted.ttft_s,
                limit_s=limit_s,
                retry_after_s=retry_s(predicted.ttft_s - limit_s),
            )

    def require_chance(self, request: ServeRequest, predicted: Prediction) -> None:
        """Raises Rejected for a request with next to no chance."""
        if predicted.chance < LEAST_CHANCE or predicted.ttft_s > self._longest_s:
            raise _rejected(request, predicted, min(request.slo.ttft_s, self._longest_s))

    def admitted(self, request: ServeRequest, predicted: Prediction | None) -> None:
        """It will be served."""
        output_tokens = 0 if predicted is None else predicted.output_tokens
        self._tenants.served(request.tenant, len(request.prompt_token_ids), output_tokens)

    def ended(self, request: ServeRequest, predicted: Prediction | None, output_tokens: int) -> None:
        """It was served so much."""
        expected = 0 if predicted is None else predicted.output_tokens
        self._tenants.served(request.tenant, 0, output_tokens - expected)


def saturated(ttft_s: float, bound_s: float) -> Rejected:
    """The rejection of a request of which only its earliest TTFT is known."""
    return Rejected(
        ttft_s=ttft_s,
        tpot_s=0.0,
        ttft_bound_s=bound_s,
        tpot_bound_s=math.inf,
        retry_after_s=retry_s(ttft_s - bound_s),
    )


def _rejected(request: ServeRequest, predicted: Prediction, bound_s: float) -> Rejected:
    late_s = predicted.ttft_s - bound_s
    # Where it is the TPOT: iterations get shorter as answers end, half of the batch's within half an answer.
    wait_s = late_s if late_s > 0 else predicted.tpot_s * predicted.output_tokens / 2
    return Rejected(
        ttft_s=predicted.ttft_s,
        tpot_s=predicted.tpot_s,
        ttft_bound_s=bound_s,
        tpot_bound_s=request.slo.tpot_s,
        retry_after_s=retry_s(wait_s),
    )


def retry_s(wait_s: float) -> int:
    """Whole seconds after which it is worth to come back, for a wait of that many."""
    return math.ceil(max(LEAST_RETRY_S, min(MOST_RETRY_S, wait_s)))
