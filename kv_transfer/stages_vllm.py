"""The pipeline stages of a source as vLLM's connector describes them, joined to one description."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

from kv_transfer.staged_agent import StageCard, staged

# What a description says of each of its regions of memory, of which each layer has one or more.
_BY_REGION = (
    "kv_caches_base_addr",
    "block_lens",
    "block_strides",
    "region_num_blocks",
    "region_group_ids",
    "region_names",
    "region_mem_types",
    "region_members",
)


class Gathering:
    """The stages of one source while it is asked for them, the first layers' first."""

    def __init__(self, stages: int) -> None:
        self._count = stages
        self._found: dict[int, list[Any]] = {}

    def add(self, rank: int, description: Any) -> Any:
        """One more stage of a tensor-parallel rank (vLLM's `NixlAgentMetadata`); the whole when it is the
        last, else None. Raises ValueError for stages that don't fit together."""
        found = self._found.setdefault(rank, [])
        found.append(description)
        return joined(found) if len(found) == self._count else None


def joined(stages: list[Any]) -> Any:
    """One description of all stages. Raises ValueError where their KV is not laid out alike."""
    first = stages[0]
    for name in ("num_blocks", "block_size", "kv_cache_layout", "physical_blocks_per_logical_kv_block"):
        values = {getattr(stage, name) for stage in stages}
        if len(values) > 1:
            raise ValueError(f"{first.engine_id}: its pipeline stages differ in {name}: {sorted(values)}")
    cards = [
        StageCard(stage.agent_metadata, len(stage.kv_caches_base_addr), stage.device_id) for stage in stages
    ]
    whole: dict[str, Any] = {}
    for name in _BY_REGION:
        parts = [getattr(stage, name) for stage in stages]
        whole[name] = None if any(part is None for part in parts) else list(chain(*parts))
    return replace(first, agent_metadata=staged(cards), **whole)
