"""What would do instead, where what is asked can't be had: the nearest relaxations, each simulated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from cluster.request import Slo
from deploy.planner.deployment import Deployment
from deploy.planner.goal import Goal
from deploy.planner.plan import Candidate
from deploy.planner.trial import Trial, simulate
from deploy.planner.workers import Workers
from deploy.workload import from_zero, percentile, rescale

FACTORS = (1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)


def relaxations(goal: Goal, nearest: Candidate, workers: Workers) -> tuple[str, ...]:
    """Of the deployment that came nearest: the least of each kind with which it holds the rate."""
    deployment, rate = nearest.deployment, goal.rate_rps
    found = []
    if nearest.goodput_rps > 0:
        found.append(f"it holds {nearest.goodput_rps:.3g} requests/s")
    calls = [(kind, factor, deployment) for kind in ("ttft", "tpot", "both") for factor in FACTORS]
    trials = workers.map(_relaxed, calls)
    for kind in ("ttft", "tpot", "both"):
        for (of, factor, _), trial in zip(calls, trials, strict=True):
            if of == kind and trial.attainment >= goal.attainment:
                found.append(f"{_bounds(goal, kind, factor)} would do ({trial.attainment:.1%})")
                break
    found += _more_gpus(goal, nearest, workers)
    longest = percentile([request.input_tokens for request in goal.requests], 99)
    (shorter,) = workers.map(_without_longest, [(deployment, longest)])
    if shorter.attainment >= goal.attainment:
        found.append(
            f"without the 1 % of prompts above {longest:,.0f} tokens it holds {rate:.3g}/s "
            f"({shorter.attainment:.1%}): they are the cause"
        )
    return tuple(found) or ("no single relaxation up to ten times the bounds would do: give more GPUs",)


def _more_gpus(goal: Goal, nearest: Candidate, workers: Workers) -> list[str]:
    known = nearest.goodput_rps or goal.rate_rps / 2
    scale = goal.rate_rps / known
    sizes = [_scaled(nearest.deployment, scale * more) for more in (1.0, 1.1, 1.25, 1.5, 2.0)]
    for size, trial in zip(
        sizes, workers.map(simulate, [(one, goal.rate_rps, 0) for one in sizes]), strict=True
    ):
        if trial.attainment >= goal.attainment:
            return [f"{size.gpus} GPUs would do, as {size} ({trial.attainment:.1%})"]
    return []


def _scaled(one: Deployment, factor: float) -> Deployment:
    return replace(
        one,
        prefill_count=math.ceil(one.prefill_count * factor),
        decode_count=math.ceil(one.decode_count * factor),
    )


def _relaxed(goal: Goal, kind: str, factor: float, deployment: Deployment) -> Trial:
    classes = tuple(replace(one, slo=_loosened(one.slo, kind, factor)) for one in goal.classes)
    return simulate(replace(goal, classes=classes), deployment, goal.rate_rps, 0)


def _loosened(slo: Slo, kind: str, factor: float) -> Slo:
    return Slo(
        ttft_s=slo.ttft_s * (factor if kind in ("ttft", "both") else 1.0),
        tpot_s=slo.tpot_s * (factor if kind in ("tpot", "both") else 1.0),
    )


def _without_longest(goal: Goal, deployment: Deployment, longest: float) -> Trial:
    kept = from_zero([request for request in goal.requests if request.input_tokens <= longest])
    return simulate(
        replace(goal, requests=rescale(kept, rate_rps=goal.rate_rps)), deployment, goal.rate_rps, 0
    )


def _bounds(goal: Goal, kind: str, factor: float) -> str:
    words: list[str] = []
    names: Sequence[str] = ("ttft", "tpot") if kind == "both" else (kind,)
    for name in names:
        before = [getattr(one.slo, f"{name}_s") * 1e3 for one in goal.classes]
        bounded = [bound for bound in before if bound < math.inf]
        if len(bounded) == 1:
            words.append(f"{name.upper()} {bounded[0]:,.4g} -> {bounded[0] * factor:,.4g} ms")
        else:
            words.append(f"{name.upper()} bounds times {factor:g}")
    return " with ".join(words)
