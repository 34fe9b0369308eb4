"""Admission: a request that will miss its SLO beyond repair is told so at once, instead of waiting for it.

The policy has chosen the best place there is and says how likely the request keeps its bounds there. Where
that is next to impossible it gets nothing by being served, and takes from others what would have kept theirs.
"""

from __future__ import annotations

import math

from cluster.errors import Rejected
from cluster.request import ServeRequest
from router.predictor import Prediction

# A rejection shall be right nine times out of ten.
LEAST_CHANCE = 0.1
# Nobody is asked to come back sooner, or to plan for longer.
LEAST_RETRY_S, MOST_RETRY_S = 1.0, 60.0


def require_chance(request: ServeRequest, predicted: Prediction | None) -> None:
    """Raises Rejected for a request with next to no chance; nothing is known of one without a prediction."""
    if predicted is None or predicted.chance >= LEAST_CHANCE:
        return
    slo = request.slo
    late_s = predicted.ttft_s - slo.ttft_s
    # Where it is the TPOT: iterations get shorter as answers end, half of the batch's within half an answer.
    retry_s = late_s if late_s > 0 else predicted.tpot_s * predicted.output_tokens / 2
    raise Rejected(
        ttft_s=predicted.ttft_s,
        tpot_s=predicted.tpot_s,
        ttft_bound_s=slo.ttft_s,
        tpot_bound_s=slo.tpot_s,
        retry_after_s=math.ceil(max(LEAST_RETRY_S, min(MOST_RETRY_S, retry_s))),
    )
