"""Scenarios: what goes wrong in a simulation, and when. One YAML file, checked at the edge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, ValidationError

from cluster.errors import SpecError
from cluster.frozen import Frozen
from cluster.spec import ClusterSpec


class Kill(Frozen):
    """The instance's process dies; the controller starts another life."""

    kill: str
    at_s: NonNegativeFloat

    @property
    def instances(self) -> tuple[str, ...]:
        return (self.kill,)


class Slow(Frozen):
    """The instance's iterations take `factor` times as long, for `for_s` seconds or to the end."""

    slow: str
    at_s: NonNegativeFloat
    factor: PositiveFloat
    for_s: PositiveFloat | None = None

    @property
    def instances(self) -> tuple[str, ...]:
        return (self.slow,)


class Cut(Frozen):
    """No KV gets from one instance to another, `cut: [prefill-0, decode-1]`, for `for_s` or to the end."""

    cut: tuple[str, str]
    at_s: NonNegativeFloat
    for_s: PositiveFloat | None = None

    @property
    def instances(self) -> tuple[str, ...]:
        return self.cut


Fault = Annotated[Kill | Slow | Cut, Field(union_mode="smart")]


class Scenario(Frozen):
    """What a simulation must live through; times count from the first arrival.

    Attributes:
        faults: each with the time at which it happens.
        cancel_share: share of the clients, 0 to 1, that leave ...
        cancel_within_s: ... at a random time up to this after their arrival, unless they have their answer.
        state_delay_s: age of the load that the router sees of an instance.
        detect_s: until a dead instance's connections tell the router. Measured 0.01 to 0.08 s on one machine.
        restart_s: from a new life's launch until it is READY.
    """

    faults: tuple[Fault, ...] = ()
    cancel_share: float = Field(default=0.0, ge=0, le=1)
    cancel_within_s: PositiveFloat = 2.0
    state_delay_s: NonNegativeFloat = 0.0
    detect_s: NonNegativeFloat = 0.05
    restart_s: NonNegativeFloat = 60.0


QUIET = Scenario()
_KINDS: dict[Literal["kill", "slow", "cut"], type[BaseModel]] = {"kill": Kill, "slow": Slow, "cut": Cut}


def load_scenario(path: Path | str, spec: ClusterSpec) -> Scenario:
    """Read a scenario for the instances of `spec`. Raises SpecError: no such file, key or instance."""
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(
            file=str(path), path="", value=error.strerror, allowed="name a readable YAML file"
        ) from None
    except yaml.YAMLError as error:
        raise SpecError(file=str(path), path="", value=str(error), allowed="the file must be YAML") from None
    return parse_scenario({} if raw is None else raw, spec, file=str(path))


def parse_scenario(raw: object, spec: ClusterSpec, *, file: str = "(scenario)") -> Scenario:
    """Check a scenario that is already a mapping; raises SpecError for the first problem."""
    if isinstance(raw, dict) and isinstance(faults := raw.get("faults"), list):
        for number, fault in enumerate(faults):
            _check_fault(fault, f"faults.{number}", file)
    try:
        scenario = Scenario.model_validate(raw)
    except ValidationError as error:
        raise _error(error, "", file, Scenario) from None
    places = [instance_id for instance_id, _ in spec.places()]
    for number, fault in enumerate(scenario.faults):
        for instance_id in fault.instances:
            if instance_id not in places:
                shown = ", ".join(places[:8]) + (", ..." if len(places) > 8 else "")
                raise SpecError(
                    file=file,
                    path=f"faults.{number}",
                    value=instance_id,
                    allowed=f"the instances are {shown}",
                )
    return scenario


def _check_fault(fault: object, path: str, file: str) -> None:
    """Errors of a fault in the words of its own kind, not of every kind in turn."""
    kinds = [kind for kind in _KINDS if isinstance(fault, dict) and kind in fault]
    if len(kinds) != 1:
        raise SpecError(file=file, path=path, value=fault, allowed=f"a fault has one of {', '.join(_KINDS)}")
    try:
        _KINDS[kinds[0]].model_validate(fault)
    except ValidationError as error:
        raise _error(error, path, file, _KINDS[kinds[0]]) from None


def _error(error: ValidationError, path: str, file: str, model: type[BaseModel]) -> SpecError:
    first = error.errors()[0]
    where = ".".join([*([path] if path else []), *(str(part) for part in first["loc"])])
    value = "(missing)" if first["type"] == "missing" else first["input"]
    allowed = first["msg"]
    if first["type"] == "extra_forbidden":
        allowed = f"no such key; the keys here are {', '.join(sorted(model.model_fields))}"
    return SpecError(file=file, path=where, value=value, allowed=allowed)
