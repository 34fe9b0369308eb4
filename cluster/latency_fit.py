"""Fit the costs of a latency profile to measured iterations.

The costs are linear in what a batch holds and can't be negative, so each segment is a nonnegative
least-squares problem of at most four unknowns. It is solved exactly, by trying every set of nonzero unknowns,
which needs no numerical library. Relative errors are minimised, in absolute value: a step that a neighbour on
the machine disturbed shall not move the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from statistics import fmean, median
from typing import NamedTuple, TypeVar

from cluster.latency import Batch, DecodeCost, LatencyModel, PrefillCost, Residuals

Sample = tuple[Batch, float]  # what an iteration computed, and the seconds it took

MAX_SEGMENTS = 3
_LEAST_SIZES = 3  # different sizes on either side of a split: a line through two points fits any noise
_MOST_SPLITS = 24  # places at which a split is tried
_LEAST_GAIN = 0.25  # part of the mean relative error that a split must take away
_LEAST_ERROR = 0.01  # mean relative error that is good enough without a split
_LARGEST_DROP = 0.05  # how much faster a batch just above a split may come out than one just below it
_ROUNDS = 10  # of reweighting
_FLOOR = 0.01  # relative error below which one is as good as none, when reweighting
_SINGULAR = 1e-9  # of a pivot, in columns of unit length

_Row = tuple[float, ...]
_Cost = TypeVar("_Cost", PrefillCost, DecodeCost)


def fit_prefill(
    samples: Sequence[Sample], max_segments: int = MAX_SEGMENTS
) -> tuple[tuple[PrefillCost, ...], Residuals]:
    """Costs of iterations with prompt tokens and no decodes, in segments by prompt tokens.

    Attention and request costs are told from the token cost only if the samples hold chunks of several
    lengths and contexts in batches of about equal tokens; otherwise they come out as 0.
    Raises ValueError for fewer than three sizes, a batch without prompt tokens or with decodes, and a time
    that is not positive.
    """
    for batch, _ in samples:
        if not batch.prefill_tokens or batch.decode_requests:
            raise ValueError(f"{batch} is no prefill iteration: it needs prompt tokens and no decodes")
    segments = _fit_segments(samples, _prefill_row, max_segments)
    return tuple(
        PrefillCost(up_to_tokens=upper, base_s=c[0], token_s=c[1], attention_s=c[2], request_s=c[3])
        for upper, c in segments
    ), _residuals(samples, segments, _prefill_row)


def fit_decode(
    samples: Sequence[Sample], max_segments: int = MAX_SEGMENTS
) -> tuple[tuple[DecodeCost, ...], Residuals]:
    """Costs of iterations with decodes only, in segments by requests.

    Raises ValueError for fewer than three sizes, a batch without decodes or with prompt tokens, and a time
    that is not positive.
    """
    for batch, _ in samples:
        if not batch.decode_requests or batch.prefill_tokens:
            raise ValueError(f"{batch} is no decode iteration: it needs decodes and no prompt tokens")
    segments = _fit_segments(samples, _decode_row, max_segments)
    return tuple(
        DecodeCost(up_to_requests=upper, base_s=c[0], request_s=c[1], context_s=c[2]) for upper, c in segments
    ), _residuals(samples, segments, _decode_row)


def fit_decode_levels(samples: Sequence[Sample]) -> tuple[DecodeCost, ...]:
    """Costs of iterations with decodes only, with a level for each batch size that was measured.

    Libraries choose kernels by the number of rows, and one for four may be faster than the one for two, which
    no straight line shows. Raises as `fit_decode`.
    """
    (line,), _ = fit_decode(samples, 1)
    by_size: dict[int, list[float]] = {}
    for batch, seconds in samples:
        rest_s = seconds - batch.decode_context_tokens * line.context_s
        by_size.setdefault(batch.decode_requests, []).append(rest_s)
    sizes_s = {size: max(0.0, fmean(values)) for size, values in sorted(by_size.items())}
    base_s = min(sizes_s.values())
    levels = tuple((size, seconds - base_s) for size, seconds in sizes_s.items())
    return (line.model_copy(update={"base_s": base_s, "levels": levels}),)


def residuals_of(model: LatencyModel, samples: Sequence[Sample]) -> Residuals:
    """Relative errors of any model on samples, say held-out or mixed ones. ValueError without any."""
    return summarise([model.iteration_s(batch) / seconds - 1 for batch, seconds in samples])


def summarise(errors: Sequence[float]) -> Residuals:
    """Median and 90th percentile of the absolute relative errors, and their mean with sign."""
    if not errors:
        raise ValueError("no iterations, expected at least one")
    sizes = sorted(map(abs, errors))
    p90 = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
    return Residuals(samples=len(sizes), median=median(sizes), p90=p90, bias=fmean(errors))


def usual(values: Sequence[float]) -> float:
    """The mean without what took more than twice the median.

    Times add up, so that what follows from them follows from means; and times are skewed, so that a median is
    less than the mean. What is far off was a disturbance and would make a mean of few say nothing else.
    """
    middle = median(values)
    return fmean(value for value in values if value <= middle + abs(middle))


def nonnegative_fit(rows: Sequence[_Row], targets: Sequence[float]) -> tuple[float, ...]:
    """The x >= 0 that minimises sum |rows x - targets| / targets; at most five unknowns, targets positive.

    By iteratively reweighted least squares. Raises ValueError for targets that are not positive.
    """
    if min(targets) <= 0:
        raise ValueError(f"a time of {min(targets)!r} s, expected times above 0")
    scaled = [tuple(v / target for v in row) for row, target in zip(rows, targets, strict=True)]
    weights = [1.0] * len(scaled)
    x = _nonnegative_least_squares(scaled, weights)
    for _ in range(_ROUNDS):
        weights = [1 / max(abs(_dot(row, x) - 1), _FLOOR) for row in scaled]
        x = _nonnegative_least_squares(scaled, weights)
    return x


class _Segment(NamedTuple):
    upper: int | None  # largest size it holds for
    x: tuple[float, ...]


def _prefill_row(batch: Batch) -> _Row:
    return (1.0, batch.prefill_tokens, batch.prefill_attention, batch.prefill_requests)


def _decode_row(batch: Batch) -> _Row:
    return (1.0, batch.decode_requests, batch.decode_context_tokens)


def _fit_segments(
    samples: Sequence[Sample], row_of: Callable[[Batch], _Row], max_segments: int
) -> list[_Segment]:
    """Fit one segment, then split the one whose split helps most, while that helps enough.

    The size that segments go by is the row's second entry.
    """
    points = sorted(((row_of(batch), seconds) for batch, seconds in samples), key=lambda p: p[0][1])
    if len({row[1] for row, _ in points}) < _LEAST_SIZES:
        raise ValueError(f"{len(points)} iterations, expected at least {_LEAST_SIZES} different sizes")
    parts = [(points, _fit(points))]
    while len(parts) < max_segments:
        splits = [
            (gain, at, low, high)
            for at, (inside, x) in enumerate(parts)
            for gain, low, high in _splits(inside, x)
        ]
        if not splits:
            break
        _, at, low, high = max(splits, key=lambda split: split[0])
        parts[at : at + 1] = [(low, _fit(low)), (high, _fit(high))]
    # Half-way in ratio: sizes are measured in doublings, and nothing says where one between them belongs.
    uppers = [int(math.sqrt(low[-1][0][1] * high[0][0][1]) + 0.5) for (low, _), (high, _) in pairwise(parts)]
    return [_Segment(upper, x) for upper, (_, x) in zip([*uppers, None], parts, strict=True)]


_Points = list[tuple[_Row, float]]


def _fit(points: _Points) -> tuple[float, ...]:
    return nonnegative_fit([row for row, _ in points], [seconds for _, seconds in points])


def _splits(points: _Points, x: tuple[float, ...]) -> list[tuple[float, _Points, _Points]]:
    """Splits of a segment that are worth it: (summed relative error they take away, lower, upper part)."""
    error = _error(points, x)
    if error < _LEAST_ERROR * len(points):
        return []
    sizes = sorted({row[1] for row, _ in points})[_LEAST_SIZES - 1 : -_LEAST_SIZES]
    found = []
    for size in sizes[:: max(1, len(sizes) // _MOST_SPLITS)]:
        low = [point for point in points if point[0][1] <= size]
        high = points[len(low) :]
        below, above = _fit(low), _fit(high)
        gain = error - _error(low, below) - _error(high, above)
        edge = low[-1][0]
        if gain > _LEAST_GAIN * error and _dot(edge, above) >= (1 - _LARGEST_DROP) * _dot(edge, below):
            found.append((gain, low, high))
    return found


def _error(points: _Points, x: tuple[float, ...]) -> float:
    return sum(abs(_dot(row, x) / seconds - 1) for row, seconds in points)


def _residuals(
    samples: Sequence[Sample], segments: Sequence[_Segment], row_of: Callable[[Batch], _Row]
) -> Residuals:
    errors = []
    for batch, seconds in samples:
        row = row_of(batch)
        x = next(s.x for s in segments if s.upper is None or row[1] <= s.upper)
        errors.append(_dot(row, x) / seconds - 1)
    return summarise(errors)


def _dot(row: _Row, x: tuple[float, ...]) -> float:
    return sum(a * b for a, b in zip(row, x, strict=True))


def _nonnegative_least_squares(rows: Sequence[_Row], weights: Sequence[float]) -> tuple[float, ...]:
    """The x >= 0 that minimises sum of weight * (row x - 1)^2.

    The problem is convex: among the unconstrained optima over all subsets of columns, the feasible one with
    the least error is the optimum (Lawson and Hanson 1974, chapter 23, find it without trying all).
    """
    width = len(rows[0])
    scale = [sum(w * row[i] ** 2 for row, w in zip(rows, weights, strict=True)) ** 0.5 for i in range(width)]
    used = [i for i in range(width) if scale[i] > 0]
    gram = {
        (i, j): sum(w * row[i] * row[j] for row, w in zip(rows, weights, strict=True)) / scale[i] / scale[j]
        for i in used
        for j in used
        if i <= j
    }
    right = {i: sum(w * row[i] for row, w in zip(rows, weights, strict=True)) / scale[i] for i in used}
    best, best_gain = dict.fromkeys(used, 0.0), 0.0
    for count in range(1, len(used) + 1):
        for chosen in combinations(used, count):
            solved = _solve([[gram[min(i, j), max(i, j)] for j in chosen] for i in chosen], chosen, right)
            if solved and min(solved) >= 0:
                # At an optimum of a subset the error is a constant less this.
                gain = sum(right[i] * value for i, value in zip(chosen, solved, strict=True))
                if gain > best_gain * (1 + 1e-12):
                    best, best_gain = dict(zip(chosen, solved, strict=True)), gain
    return tuple(best.get(i, 0.0) / scale[i] if scale[i] > 0 else 0.0 for i in range(width))


def _solve(matrix: list[list[float]], chosen: tuple[int, ...], right: dict[int, float]) -> list[float]:
    """Solve a symmetric positive definite system by elimination; empty when it is singular."""
    size = len(matrix)
    rows = [[*line, right[i]] for line, i in zip(matrix, chosen, strict=True)]
    for k in range(size):
        if rows[k][k] < _SINGULAR:
            return []
        for below in rows[k + 1 :]:
            factor = below[k] / rows[k][k]
            for j in range(k, size + 1):
                below[j] -= factor * rows[k][j]
    x = [0.0] * size
    for k in reversed(range(size)):
        x[k] = (rows[k][size] - sum(rows[k][j] * x[j] for j in range(k + 1, size))) / rows[k][k]
    return x
