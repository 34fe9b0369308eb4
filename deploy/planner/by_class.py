"""Pools of their own for each class of requests, beside one cluster for all (P/D-Serve's scenarios, LAPS).

A cluster for all serves who is in a hurry with the slack of who is not; clusters of their own give each class
the layout that suits its bounds. Which takes less follows from both plans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

from deploy.planner.goal import Goal, Infeasible
from deploy.planner.plan import Plan
from deploy.planner.price import price_of
from deploy.planner.search import Say, plan
from deploy.slo_classes import assign_slo_classes
from deploy.workload import from_zero, rescale

UNITS = {"min_gpus": "GPUs", "cost": "$/h", "energy": "W"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ByClass:
    """Both answers.

    Attributes:
        apart: the plan of each class; None where one of them has none within the GPUs.
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
            lines.append("verdict     one cluster for all: apart, some class does not get what it needs")
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
    for one in goal.classes:
        if one.slo.ttft_s == math.inf:
            raise ValueError(
                f"--by-class: class {one.name} has no bound on its first token, so any GPU will do"
            )


def plan_by_class(goal: Goal, *, jobs: int = 1, say: Say = lambda line: None) -> ByClass:
    """Plan for all and for each class alone, at its part of the rate.

    Raises:
        ValueError: as `require_classes`.
        Infeasible: no cluster for all holds the rate.
    """
    require_classes(goal)
    together = plan(goal, jobs=jobs, say=say)
    price = price_of(goal)(together.chosen.deployment)
    apart: dict[str, Plan] = {}
    total = 0.0
    for one in _goals(goal):
        name = one.classes[0].name
        say(f"class {name} alone")
        try:
            apart[name] = plan(one, jobs=jobs, say=say)
        except Infeasible as error:
            say(f"class {name}: {error.why}")
            total = math.inf
            break
        total += price_of(one)(apart[name].chosen.deployment)
    return ByClass(
        together=together,
        apart=apart if total < math.inf else None,
        unit=UNITS[goal.objective],
        price=price,
        apart_price=total,
    )


def _goals(goal: Goal) -> list[Goal]:
    """Of each class that has any requests."""
    of = assign_slo_classes(goal.requests, goal.classes, Random("0/classes"))
    found = []
    for one in goal.classes:
        requests = [request for request, its in zip(goal.requests, of, strict=True) if its is one]
        if not requests:
            continue
        rate_rps = goal.rate_rps * len(requests) / len(goal.requests)
        found.append(
            replace(
                goal,
                requests=rescale(from_zero(requests), rate_rps=rate_rps),
                classes=(replace(one, share=1.0, input_below=None),),
                base={**goal.base, "name": f"{goal.base.get('name', 'plan')}-{one.name}"},
            )
        )
    return found
