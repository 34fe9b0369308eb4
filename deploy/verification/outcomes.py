"""What each request of a replay came to, in a file: a line of JSON for the replay, then one per request."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.errors import SpecError
from cluster.request import Slo
from deploy.latency_table import slo_to_json
from deploy.replay_report import ReplayReport, RequestOutcome

FORMAT = 1


def save_outcomes(report: ReplayReport, path: Path) -> None:
    """Write it."""
    head = {
        "format": FORMAT,
        "url": report.url,
        "model": report.model,
        "slo": slo_to_json(report.slo),
        "duration_s": report.duration_s,
    }
    lines = [json.dumps(head)]
    for outcome in report.outcomes:
        raw = asdict(outcome)
        raw["slo"] = slo_to_json(outcome.slo) if outcome.slo is not None else None
        lines.append(json.dumps(raw))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_outcomes(path: Path) -> ReplayReport:
    """Read it. Raises SpecError, with the line, for a file that `pdserve replay --save` did not write."""
    read = 0
    try:
        with path.open(encoding="utf-8") as lines:
            head: dict[str, Any] = json.loads(next(lines))
            if head["format"] != FORMAT:
                raise ValueError(f"format {head['format']}, this version reads {FORMAT}")
            outcomes = []
            for read, line in enumerate(lines, 1):  # noqa: B007 (read where it fails)
                raw = json.loads(line)
                raw["slo"] = _slo(raw["slo"]) if raw["slo"] is not None else None
                outcomes.append(RequestOutcome(**raw))
            if not outcomes:
                raise ValueError("no requests")
            return ReplayReport(
                url=head["url"],
                model=head["model"],
                slo=_slo(head["slo"]),
                duration_s=head["duration_s"],
                outcomes=tuple(outcomes),
            )
    except OSError as error:
        raise SpecError(file=str(path), path="", value=error.strerror, allowed=_ALLOWED) from None
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise SpecError(file=str(path), path=f"line {read + 1}", value=str(error), allowed=_ALLOWED) from None


_ALLOWED = "name what `pdserve replay --save` wrote"


def _slo(raw: dict[str, float | None]) -> Slo:
    return Slo(**{key: math.inf if value is None else value for key, value in raw.items()})
