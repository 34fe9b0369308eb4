"""The GPUs that there are, by type."""

from __future__ import annotations

from collections.abc import Mapping

from deploy.planner.deployment import Layout


class Fleet:
    """So many GPUs of each type; the type of a layout that names none is ""."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = dict(counts)

    @property
    def gpus(self) -> int:
        """Of all types."""
        return sum(self._counts.values())

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(self._counts)

    def of(self, gpu: str) -> int:
        """Of a type."""
        return self._counts[gpu]

    def most(self, layout: Layout, beside: Layout | None = None, count: int = 0) -> int:
        """Instances of a layout for which there are GPUs, beside `count` instances of another."""
        taken = count * beside.gpus if beside is not None and beside.gpu == layout.gpu else 0
        return max(0, self._counts[layout.gpu] - taken) // layout.gpus

    def part(self, of: int) -> Fleet:
        """One of so many equal parts."""
        return Fleet({gpu: count // of for gpu, count in self._counts.items()})

    def __str__(self) -> str:
        return " + ".join(f"{count} {gpu or 'GPUs'}" for gpu, count in self._counts.items())
