"""Workloads drawn from distributions: steady arrivals with a given variation, and lengths that are fixed, a
file's, or fitted to a real trace.

Arrivals and lengths are separate draws, so that a caller who gives each its own generator compares two rates
on the same requests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random

from deploy.workload import WorkloadRequest, fit_to_model, require_positive

# Log-normal fits (mean and standard deviation of the natural logarithm) and the coefficient of variation of
# the gaps: Azure LLM inference trace 2023, conversation, 19,366 requests (Splitwise, ISCA'24; CC-BY).
CONVERSATION_INPUT = (6.63, 0.99)
CONVERSATION_OUTPUT = (5.02, 0.86)
CONVERSATION_GAP_CV = 1.09

# Beyond 1000 nearly every gap is zero and one in a million is a million means: no process of requests.
MIN_CV, MAX_CV = 0.001, 1000.0

Lengths = Callable[[Random], tuple[int, int]]
"""Draws (prompt, answer) in tokens."""


def fixed_lengths(input_tokens: int, output_tokens: int) -> Lengths:
    """Every request alike."""
    return lambda rng: (input_tokens, output_tokens)


def empirical_lengths(lengths: Sequence[tuple[int, int]]) -> Lengths:
    """Pairs of `lengths` with replacement: a prompt keeps its answer, as the two are correlated."""
    return lambda rng: rng.choice(lengths)


def conversation_lengths(rng: Random) -> tuple[int, int]:
    """(prompt, answer) in tokens as the fits of the Azure conversation trace have them."""
    return _length(CONVERSATION_INPUT, rng), _length(CONVERSATION_OUTPUT, rng)


def gamma_gap(rate_rps: float, cv: float) -> tuple[float, float]:
    """(shape, scale in s) of Gamma distributed gaps of mean 1/`rate_rps` s and coefficient of variation `cv`.

    Raises ValueError for a rate that is not positive and finite and for a `cv` outside `MIN_CV`..`MAX_CV`.
    """
    require_positive("rate_rps", rate_rps)
    if not MIN_CV <= cv <= MAX_CV:
        raise ValueError(f"cv is {cv!r}, expected {MIN_CV:g} to {MAX_CV:g}")
    return 1.0 / cv**2, cv**2 / rate_rps


def steady_arrivals_s(rate_rps: float, cv: float, rng: Random) -> Iterator[float]:
    """Arrival times without end, the first at 0 s: one rate, independent gaps of variation `cv`.

    0 is a metronome, 1 a Poisson process, anything else has Gamma distributed gaps. The same generator state
    gives the same gaps, in units of their mean, at any rate. Errors as `gamma_gap`.
    """
    if cv == 0.0:
        require_positive("rate_rps", rate_rps)
        yield from (n / rate_rps for n in itertools.count())
    shape, scale = gamma_gap(rate_rps, cv)
    arrival_s = 0.0
    while True:
        yield arrival_s
        arrival_s += rng.gammavariate(shape, scale)


def with_lengths(arrivals_s: Iterable[float], lengths: Lengths, rng: Random) -> list[WorkloadRequest]:
    """One request per arrival time."""
    requests = []
    for arrival_s in arrivals_s:
        input_tokens, output_tokens = lengths(rng)
        requests.append(
            WorkloadRequest(arrival_s=arrival_s, input_tokens=input_tokens, output_tokens=output_tokens)
        )
    return requests


def conversation_like(
    count: int, *, rate_rps: float, max_input: int, max_output: int, rng: Random
) -> list[WorkloadRequest]:
    """`count` requests with the lengths and arrivals of a production conversation service.

    Lengths are drawn from the fits and then scaled down together to at most `max_input` and `max_output`
    tokens (`workload.fit_to_model`); gaps are Gamma distributed with the trace's variation around `rate_rps`.
    """
    arrivals_s = steady_arrivals_s(rate_rps, CONVERSATION_GAP_CV, rng)
    requests = with_lengths(itertools.islice(arrivals_s, count), conversation_lengths, rng)
    return fit_to_model(requests, max_model_len=max_input + max_output, max_output=max_output)


def _length(fit: tuple[float, float], rng: Random) -> int:
    return max(1, round(math.exp(rng.gauss(*fit))))
