"""Checks that this program is one program."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from cluster.errors import EnvironmentProblem

PACKAGES = ("cluster", "prefill_worker", "decode_worker", "kv_transfer", "router", "deploy")


def require_one_installation() -> Path:
    """The directory that holds all six packages.

    Their names are plain words, so another distribution's `cluster` or `router` may come first on the path.

    Raises:
        EnvironmentProblem: they resolve to different directories; names the two.
    """
    ours = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise EnvironmentProblem(
                problem=f"package {package!r} is not importable, {ours} should hold it",
                remedy="install pdserve again",
            )
        home = Path(found.origin).resolve().parent.parent
        if home != ours:
            raise EnvironmentProblem(
                problem=f"package {package!r} comes from {home}, the rest of pdserve from {ours}",
                remedy="remove the other distribution, or put pdserve first on the path",
            )
    return ours
