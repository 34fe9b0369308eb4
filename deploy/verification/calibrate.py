"""How long engines really take, as the routers of a running cluster have learned it, written into the spec.

A router compares every stretch of an instance's work with what the spec's latency model says of it, and keeps
a factor, robust and bounded (`router.pace`). `/pdserve/status` shows it. Here it goes back to where the model
comes from, so that the simulator, the planner and the next router begin with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import SpecError
from cluster.instance import Role
from cluster.spec import ClusterSpec
from deploy.status import fetch_status

# Stretches of work of a pool from which its pace is believed.
LEAST_SEEN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Of one pool.

    Attributes:
        factor: how many times as long its work takes as the spec says: its instances' mean, by how much each
            has seen.
        spread: of its instances, largest over smallest factor.
        seen: stretches of work.
        before, after: `sim.pace` of the role.
    """

    role: Role
    factor: float
    spread: float
    seen: int
    before: float

    @property
    def after(self) -> float:
        return self.before * self.factor


def read_status(source: str) -> dict[str, Any]:
    """From a cluster's URL, or from a file that `pdserve status --json` wrote. Raises EnvironmentProblem,
    SpecError."""
    if source.startswith(("http://", "https://")):
        return fetch_status(source)
    try:
        status = json.loads(Path(source).read_text(encoding="utf-8"))
        if not isinstance(status, dict) or not isinstance(status.get("instances"), list):
            raise ValueError("no instances in it")
    except (OSError, ValueError) as error:
        raise SpecError(
            file=source,
            path="",
            value=getattr(error, "strerror", None) or str(error),
            allowed="name a URL, or a file that `pdserve status --json` wrote",
        ) from None
    return status


def calibrate(spec: ClusterSpec, status: Mapping[str, Any]) -> list[Calibration]:
    """The paces of both pools. Raises ValueError where the spec has no model, or too little was seen."""
    sim = spec.sim
    if not (sim.profile or sim.hardware or sim.step_s or sim.prefill_s_per_token):
        raise ValueError(
            "the spec says nothing of its engines' speed, so routers learn it anew and there is no model to "
            "calibrate: name sim.hardware or sim.profile"
        )
    return [_of_role(spec, role, status) for role in Role if spec.pool(role).count]


def _of_role(spec: ClusterSpec, role: Role, status: Mapping[str, Any]) -> Calibration:
    known = [
        row["pace"][str(role)]
        for row in status["instances"]
        if row["role"] == str(role) and row.get("pace") and row["pace"][str(role)]["seen"]
    ]
    seen = sum(one["seen"] for one in known)
    if seen < LEAST_SEEN:
        raise ValueError(
            f"{role} instances were compared {seen} times so far, {LEAST_SEEN} are needed: send them work, "
            "for example with --trace"
        )
    mean = sum(one["seen"] * math.log(one["factor"]) for one in known) / seen
    factors = [one["factor"] for one in known]
    return Calibration(
        role=role,
        factor=math.exp(mean),
        spread=max(factors) / min(factors),
        seen=seen,
        before=spec.sim.pace.get(role, 1.0),
    )


def calibrated(raw: Mapping[str, Any], found: list[Calibration]) -> dict[str, Any]:
    """A spec's keys with the new paces."""
    sim = dict(raw.get("sim") or {})
    sim["pace"] = {**sim.get("pace", {}), **{str(one.role): round(one.after, 4) for one in found}}
    return {**raw, "sim": sim}


def calibration_text(found: list[Calibration]) -> str:
    """A table for people."""
    lines = [f"{'pool':<10}{'takes':>16}{'instances':>12}{'seen':>8}{'sim.pace':>16}"]
    for one in found:
        lines.append(
            f"{one.role:<10}{one.factor:>9.3f} times{one.spread:>10.2f} x{one.seen:>8}"
            f"{one.before:>8.3f}{one.after:>8.3f}"
        )
    return "\n".join(lines)
