"""A candidate: how many instances of each phase, each laid out how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple


class Layout(NamedTuple):
    """Ranks of an instance, and the type of its GPUs where there are several; with `data` above 1, those of a
    group of so many instances, which is counted as one then."""

    tensor: int
    pipeline: int = 1
    gpu: str = ""
    data: int = 1

    @property
    def ranks(self) -> int:
        """Of each instance."""
        return self.tensor * self.pipeline

    @property
    def gpus(self) -> int:
        return self.ranks * self.data

    def __str__(self) -> str:
        sizes = (("TP", self.tensor), ("PP", self.pipeline), ("DP", self.data))
        ranks = " ".join(f"{name}{size}" for name, size in sizes if size > 1 or name == "TP")
        return f"{ranks} {self.gpu.partition('-')[0].upper()}" if self.gpu else ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Pools of equal instances; without the split all instances are the decode pool's.

    Attributes:
        prefill: None without the split; `prefill_count` is 0 then.
        colocated: whether nodes have instances of both pools, so that KV moves within a node: DistServe's
            placement for low node affinity.
    """

    prefill: Layout | None
    prefill_count: int
    decode: Layout
    decode_count: int
    colocated: bool = False

    @property
    def is_split(self) -> bool:
        return self.prefill is not None

    @property
    def prefill_gpus(self) -> int:
        return self.prefill_count * self.prefill.gpus if self.prefill else 0

    @property
    def decode_gpus(self) -> int:
        return self.decode_count * self.decode.gpus

    @property
    def gpus(self) -> int:
        return self.prefill_gpus + self.decode_gpus

    def times(self, factor: int) -> Deployment:
        """So many of it side by side."""
        return replace(
            self,
            prefill_count=self.prefill_count * factor,
            decode_count=self.decode_count * factor,
        )

    def __str__(self) -> str:
        if self.prefill is None:
            return f"{self.decode_count} x {self.decode} unsplit"
        pools = f"{self.prefill_count} x {self.prefill} prefill + {self.decode_count} x {self.decode} decode"
        return f"{pools}, colocated" if self.colocated else pools
