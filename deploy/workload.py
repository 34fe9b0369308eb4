"""Workloads: which request arrives when, and how long its prompt and its answer are.

The value, and what is done with a list of it: change the rate, shrink the lengths for a small model, make the
prompts. Files are read by `deploy.trace_files`; what is drawn, not read, is in `deploy.trace_shapes` and
`deploy.servegen`; `deploy.workload_grammar.make_workload` takes either by its text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

MOONCAKE_TOKENS_PER_HASH = 512  # Mooncake FAST'25 traces, README: one id per block of 512 prompt tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRequest:
    """One request of a workload.

    `arrival_s` counts from the start of the workload. `hash_ids` names the prompt's blocks of
    `tokens_per_hash` tokens each, first block first: equal id means equal prompt up to that block's end.
    `adapter` is the LoRA adapter it asks for, empty for none.
    Raises ValueError for a negative or infinite arrival and for a length below one token.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    session_id: str | None = None
    tokens_per_hash: int = MOONCAKE_TOKENS_PER_HASH
    adapter: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_s < math.inf:
            raise ValueError(f"arrival_s is {self.arrival_s!r}, expected a finite number of seconds >= 0")
        for name in ("input_tokens", "output_tokens", "tokens_per_hash"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected at least 1")


def from_zero(requests: Sequence[WorkloadRequest]) -> list[WorkloadRequest]:
    """The same requests, say a slice of a trace, sorted by arrival and moved so that the first is at 0 s."""
    start_s = min((request.arrival_s for request in requests), default=0.0)
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    return [replace(request, arrival_s=request.arrival_s - start_s) for request in ordered]


def mean_rate_rps(requests: Sequence[WorkloadRequest]) -> float:
    """Gaps per second: (count - 1) / (last arrival - first). ValueError when all arrive at one time."""
    arrivals = [request.arrival_s for request in requests]
    span_s = max(arrivals) - min(arrivals) if arrivals else 0.0
    if span_s <= 0:
        raise ValueError(f"{len(requests)} request(s) with a single arrival time have no rate")
    return (len(arrivals) - 1) / span_s


def rescale(
    requests: Sequence[WorkloadRequest], *, rate_rps: float | None = None, speedup: float | None = None
) -> list[WorkloadRequest]:
    """Stretch or squeeze the arrival times; order, burstiness and lengths stay.

    Give one of `rate_rps` (the new `mean_rate_rps`) and `speedup` (2 halves every arrival time). Raises
    ValueError for none or both, for a value not positive and finite, and for a workload without a rate.
    """
    if rate_rps is not None and speedup is None:
        require_positive("rate_rps", rate_rps)
        speedup = rate_rps / mean_rate_rps(requests)
    elif rate_rps is not None or speedup is None:
        raise ValueError("give either rate_rps or speedup")
    require_positive("speedup", speedup)
    return [replace(request, arrival_s=request.arrival_s / speedup) for request in requests]


def fit_to_model(
    requests: Sequence[WorkloadRequest], *, max_model_len: int, max_output: int
) -> list[WorkloadRequest]:
    """Scale lengths down so that every request fits a small model: a production trace on a tiny one.

    Answers are limited to `max_output` tokens, prompts to the remaining `max_model_len - max_output`.
    Prompts get one factor for the whole workload and answers another, so requests keep their proportions: the
    factor brings the 99th percentile to the limit (never up) and the longest 1 % are capped there; scaling by
    the maximum would let one outlier shrink all others to nothing. At least 1 token remains.
    `tokens_per_hash` shrinks with the prompts, so two prompts go on sharing the same part of their length.
    Arrivals stay. Raises ValueError when the limits leave no room for a prompt or an answer.
    """
    max_input = max_model_len - max_output
    if max_output < 1 or max_input < 1:
        raise ValueError(
            f"max_model_len {max_model_len} with max_output {max_output}: "
            "expected room for at least 1 token of prompt and 1 of answer"
        )
    if not requests:
        return []
    input_factor = min(1.0, max_input / percentile([request.input_tokens for request in requests], 99))
    output_factor = min(1.0, max_output / percentile([request.output_tokens for request in requests], 99))
    block_tokens = min((request.tokens_per_hash for request in requests if request.hash_ids), default=None)
    if block_tokens is not None:  # whole tokens per block, else shared prefixes would drift by rounding
        input_factor = max(1, math.floor(block_tokens * input_factor)) / block_tokens
    fitted = []
    for request in requests:
        input_tokens = _shrink(request.input_tokens, input_factor, max_input)
        tokens_per_hash = request.tokens_per_hash
        if request.hash_ids:
            tokens_per_hash = max(1, round(tokens_per_hash * input_factor))
        fitted.append(
            replace(
                request,
                input_tokens=input_tokens,
                output_tokens=_shrink(request.output_tokens, output_factor, max_output),
                hash_ids=request.hash_ids[: math.ceil(input_tokens / tokens_per_hash)],
                tokens_per_hash=tokens_per_hash,
            )
        )
    return fitted


def prompt_tokens(
    request: WorkloadRequest, index: int, *, seed: int, vocab_low: int, vocab_high: int
) -> list[int]:
    """The prompt of request `index`: `input_tokens` ids, `vocab_low <= id < vocab_high`.

    Equal arguments give equal prompts. Blocks with a hash id depend on the seed and that id only, so prefixes
    are really shared; what the hash ids do not cover depends on seed and index, and is shared with nobody.
    """
    vocab = range(vocab_low, vocab_high)
    tokens: list[int] = []
    for hash_id in request.hash_ids[: math.ceil(request.input_tokens / request.tokens_per_hash)]:
        # A text seed is hashed with SHA-512: equal on every machine, unlike hash().
        tokens += Random(f"{seed}/block/{hash_id}").choices(vocab, k=request.tokens_per_hash)
    del tokens[request.input_tokens :]
    rest = request.input_tokens - len(tokens)
    return tokens + Random(f"{seed}/request/{index}").choices(vocab, k=rest)


def fast_prompt_tokens(request: WorkloadRequest, index: int) -> list[int]:
    """The prompt of request `index` for the simulator: it shares what `prompt_tokens` shares, at no cost.

    A block with a hash id is that id's own token over and over, the rest is the request's own: two hash ids,
    two indices, or a hash id and an index never have a token in common (blocks are even, the rest is odd).
    The tokens exceed any vocabulary, so an engine that computes needs `prompt_tokens`; twins only compare.
    """
    tokens: list[int] = []
    left = request.input_tokens
    block = request.tokens_per_hash
    for hash_id in request.hash_ids:
        if left <= block:
            return tokens + [2 * hash_id] * left
        tokens += [2 * hash_id] * block
        left -= block
    tokens += [2 * index + 1] * left
    return tokens


def percentile(values: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile with linear interpolation (`numpy.percentile`'s default method).

    Raises ValueError for no values and for a percentage outside 0..100.
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent!r} of {len(values)} values")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def require_positive(name: str, value: float) -> None:
    """Raises ValueError for a value that is zero, negative, infinite or no number."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a positive finite number")


def _shrink(tokens: int, factor: float, limit: int) -> int:
    return max(1, min(limit, round(tokens * factor)))
