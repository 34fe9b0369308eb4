"""LoRA adapters as vLLM's server has them, for a cluster: loaded where their requests go, not everywhere.

vLLM's server gives every adapter to its engine before it offers it. Here that is one instance of each role,
which thereby checks it; any other loads it with its first request, which carries the adapter's path.
Adapters of the spec are named before there are instances, and are all loaded that way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from cluster.adapter_slots import adapter_id
from cluster.instance import Role
from router.fleet import Fleet

# To read an adapter from a slow disk or a hub.
CALL_DEADLINE_S = 60.0


class EngineCalls(Protocol):
    """The way to an instance."""

    async def call(self, method: str, args: list[Any], deadline_s: float) -> Any:
        """Call an engine method. Raises InstanceLost, TimeoutError, RuntimeError."""
        ...


class ClusterAdapters:
    """What `EngineCoreClient` says of adapters.

    Args:
        links: to the instances that can be reached, by their ids.
    """

    def __init__(self, fleet: Fleet[Any], links: Mapping[str, EngineCalls]) -> None:
        self._fleet = fleet
        self._links = links
        self._names: dict[int, str] = {}

    async def add(self, adapter: Any) -> bool:
        """Offer an adapter (vLLM's `LoRARequest`, which gets its id here). Raises RuntimeError, with the
        engine's words, for one that can't be loaded."""
        name = adapter.lora_name
        # Every ingress would count for itself, and engines go by the number alone.
        adapter.lora_int_id = adapter_id(name, adapter.lora_path)
        self._names[adapter.lora_int_id] = name
        places = self._places_to_load(name, anew=adapter.load_inplace)
        try:
            await self._call(places, "add_lora", adapter)
        finally:
            # Its requests carry this object: they must not load it again with every iteration.
            adapter.load_inplace = False
        for instance_id in places:
            if (view := self._fleet.view_of(instance_id)) is not None:
                view.adapters.hold(name).release()
        return True

    async def remove(self, lora_id: int) -> bool:
        """Remove an adapter everywhere; False where nobody had it."""
        removed = await self._call(list(self._links), "remove_lora", lora_id)
        name = self._names.pop(lora_id, "")
        for instance_id in self._links:
            if (view := self._fleet.view_of(instance_id)) is not None:
                view.adapters.forget(name)
        return any(removed)

    async def pin(self, lora_id: int) -> bool:
        """Never evict an adapter where the router believes it loaded. Raises RuntimeError where it is not."""
        name = self._names.get(lora_id, "")
        return any(await self._call(self._loaded(name), "pin_lora", lora_id))

    def _places_to_load(self, name: str, *, anew: bool) -> list[str]:
        """The least loaded instance of each role; and those that have an older version of it."""
        least = [view for role in Role if (view := next(self._fleet.by_tokens(role), None)) is not None]
        places = [view.instance_id for view in least if view.instance_id in self._links]
        return list(dict.fromkeys(places + (list(self._links) if anew else [])))

    def _loaded(self, name: str) -> list[str]:
        views = ((place, self._fleet.view_of(place)) for place in self._links)
        return [place for place, view in views if view is not None and view.adapters.is_loaded(name)]

    async def _call(self, places: list[str], method: str, argument: Any) -> list[Any]:
        calls = [self._links[place].call(method, [argument], CALL_DEADLINE_S) for place in places]
        return await asyncio.gather(*calls)
