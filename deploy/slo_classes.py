"""SLO classes: which request of a workload has which service-level objective, by rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import yaml
from pydantic import Field, ValidationError

from cluster.errors import SpecError
from cluster.frozen import Frozen
from cluster.request import NO_SLO, Slo, slo_of_ms
from deploy.replay_report import parse_goodput
from deploy.workload import WorkloadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SloClass:
    """Some of the requests and what they need.

    Attributes:
        input_below: takes the requests with a shorter prompt than this, in tokens.
        fills_slack: whether its requests are served only where they take nothing from others; refused at
            their time, they are not sent again.
        share: takes this part (0 to 1) of the requests that no class takes by length.
    """

    name: str
    slo: Slo = NO_SLO
    fills_slack: bool = False
    share: float | None = None
    input_below: int | None = None


def parse_slo(words: Sequence[str]) -> tuple[SloClass, ...]:
    """The classes of a command line.

    `["ttft:300", "tpot:50"]` is one class, "all", with bounds in milliseconds as in
    `replay_report.parse_goodput`; `["classes.yaml"]` is a file of classes; nothing is a class without bounds.

    Raises ValueError for bounds that are none, SpecError as `load_slo_classes`.
    """
    if not words:
        return (SloClass(name="all", share=1.0),)
    if len(words) == 1 and words[0].partition(":")[0] not in ("ttft", "tpot"):
        return load_slo_classes(Path(words[0]))
    try:
        return (SloClass(name="all", slo=parse_goodput(words), share=1.0),)
    except ValueError as error:
        raise ValueError(str(error).replace("goodput", "slo", 1) + ", or one file of classes") from None


def load_slo_classes(path: Path) -> tuple[SloClass, ...]:
    """Read the classes from a YAML file:

        classes:
          - {name: chat, ttft_ms: 300, tpot_ms: 50, input_below: 4000}
          - {name: paid, ttft_ms: 1000, tpot_ms: 50, share: 0.25}
          - {name: batch, fills_slack: true}

    A class takes its requests by `input_below`, the first that fits; the others are divided by `share`; a
    class with neither takes the rest. A bound that isn't given is none.

    Raises SpecError for a file that can't be read, an unknown key or a wrong value, and for rules that leave
    a request without a class or a class without requests.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = _File.model_validate(raw).classes
    except OSError as error:
        raise SpecError(
            file=str(path),
            path="",
            value=error.strerror,
            allowed="name bounds such as ttft:300 tpot:50, or a readable YAML file of classes",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(
            file=str(path),
            path=".".join(str(part) for part in first["loc"]),
            value="(missing)" if first["type"] == "missing" else first["input"],
            allowed=_allowed(first["type"], first["msg"]),
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(file=str(path), path="", value=str(error), allowed="the file must be YAML") from None
    return tuple(_with_rest(path, _checked(path, entries)))


def assign_slo_classes(
    requests: Sequence[WorkloadRequest], classes: Sequence[SloClass], rng: Random
) -> tuple[SloClass, ...]:
    """The class of each request, in the order of `requests`.

    `classes` are as `parse_slo` and `load_slo_classes` return them: they leave nobody out. By share a whole
    session gets one class, as a client has one contract; by length each turn its own. The draw depends on the
    order of the requests, not on their arrivals, so a workload keeps its classes at another rate.
    """
    by_length = [one for one in classes if one.input_below is not None]
    by_share = [one for one in classes if one.share is not None]
    weights = [one.share or 0.0 for one in by_share]
    drawn: dict[str, SloClass] = {}
    assigned = []
    for request in requests:
        chosen = next((one for one in by_length if request.input_tokens < (one.input_below or 0)), None)
        if chosen is None and request.session_id is not None:
            chosen = drawn.get(request.session_id)
        if chosen is None:
            chosen = rng.choices(by_share, weights)[0]
            if request.session_id is not None:
                drawn[request.session_id] = chosen
        assigned.append(chosen)
    return tuple(assigned)


class _Entry(Frozen):
    """A class as the file has it."""

    name: str = Field(min_length=1)
    ttft_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tpot_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    share: float | None = Field(default=None, gt=0, le=1)
    input_below: int | None = Field(default=None, gt=1)
    fills_slack: bool = False

    def to_class(self, share: float | None) -> SloClass:
        return SloClass(
            name=self.name,
            slo=slo_of_ms(self.ttft_ms, self.tpot_ms),
            share=share,
            input_below=self.input_below,
            fills_slack=self.fills_slack,
        )


class _File(Frozen):
    classes: tuple[_Entry, ...] = Field(min_length=1)


def _allowed(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return f"no such key; a file has 'classes', and a class {', '.join(_Entry.model_fields)}"
    if kind in ("model_type", "model_attributes_type"):
        return "expected a mapping such as 'classes: [{name: chat, ttft_ms: 300, tpot_ms: 50}]'"
    return message


def _checked(path: Path, entries: Sequence[_Entry]) -> Sequence[_Entry]:
    """The entries, each with one rule at most and a chance to get a request."""
    names: set[str] = set()
    longest = 0
    for index, entry in enumerate(entries):
        if entry.name in names:
            raise _refused(path, f"classes.{index}.name", entry.name, "give each class a name of its own")
        names.add(entry.name)
        if entry.fills_slack and (entry.ttft_ms is not None or entry.tpot_ms is not None):
            raise _refused(path, f"classes.{index}", entry.name, "a class that fills slack has no bounds")
        if entry.input_below is None:
            continue
        if entry.share is not None:
            raise _refused(path, f"classes.{index}", entry.name, "give a class 'share' or 'input_below'")
        if entry.input_below <= longest:
            raise _refused(
                path,
                f"classes.{index}.input_below",
                entry.input_below,
                f"a class above takes all prompts below {longest}: order them by rising input_below",
            )
        longest = entry.input_below
    return entries


def _with_rest(path: Path, entries: Sequence[_Entry]) -> list[SloClass]:
    """The classes, the one without a rule with the share that the others leave."""
    rests = [
        index for index, entry in enumerate(entries) if entry.share is None and entry.input_below is None
    ]
    left = 1.0 - math.fsum(entry.share or 0.0 for entry in entries)
    if len(rests) > 1:
        raise _refused(
            path,
            f"classes.{rests[1]}",
            entries[rests[1]].name,
            f"one class takes the rest, and {entries[rests[0]].name!r} does: give 'share' or 'input_below'",
        )
    if rests and left < 1e-9:
        raise _refused(
            path, f"classes.{rests[0]}", entries[rests[0]].name, "the shares leave nothing for this class"
        )
    if left < -1e-9 or (not rests and left > 1e-9):
        remedy = "make them 1" if left < 0 else "make them 1, or add a class with neither for the rest"
        raise _refused(path, "classes", f"shares of {1 - left:g} in all", remedy)
    return [entry.to_class(left if index in rests else entry.share) for index, entry in enumerate(entries)]


def _refused(path: Path, where: str, value: object, allowed: str) -> SpecError:
    return SpecError(file=str(path), path=where, value=value, allowed=allowed)
