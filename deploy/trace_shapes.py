"""Workloads drawn from distributions fitted to real traces, for where the trace is not at hand."""

from __future__ import annotations

import math
from random import Random

from deploy.workload import WorkloadRequest, fit_to_model

# Log-normal fits (mean and standard deviation of the natural logarithm) and the coefficient of variation of
# the gaps: Azure LLM inference trace 2023, conversation, 19,366 requests (Splitwise, ISCA'24; CC-BY).
CONVERSATION_INPUT = (6.63, 0.99)
CONVERSATION_OUTPUT = (5.02, 0.86)
CONVERSATION_GAP_CV = 1.09


def conversation_like(
    count: int, *, rate_rps: float, max_input: int, max_output: int, rng: Random
) -> list[WorkloadRequest]:
    """`count` requests with the lengths and arrivals of a production conversation service.

    Lengths are drawn from the fits and then scaled down together to at most `max_input` and `max_output`
    tokens (`workload.fit_to_model`); gaps are Gamma distributed with the trace's variation around `rate_rps`.
    """
    shape = 1.0 / CONVERSATION_GAP_CV**2
    arrival_s = 0.0
    requests = []
    for _ in range(count):
        requests.append(
            WorkloadRequest(
                arrival_s=arrival_s,
                input_tokens=_length(CONVERSATION_INPUT, rng),
                output_tokens=_length(CONVERSATION_OUTPUT, rng),
            )
        )
        arrival_s += rng.gammavariate(shape, 1.0 / (rate_rps * shape))
    return fit_to_model(requests, max_model_len=max_input + max_output, max_output=max_output)


def _length(fit: tuple[float, float], rng: Random) -> int:
    return max(1, round(math.exp(rng.gauss(*fit))))
