"""The search: order candidates by what they could do at most, then let the simulator decide.

A candidate is tried at the best rate per GPU that was found so far: most lose by that one run. Those that
hold it are followed upwards. They are tried in rounds of equal size whatever the number of cores, so that
the plan does not depend on it. The placements are DistServe's (OSDI'24, algorithms 1 and 2), with the pools'
ratio in closed form as the start (P/D-Serve), and no candidate is judged by a formula alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean

from deploy.planner.capacity import Capacity, front, neighbours, splits, unsplits
from deploy.planner.deployment import Deployment, Layout
from deploy.planner.goal import Goal, Infeasible
from deploy.planner.plan import Candidate, Plan
from deploy.planner.price import price_of, within_power
from deploy.planner.relax import relaxations
from deploy.planner.trial import TOLERANCE, Found, goodput, simulate
from deploy.planner.workers import Cores, Here, Workers

# Candidates tried side by side against one best.
ROUND = 4
# Requests that are refused free more than their number: what closed forms allow is no hard bound.
BEYOND = 1.35
# Of the best found, so many are judged by further parts of the workload.
FINALISTS = 3
# More GPUs than that are planned for as copies of a part, which is then tried whole.
PART_GPUS = 64

Say = Callable[[str], None]


@dataclass(slots=True)
class _Race:
    """The goodput of candidates against each other.

    Attributes:
        found: by candidate, those that held what was asked of them.
        lost: by candidate, the others, at the rate that they did not hold.
        unseen: candidates that can't be better by closed form.
    """

    goal: Goal
    capacity: Capacity
    workers: Workers
    say: Say
    found: dict[Deployment, Found] = field(default_factory=dict)
    lost: dict[Deployment, Found] = field(default_factory=dict)
    unseen: list[Deployment] = field(default_factory=list)

    @property
    def best(self) -> Found | None:
        return max(self.found.values(), key=lambda one: (one.per_gpu_rps, -one.deployment.gpus), default=None)

    def run(self, candidates: Sequence[Deployment]) -> None:
        """Try candidates, the most promising first."""
        left = [one for one in candidates if one not in self.found and one not in self.lost]
        while left:
            best = self.best
            rate = best.per_gpu_rps * (1 + TOLERANCE) if best else 0.0
            hopeful = [one for one in left if BEYOND * self.capacity.most_rps(one) / one.gpus >= rate]
            self.unseen += [one for one in left if one not in hopeful]
            tried, left = hopeful[:ROUND], hopeful[ROUND:]
            if not best:  # the first alone says what the others have to hold
                tried, left = hopeful[:1], hopeful[1:]
            calls = [(one, 0, 0.6 * self.capacity.rps(one), rate * one.gpus) for one in tried]
            for one, result in zip(tried, self.workers.map(goodput, calls), strict=True):
                held = result.rate_rps > 0
                (self.found if held else self.lost)[one] = result
                how = f"{result.per_gpu_rps:.3g}/s and GPU" if held else f"less than {rate:.3g}/s and GPU"
                self.say(f"{one}: {how}")


def plan(
    goal: Goal,
    *,
    jobs: int = 1,
    workers: Workers | None = None,
    must_hold: bool = True,
    say: Say = lambda line: None,
) -> Plan:
    """Find the deployment for a goal.

    Args:
        jobs: processes that simulate; the plan is the same for any number.
        workers: where to simulate instead, say on a Ray cluster.
        must_hold: whether a plan that does not hold the workload's rate is none.
        say: told of progress, line by line.

    Raises:
        Infeasible: no deployment within the GPUs holds the rate, with the nearest relaxations that would.
        SpecError: what is asked can't be said in a spec.
    """
    if workers is not None or jobs <= 1:
        workers = workers or Here(goal)
        return _checked(goal, _planned(goal, workers, say), workers if must_hold else None)
    with Cores(goal, jobs) as cores:
        return _checked(goal, _planned(goal, cores, say), cores if must_hold else None)


def _planned(goal: Goal, workers: Workers, say: Say) -> Plan:
    capacity = Capacity(goal)
    layouts = capacity.layouts()
    capacity.require_possible(layouts)
    copies = max(1, math.ceil(goal.room.gpus / PART_GPUS))
    if goal.fleet:  # of each type a part has a node, or what there is
        copies = min(copies, *(count // min(count, goal.gpus_per_node) for count in goal.fleet.values()))
    part = goal.room.part(copies)
    say(f"{goal.describe_workload()}; layouts {', '.join(map(str, layouts))}; {goal.room}")
    if goal.objective != "goodput_per_gpu":
        return _cheapest(goal, capacity, layouts, workers, say)
    # Of a part, its part of the power.
    share = replace(goal, max_watts={pool: cap / copies for pool, cap in goal.max_watts.items()})
    allowed = partial(within_power, share)
    split = _Race(goal, capacity, workers, say)
    split.run(splits(capacity, layouts, part, allowed))
    for _ in range(3):
        if split.best is None:
            break
        known = len(split.found) + len(split.lost)
        split.run(neighbours(capacity, split.best.deployment, part, allowed))
        if known == len(split.found) + len(split.lost):
            break
    unsplit = _Race(goal, capacity, workers, say)
    unsplit.run(unsplits(capacity, layouts, part, allowed))
    return _decided(goal, split, unsplit, copies, workers)


def _decided(goal: Goal, split: _Race, unsplit: _Race, copies: int, workers: Workers) -> Plan:
    """Judge the finalists by further parts of the workload, and say why the others lost."""
    ranked = sorted([*split.found.values(), *unsplit.found.values()], key=_rank)
    if not ranked:
        if goal.max_watts and not (split.lost or unsplit.lost):
            raise Infeasible(why=_too_little_power(goal), remedies=("raise --max-kw",))
        raise Infeasible(
            why="no deployment keeps the SLOs of enough requests at any rate",
            remedies=("loosen the bounds",),
        )
    finalists = ranked[:FINALISTS]
    for race in (split, unsplit):
        if race.best is not None and race.best not in finalists:
            finalists.append(race.best)
    candidates = _judged(goal, finalists, workers)
    by_goodput = sorted(candidates, key=_rank)
    best, *beaten = by_goodput
    chosen = _whole(goal, best, copies, workers) if copies > 1 else best
    judged = {one.deployment for one in candidates}
    on_one_part = [Candidate.of([one]) for one in ranked if one.deployment not in judged]
    lost = sorted([*split.lost.values(), *unsplit.lost.values()], key=lambda one: -one.trial.attainment)
    return Plan(
        goal=goal,
        chosen=chosen,
        best_unsplit=next((one for one in by_goodput if not one.deployment.is_split), None),
        best_split=next((one for one in by_goodput if one.deployment.is_split), None),
        others=(*beaten, *on_one_part, *(Candidate.lost(one) for one in lost)),
        unseen=tuple(split.unseen + unsplit.unseen),
    )


def _rank(one: Found | Candidate) -> tuple[float, int, str]:
    """The best first; of equals the smaller one."""
    return -one.per_gpu_rps, one.deployment.gpus, str(one.deployment)


def _too_little_power(goal: Goal) -> str:
    caps = ", ".join(f"{cap / 1e3:g} kW of {pool}" for pool, cap in goal.max_watts.items())
    return f"no deployment of {goal.model} draws so little: {caps}"


def _judged(goal: Goal, finalists: Sequence[Found], workers: Workers) -> list[Candidate]:
    calls = [(one.deployment, seed, one.rate_rps, 0.0) for one in finalists for seed in range(1, goal.seeds)]
    results = workers.map(goodput, calls)
    each = max(0, goal.seeds - 1)
    return [
        Candidate.of([one, *results[number * each : (number + 1) * each]])
        for number, one in enumerate(finalists)
    ]


def _whole(goal: Goal, part: Candidate, copies: int, workers: Workers) -> Candidate:
    """The part so many times, tried whole."""
    deployment = part.deployment.times(copies)
    rate = part.rates_rps[0] * copies
    tried: list[Found] = workers.map(goodput, [(deployment, 0, rate, rate)])
    if tried[0].rate_rps <= 0:  # a tenth less than its parts, at most, by rounding
        tried = workers.map(goodput, [(deployment, 0, 0.9 * rate, 0.0)])
    return Candidate.of(tried)


def _checked(goal: Goal, made: Plan, workers: Workers | None) -> Plan:
    """Raises Infeasible for a plan that does not hold the rate; without workers it may hold less."""
    if workers is not None and made.chosen.goodput_rps < goal.rate_rps * (1 - TOLERANCE):
        held = f"{made.chosen.goodput_rps:.3g} requests/s of {goal.rate_rps:.3g}"
        raise Infeasible(
            why=f"{goal.room} hold {held} at best, as {made.chosen.deployment}",
            remedies=relaxations(goal, made.chosen, workers),
        )
    return made


def _cheapest(goal: Goal, capacity: Capacity, layouts: Sequence[Layout], workers: Workers, say: Say) -> Plan:
    """The deployment of least GPUs, price or power that holds the rate."""
    price, allowed = price_of(goal), partial(within_power, goal)
    every = front(capacity, layouts, goal.room, price, allowed)
    ordered = [one for one in every if BEYOND * capacity.most_rps(one) >= goal.rate_rps]
    lost: list[Found] = []
    for first in range(0, len(ordered), ROUND):
        tried = ordered[first : first + ROUND]
        trials = workers.map(simulate, [(one, goal.rate_rps, 0) for one in tried])
        for one, trial in zip(tried, trials, strict=True):
            say(f"{one}: {trial.attainment:.1%} at {goal.rate_rps:.3g}/s")
            if trial.attainment < goal.attainment:
                lost.append(Found(rate_rps=0.0, trial=trial))
                continue
            further = [trial, *workers.map(simulate, [(one, goal.rate_rps, s) for s in range(1, goal.seeds)])]
            if fmean(t.attainment for t in further) >= goal.attainment:
                chosen = Candidate.of([Found(rate_rps=goal.rate_rps, trial=t) for t in further])
                nearest = sorted(lost, key=lambda one: -one.trial.attainment)
                return Plan(
                    goal=goal,
                    chosen=chosen,
                    best_unsplit=None if one.is_split else chosen,
                    best_split=chosen if one.is_split else None,
                    others=tuple(Candidate.lost(other) for other in nearest),
                    unseen=tuple(ordered[first + ROUND :]),
                )
            lost.append(Found(rate_rps=0.0, trial=trial))
    if not lost:  # not even by closed form: then those that could do most are the nearest
        if not every:
            raise Infeasible(why=_too_little_power(goal), remedies=("raise --max-kw",))
        most = sorted(every, key=lambda one: (-capacity.rps(one), str(one)))[:ROUND]
        trials = workers.map(simulate, [(one, goal.rate_rps, 0) for one in most])
        lost += [Found(rate_rps=0.0, trial=trial) for trial in trials]
    best = max(lost, key=lambda one: one.trial.attainment)
    said = f"{best.deployment} keeps {best.trial.attainment:.1%}"
    raise Infeasible(
        why=f"{goal.room} do not hold {goal.rate_rps:.3g} requests/s at {goal.attainment:.0%}; {said}",
        remedies=relaxations(goal, Candidate.lost(best), workers),
    )
