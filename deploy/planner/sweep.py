"""What if: the planned deployment, and the best without the split, over a range of one thing, as curves.

Like the figures of DistServe (OSDI'24): attainment over the rate, goodput per GPU over how tight the bounds
are, over the length of prompts, or over the number of GPUs, which are planned for anew each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.request import Slo
from deploy.planner.deployment import Deployment
from deploy.planner.goal import Goal, Infeasible
from deploy.planner.plan import Plan
from deploy.planner.trial import Found, goodput, simulate
from deploy.planner.workers import Cores, Here, Workers
from deploy.simulator.facts import Figure
from deploy.simulator.svg_plot import Axis, Plot
from deploy.workload import WorkloadRequest

WHAT = {
    "rate": "requests per second",
    "slo_scale": "bounds, times what was asked",
    "isl": "prompt tokens, mean",
    "gpus": "GPUs",
}
MOST_POINTS = 40
Curve = list[tuple[float, float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A range: `what=from:to:step`, the step a number to add, or a factor such as `2x`.

    Raises ValueError for a text that says none, and for more than 40 points.
    """

    what: str
    values: tuple[float, ...]

    @classmethod
    def of(cls, goal: Goal, text: str) -> Sweep:
        """A range for a goal. Raises ValueError also for one that is not for it."""
        found = cls.parse(text)
        if found.what == "gpus" and goal.fleet:
            raise ValueError("--sweep gpus=... is of one type of GPU: give one --gpu")
        return found

    @classmethod
    def parse(cls, text: str) -> Sweep:
        what, _, span = text.partition("=")
        parts = span.split(":")
        try:
            if what not in WHAT or len(parts) != 3:
                raise ValueError
            low, high = float(parts[0]), float(parts[1])
            factor, step = parts[2].endswith("x"), float(parts[2].removesuffix("x"))
            if not 0 < low < high < math.inf or step <= (1 if factor else 0):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"--sweep is {text!r}, expected one of {', '.join(WHAT)} and a range, as in rate=1:50:2x or "
                "isl=500:4000:500"
            ) from None
        values = [low]
        while len(values) <= MOST_POINTS and (
            following := values[-1] * step if factor else values[-1] + step
        ) <= high * (1 + 1e-9):
            values.append(following)
        if len(values) > MOST_POINTS:
            raise ValueError(f"--sweep is {text!r}: more than {MOST_POINTS} points, take a larger step")
        return cls(what=what, values=tuple(values))


def sweep(
    goal: Goal, made: Plan, text: str, *, jobs: int = 1, say: Callable[[str], None]
) -> tuple[Sweep, dict[str, Curve]]:
    """Simulate a range. Raises ValueError for one that is none."""
    wanted = Sweep.of(goal, text)
    if jobs > 1:
        with Cores(goal, jobs) as cores:
            return wanted, curves_of(goal, made, wanted, cores, say)
    return wanted, curves_of(goal, made, wanted, Here(goal), say)


def curves_of(
    goal: Goal, made: Plan, sweep: Sweep, workers: Workers, say: Callable[[str], None]
) -> dict[str, Curve]:
    """By name of the line: (value, attainment or goodput per GPU); None where nothing holds the bounds."""
    if sweep.what == "gpus":
        return _by_gpus(goal, sweep, workers, say)
    kinds = {"planned": made.chosen.deployment}
    other = made.best_unsplit if made.chosen.deployment.is_split else made.best_split
    if other is not None:
        kinds["unsplit" if made.chosen.deployment.is_split else "split"] = other.deployment
    curves: dict[str, Curve] = {}
    for name, deployment in kinds.items():
        calls = [(sweep.what, value, deployment) for value in sweep.values]
        curves[f"{name}: {deployment}"] = list(zip(sweep.values, workers.map(_point, calls), strict=True))
        say(f"swept {name}")
    return curves


def sweep_figure(goal: Goal, sweep: Sweep, curves: dict[str, Curve]) -> Figure:
    """The curves as a figure."""
    is_share = sweep.what == "rate"
    highest = max(
        (value for curve in curves.values() for _, value in curve if value is not None), default=1.0
    )
    x = Axis.from_zero(WHAT[sweep.what], max(sweep.values))
    y = (
        Axis.from_zero("requests within their SLO", 1.0, "share")
        if is_share
        else Axis.from_zero("goodput, requests/s and GPU", highest)
    )
    title = f"{y.label} over {x.label}"
    plot = Plot(x=x, y=y, about=title)
    for number, (name, curve) in enumerate(curves.items()):
        plot.line(curve, f"c{number}", name)
    if is_share:
        plot.line([(0.0, goal.attainment), (x.high, goal.attainment)], "all", f"asked: {goal.attainment:.0%}")
    legend = [(f"c{number}", name) for number, name in enumerate(curves)]
    return Figure(
        title=title,
        note="Each point is simulated.",
        legend=(*legend, *([("all", "asked")] if is_share else [])),
        svg=plot.svg(),
        lines=True,
        wide=True,
    )


def _point(goal: Goal, what: str, value: float, deployment: Deployment) -> float | None:
    if what == "rate":
        return simulate(goal, deployment, value, 0).attainment
    if what == "slo_scale":
        classes = tuple(
            replace(one, slo=Slo(ttft_s=one.slo.ttft_s * value, tpot_s=one.slo.tpot_s * value))
            for one in goal.classes
        )
        changed = replace(goal, classes=classes)
    else:
        changed = replace(goal, requests=_with_prompts(goal.requests, value, goal.max_model_len))
    found: Found = goodput(changed, deployment, 0, goal.rate_rps)
    return found.per_gpu_rps or None


def _with_prompts(requests: Sequence[WorkloadRequest], mean: float, longest: int) -> list[WorkloadRequest]:
    factor = mean * len(requests) / sum(request.input_tokens for request in requests)
    return [
        replace(
            request,
            input_tokens=max(1, min(longest - request.output_tokens, round(request.input_tokens * factor))),
        )
        for request in requests
    ]


def _by_gpus(goal: Goal, sweep: Sweep, workers: Workers, say: Callable[[str], None]) -> dict[str, Curve]:
    from deploy.planner.search import plan

    curves: dict[str, Curve] = {"split": [], "unsplit": []}
    for value in sweep.values:
        # Any rate will do: the question is what so many GPUs hold.
        asked = replace(goal, gpus=int(value), seeds=1)
        try:
            found = plan(asked, workers=Here(asked), must_hold=False)
        except Infeasible:
            found = None
        for name, best in (("split", found and found.best_split), ("unsplit", found and found.best_unsplit)):
            curves[name].append((value, best.per_gpu_rps if best else None))
        say(f"planned for {int(value)} GPUs")
    return curves
