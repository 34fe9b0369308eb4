"""What the measurements say: a table, the link that fits them, and the `network` of a spec."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Median seconds of one case, and of a plain copy of as many bytes in the same rounds."""

    bench: str
    transport: str
    what: str
    bytes: int
    runs: int
    transfers: int
    read_s: float
    copy_s: float

    @property
    def gbytes_per_s(self) -> float:
        """1e9 bytes per second."""
        return self.bytes / self.read_s / 1e9

    @property
    def of_copy(self) -> float:
        """Speed as a share of the plain copy's."""
        return self.copy_s / self.read_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A read takes `latency_s`, plus `piece_s` for each piece, plus its bytes at `bytes_per_s`.

    `error` is the median of the fit's relative errors.
    """

    transport: str
    latency_s: float
    piece_s: float
    bytes_per_s: float
    error: float


def fit_link(transport: str, rows: Sequence[Row]) -> Link:
    """The link of a transport's rows, by least squares of relative errors; no cost is negative."""
    rows = [row for row in rows if row.transport == transport]
    taken = numpy.array([row.read_s for row in rows])
    costs = numpy.array([[row.transfers, row.runs, row.bytes] for row in rows], dtype=float)
    scaled = costs / taken[:, None]
    used = [0, 1, 2]
    found = numpy.zeros(3)
    while used:
        solved, *_ = numpy.linalg.lstsq(scaled[:, used], numpy.ones(len(rows)), rcond=None)
        found[:] = 0.0
        found[used] = solved
        if (solved >= 0).all():
            break
        used = [column for column in used if found[column] > 0]
    errors = numpy.abs(costs @ found / taken - 1)
    return Link(
        transport=transport,
        latency_s=float(found[0]),
        piece_s=float(found[1]),
        bytes_per_s=float(1 / found[2]) if found[2] > 0 else float("inf"),
        error=float(numpy.median(errors)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KvBenchReport:
    """All of a run of `pdserve kvbench`; `between_nodes` where another machine's memory was read."""

    device: str
    rows: tuple[Row, ...]
    links: tuple[Link, ...]
    between_nodes: bool = False

    def network(self, link: Link) -> dict[str, float]:
        """A spec's `network` with this link, within a node or between nodes."""
        return {
            "nic_gbps" if self.between_nodes else "nvlink_gbps": round(link.bytes_per_s * 8 / 1e9, 1),
            "latency_s": round(link.latency_s, 6),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain dict for JSON, with the machine and the versions."""
        return {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": platform.platform(),
            "device": self.device,
            "versions": {name: _version(name) for name in ("nixl", "nixl-cu12", "nixl-cu13", "torch")},
            "links": [asdict(link) | {"network": self.network(link)} for link in self.links],
            "rows": [
                asdict(row) | {"gbytes_per_s": row.gbytes_per_s, "of_copy": row.of_copy} for row in self.rows
            ],
        }

    def to_text(self) -> str:
        """A table per bench, and what to put into a spec."""
        lines = []
        bench = ""
        for row in self.rows:
            if row.bench != bench:
                bench = row.bench
                lines += [
                    "",
                    bench,
                    f"  {'':40}{'transport':10}{'MiB':>9}{'pieces':>9}{'ms':>10}{'GB/s':>8}  of a copy",
                ]
            lines.append(
                f"  {row.what:40}{row.transport:10}{row.bytes / (1 << 20):>9.2f}{row.runs:>9,}"
                f"{row.read_s * 1e3:>10.3f}{row.gbytes_per_s:>8.2f}{row.of_copy:>10.0%}"
            )
        lines.append("")
        for link in self.links:
            lines.append(
                f"{link.transport}: {link.latency_s * 1e6:.0f} us for a read, {link.piece_s * 1e6:.2f} us "
                f"for a piece, {link.bytes_per_s / 1e9:.2f} GB/s (median error {link.error:.0%})"
            )
            fragment = ", ".join(f"{key}: {value:g}" for key, value in self.network(link).items())
            lines.append(f"  in a spec:  network: {{{fragment}}}")
        return "\n".join(lines).strip("\n")

    def save(self, path: Path) -> None:
        """Write the JSON."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
