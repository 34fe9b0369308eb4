"""What the planner found: the deployment, its evidence, and why the others lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import yaml

from deploy.planner.deployment import Deployment
from deploy.planner.goal import Goal
from deploy.planner.price import usd_per_hour, watts
from deploy.planner.trial import Found, Trial, raw_spec

# Alternatives that are shown.
NEAREST = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A deployment and what it did.

    Attributes:
        rates_rps: its goodput by part of the workload; empty where it lost before that was looked for.
        trial: at its goodput, on the first part; for one that lost, at the rate that it did not hold.
    """

    deployment: Deployment
    rates_rps: tuple[float, ...]
    trial: Trial

    @classmethod
    def of(cls, found: Sequence[Found]) -> Candidate:
        """From the goodput on each part of the workload."""
        return cls(
            deployment=found[0].trial.deployment,
            rates_rps=tuple(one.rate_rps for one in found),
            trial=found[0].trial,
        )

    @classmethod
    def lost(cls, found: Found) -> Candidate:
        """One that did not hold what it had to."""
        return cls(deployment=found.trial.deployment, rates_rps=(), trial=found.trial)

    @property
    def goodput_rps(self) -> float:
        """Mean over the parts; 0 for one that lost early."""
        return fmean(self.rates_rps) if self.rates_rps else 0.0

    @property
    def per_gpu_rps(self) -> float:
        return self.goodput_rps / self.deployment.gpus

    @property
    def bottleneck(self) -> str:
        """In words: which pool computes most of its time, and what cost the misses."""
        trial = self.trial
        if not self.deployment.is_split:
            busy = f"instances {trial.decode_busy:.0%} busy"
        else:
            busy = f"prefill {trial.prefill_busy:.0%}, decode {trial.decode_busy:.0%} busy"
        return f"{busy}; misses: {trial.cause}" if trial.cause else busy

    def to_json(self, goal: Goal) -> dict[str, object]:
        """As JSON."""
        trial = self.trial
        return {
            "deployment": str(self.deployment),
            "gpus": self.deployment.gpus,
            "goodput_rps": self.goodput_rps,
            "goodput_rps_by_seed": list(self.rates_rps),
            "goodput_rps_per_gpu": self.per_gpu_rps,
            "usd_per_hour": usd_per_hour(goal, self.deployment),
            "watts": watts(goal, self.deployment),
            "at": {
                "rate_rps": trial.rate_rps,
                "attainment": trial.attainment,
                "ttft_s": {"p50": trial.ttft_s[0], "p99": trial.ttft_s[1]},
                "tpot_s": {"p50": trial.tpot_s[0], "p99": trial.tpot_s[1]},
                "prefill_busy": trial.prefill_busy,
                "decode_busy": trial.decode_busy,
                "cause_of_misses": trial.cause,
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer.

    Attributes:
        chosen: what to deploy.
        best_split, best_unsplit: the best of each kind; None where it was not looked for, or holds nothing.
        others: the nearest first.
        unseen: candidates that could not be better by closed form, and were not simulated.
    """

    goal: Goal
    chosen: Candidate
    best_split: Candidate | None
    best_unsplit: Candidate | None
    others: tuple[Candidate, ...]
    unseen: tuple[Deployment, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.chosen.trial.warnings

    def to_json(self) -> dict[str, object]:
        """As JSON; equal plans give equal bytes."""
        goal = self.goal
        return {
            "workload": goal.describe_workload(),
            "objective": goal.objective,
            "attainment": goal.attainment,
            "rate_rps": goal.rate_rps,
            "chosen": self.chosen.to_json(goal),
            "split": self.chosen.deployment.is_split,
            "best_unsplit": self.best_unsplit.to_json(goal) if self.best_unsplit else None,
            "best_split": self.best_split.to_json(goal) if self.best_split else None,
            "others": [one.to_json(goal) for one in self.others],
            "not_simulated": [str(one) for one in self.unseen],
            "warnings": list(self.warnings),
        }

    def to_yaml(self) -> str:
        """The spec that `up` and `simulate` take; above it, as comments, what it was planned for."""
        goal, chosen = self.goal, self.chosen
        head = [
            f"Planned for {goal.describe_workload()}.",
            *(f"{one.name}: {_slo_text(goal, index)}" for index, one in enumerate(goal.classes)),
            f"Predicted: {chosen.goodput_rps:.4g} requests/s at {goal.attainment:.0%}, "
            f"{chosen.per_gpu_rps:.4g} per GPU; {chosen.bottleneck}.",
        ]
        spec = yaml.safe_dump(raw_spec(goal, chosen.deployment), sort_keys=False)
        return "".join(f"# {line}\n" for line in head) + spec

    def to_text(self) -> str:
        """For people."""
        goal, chosen = self.goal, self.chosen
        trial = chosen.trial
        met = f"{trial.attainment:.1%} keep their SLO"
        lines = [f"deployment  {chosen.deployment}, {chosen.deployment.gpus} GPUs"]
        if not chosen.deployment.is_split:
            lines.append("verdict     do not split: without the split the same GPUs do more here")
        lines += [
            f"goodput     {chosen.goodput_rps:.3g} requests/s at {goal.attainment:.0%} "
            f"({_band(chosen.rates_rps)}), {chosen.per_gpu_rps:.3g} per GPU; asked for {goal.rate_rps:.3g}",
            f"there       {met}; TTFT {_ms(trial.ttft_s)}, TPOT {_ms(trial.tpot_s)} (median, p99)",
            f"pools       {chosen.bottleneck}",
        ]
        lines += self._beside()
        money, power = usd_per_hour(goal, chosen.deployment), watts(goal, chosen.deployment)
        if money is not None and power is not None:
            lines.append(f"cost        {money:,.0f} $/h, {power / 1e3:,.1f} kW while all compute")
        shown = [one for one in self.others if one not in (self.best_unsplit, self.best_split)]
        lines += [f"lost        {one.deployment}: {why_lost(one)}" for one in shown[:NEAREST]]
        lines += [f"note        {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _beside(self) -> list[str]:
        other = self.best_unsplit if self.chosen.deployment.is_split else self.best_split
        if other is None or not other.goodput_rps:
            return []
        kind = "unsplit" if self.chosen.deployment.is_split else "split"
        ratio = self.chosen.per_gpu_rps / other.per_gpu_rps
        return [f"{kind:<12}{other.deployment}: {other.per_gpu_rps:.3g} per GPU, {ratio:.2f} times less"]


def why_lost(one: Candidate) -> str:
    """In words, with its figures."""
    if one.rates_rps:
        parts = "" if len(one.rates_rps) > 1 else ", on one part of the workload"
        return f"{one.per_gpu_rps:.3g} per GPU{parts}; {one.bottleneck}"
    trial = one.trial
    per_gpu = trial.rate_rps / one.deployment.gpus
    return f"{trial.attainment:.1%} at {trial.rate_rps:.3g}/s ({per_gpu:.3g} per GPU); {one.bottleneck}"


def _slo_text(goal: Goal, index: int) -> str:
    slo = goal.classes[index].slo
    return f"TTFT {slo.ttft_s * 1e3:g} ms, TPOT {slo.tpot_s * 1e3:g} ms"


def _band(rates: Sequence[float]) -> str:
    if len(rates) < 2:
        return "one part of the workload"
    return f"{min(rates):.3g} to {max(rates):.3g} over {len(rates)} parts of the workload"


def _ms(ends: tuple[float, float]) -> str:
    return f"{ends[0] * 1e3:,.0f} and {ends[1] * 1e3:,.0f} ms"
