"""`pdserve status`: the cluster as an ingress sees it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from cluster.errors import EnvironmentProblem

DEADLINE_S = 10.0


def fetch_status(url: str) -> dict[str, Any]:
    """The ingress' `/pdserve/status`.

    Raises:
        EnvironmentProblem: nobody answers there, or it is no pdserve cluster.
    """
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/pdserve/status", timeout=DEADLINE_S) as answer:
            status: dict[str, Any] = json.load(answer)
            return status
    except (OSError, ValueError) as error:
        raise nobody_answers(url, error) from None


def nobody_answers(url: str, error: Exception) -> EnvironmentProblem:
    """What is to be said when no ingress is there, or something else."""
    return EnvironmentProblem(
        problem=f"no pdserve cluster answers at {url} ({getattr(error, 'reason', error)})",
        remedy="start one with 'pdserve up SPEC', or name it with --url",
    )


def read_metric(url: str, name: str) -> float:
    """Sum over the labels of the samples of an ingress' `/metrics` whose names begin so. Raises OSError."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=DEADLINE_S) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def status_text(status: dict[str, Any]) -> str:
    """A table for people."""
    header = ("INSTANCE", "ROLE", "STATE", "RUNNING", "WAITING", "KV", "TOKENS", "WHERE", "NOTE")
    rows = [header]
    for row in status["instances"]:
        load = row["load"] or {}
        rows.append(
            (
                row["instance_id"],
                row["role"],
                row["state"] if row["reachable"] or row["state"] != "ready" else "unreachable",
                str(load.get("running", "-")),
                str(load.get("waiting", "-")),
                f"{load['kv_usage']:.0%}" if load else "-",
                str(row["outstanding_tokens"]),
                f"{row['node']} pid {row['pid']}" if row["pid"] else "-",
                row["detail"].splitlines()[0] if row["detail"] else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    summary = "ready" if status["ready"] else "not ready"
    return "\n".join([*lines, f"{summary}; {status['pending']} requests under way"])
