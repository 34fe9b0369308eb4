"""Pools of their own for each class of requests, beside one cluster for all (P/D-Serve's scenarios, LAPS).

A cluster for all serves who is in a hurry with the slack of who is not; clusters of their own give each class
the layout that suits its bounds. Which takes less follows from both plans, of which each keeps the SLO of
enough requests of every class.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from deploy.planner.deployment import Deployment
from deploy.planner.goal import Goal, Infeasible
from deploy.planner.plan import Plan
from deploy.planner.price import pool_watts, price_of
from deploy.planner.search import Say, plan
from deploy.slo_classes import SloClass, assign_slo_classes
from deploy.workload import from_zero, rescale

# Of a class: from fewer no rate follows.
LEAST_REQUESTS = 10
UNITS = {"min_gpus": "GPUs", "cost": "$/h", "energy": "W"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ByClass:
    """Both answers.

    Attributes:
        apart: the plan of each class; None where they don't get what they need within the GPUs and the power.
        price, apart_price: what the objective counts, in `unit`; the latter infinite without `apart`.
    """

    together: Plan
    apart: Mapping[str, Plan] | None
    unit: str
    price: float
    apart_price: float

    @property
    def pays(self) -> bool:
        """Whether clusters of their own take less."""
        return self.apart_price < self.price

    def to_text(self) -> str:
        """For people."""
        lines = [self.together.to_text()]
        for name, made in (self.apart or {}).items():
            chosen = made.chosen
            lines.append(
                f"class {name}: {chosen.deployment}, {chosen.deployment.gpus} GPUs; "
                f"{chosen.trial.attainment:.1%} of {chosen.goodput_rps:.3g} requests/s"
            )
        if self.apart is None:
            lines.append("verdict     one cluster for all: there is not enough for one of each class")
        else:
            verdict = "a cluster for each class" if self.pays else "one cluster for all"
            sums = f"{self.apart_price:,.0f} {self.unit} apart, {self.price:,.0f} together"
            lines.append(f"verdict     {verdict}: {sums}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """As JSON."""
        return {
            "together": self.together.to_json(),
            "apart": {name: made.to_json() for name, made in (self.apart or {}).items()},
            "unit": self.unit,
            "price": self.price,
            "apart_price": self.apart_price if self.apart else None,
            "pays": self.pays,
        }


def require_classes(goal: Goal) -> None:
    """Raises ValueError for a goal whose classes can't have clusters of their own."""
    if goal.objective not in UNITS:
        raise ValueError(f"--by-class compares what a rate takes: give --objective {', '.join(UNITS)}")
    if len(goal.classes) < 2:
        raise ValueError("--by-class needs several classes: give --slo with a file of them")
    of = Counter(found.name for found in _class_of(goal))
    for one in goal.classes:
        if one.slo.ttft_s == math.inf:
            raise ValueError(
                f"--by-class: class {one.name} has no bound on its first token, so any GPU will do"
            )
        if not re.fullmatch(r"[a-z0-9-]*[a-z0-9]", one.name):
            raise ValueError(
                f"--by-class: class {one.name!r} is to be a part of a cluster's name: lower-case letters, "
                "digits and '-'"
            )
        if of[one.name] < LEAST_REQUESTS:
            raise ValueError(
                f"--by-class: class {one.name} has {of[one.name]} requests of the workload, which tell no "
                "rate"
            )


def plan_by_class(goal: Goal, *, jobs: int = 1, say: Say = lambda line: None) -> ByClass:
    """Plan for all and for each class alone, at its part of the rate.

    Raises:
        ValueError: as `require_classes`.
        Infeasible: no cluster for all holds the rate.
    """
    require_classes(goal)
    goal = replace(goal, each_class=True)
    together = plan(goal, jobs=jobs, say=say)
    apart: dict[str, Plan] = {}
    why = ""
    for one in _goals(goal):
        name = one.classes[0].name
        say(f"class {name} alone")
        try:
            apart[name] = plan(one, jobs=jobs, say=say)
        except Infeasible as error:
            why = f"class {name}: {error.why}"
            break
    else:
        why = _too_much(goal, [made.chosen.deployment for made in apart.values()])
    if why:
        say(why)
    price = price_of(goal)
    return ByClass(
        together=together,
        apart=None if why else apart,
        unit=UNITS[goal.objective],
        price=price(together.chosen.deployment),
        apart_price=math.inf if why else sum(price(made.chosen.deployment) for made in apart.values()),
    )


def _too_much(goal: Goal, deployments: Sequence[Deployment]) -> str:
    """What all of them together take more than there is; empty for nothing."""
    gpus: Counter[str] = Counter()
    power: Counter[str] = Counter()
    for one in deployments:
        for layout, count in ((one.prefill, one.prefill_gpus), (one.decode, one.decode_gpus)):
            if layout is not None:
                gpus[layout.gpu] += count
        power.update(pool_watts(goal, one) if goal.max_watts else {})
    power["all"] = sum(power.values())
    for gpu, count in gpus.items():
        if count > goal.room.of(gpu):
            return f"apart they take {count} {gpu or 'GPUs'} of {goal.room.of(gpu)}"
    for pool, cap in goal.max_watts.items():
        if power[pool] > cap:
            return f"apart they draw {power[pool] / 1e3:.1f} kW of {cap / 1e3:g}"
    return ""


def _class_of(goal: Goal) -> list[SloClass]:
    """Of each request."""
    return list(assign_slo_classes(goal.requests, goal.classes, Random("0/classes")))


def _goals(goal: Goal) -> list[Goal]:
    """Of each class."""
    of = _class_of(goal)
    found = []
    for one in goal.classes:
        requests = [request for request, its in zip(goal.requests, of, strict=True) if its is one]
        rate_rps = goal.rate_rps * len(requests) / len(goal.requests)
        found.append(
            replace(
                goal,
                requests=rescale(from_zero(requests), rate_rps=rate_rps),
                classes=(replace(one, share=1.0, input_below=None),),
                base=_base_of(goal, one.name),
            )
        )
    return found


def _base_of(goal: Goal, name: str) -> dict[str, Any]:
    """The goal's, with a name of its own, and of API keys those of the class."""
    base = {**goal.base, "name": f"{goal.base.get('name', 'plan')}-{name}"}
    if by_api_key := base.get("slo", {}).get("by_api_key"):
        kept = {key: its for key, its in by_api_key.items() if its == name}
        base["slo"] = {**base["slo"], "by_api_key": kept}
    return base
