"""Reads a JSON object that somebody names on the command line or in a spec."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cluster.errors import SpecError


def read_object(file: Path, *, kind: str, name: str) -> Mapping[str, object]:
    """The object in a file. Raises SpecError, with the `kind` of file that it shall be and what to `name`."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(file=str(file), path="", value=error.strerror, allowed=f"name {name}") from None
    except ValueError as error:
        raise SpecError(file=str(file), path="", value=str(error), allowed=f"{kind} is JSON") from None
    if not isinstance(raw, Mapping):
        raise SpecError(file=str(file), path="", value=raw, allowed=f"{kind} is a JSON object")
    return raw
