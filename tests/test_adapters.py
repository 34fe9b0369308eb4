"""The adapters of a cluster: where one is loaded, what it is called, what is told when it can't be."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from cluster.adapter_slots import adapter_id
from cluster.instance import InstanceLoad
from cluster.spec import parse_spec
from cluster.vllm_options import server_arguments
from router.adapters import ClusterAdapters
from router.fleet import Fleet
from router.view import LastSeen
from tests.twins import FACTS, info_of


@dataclass
class Adapter:
    """The part of vLLM's `LoRARequest` that matters."""

    lora_name: str
    lora_path: str
    lora_int_id: int = 1
    load_inplace: bool = False


@dataclass
class Engine:
    """Remembers calls; has no file whose path ends with `missing`."""

    calls: list[tuple[str, Any]] = field(default_factory=list)

    async def call(self, method: str, args: list[Any], deadline_s: float) -> Any:
        argument = args[0]
        if method == "add_lora":
            if argument.lora_path.endswith("missing"):
                raise RuntimeError("no such file")
            argument = (argument.lora_name, argument.load_inplace)
        self.calls.append((method, argument))
        return True


@dataclass
class Cluster:
    fleet: Fleet[LastSeen]
    engines: dict[str, Engine]
    adapters: ClusterAdapters


def cluster_of(*instance_ids: str) -> Cluster:
    fleet: Fleet[LastSeen] = Fleet()
    for index, name in enumerate(instance_ids):
        info = replace(info_of(name, index), facts=replace(FACTS, max_loras=1, max_cpu_loras=2))
        fleet.join(info, LastSeen(InstanceLoad()))
    engines = {name: Engine() for name in instance_ids}
    return Cluster(fleet, engines, ClusterAdapters(fleet, engines))


async def test_it_is_loaded_at_one_instance_of_each_role() -> None:
    cluster = cluster_of("prefill-0", "prefill-1", "decode-0", "decode-1")
    adapter = Adapter("sql", "/adapters/sql")
    with cluster.fleet.reservations.hold("prefill-0", 100):
        assert await cluster.adapters.add(adapter)
    assert adapter.lora_int_id == adapter_id("sql", "/adapters/sql")
    assert [name for name, engine in cluster.engines.items() if engine.calls] == ["prefill-1", "decode-0"]
    view = cluster.fleet.view_of("prefill-1")
    assert view is not None
    assert view.adapters.on_host == ("sql",)
    assert view.adapters.users == {}


async def test_before_there_are_instances_it_is_named_only() -> None:
    cluster = cluster_of()
    adapter = Adapter("sql", "/adapters/sql")
    assert await cluster.adapters.add(adapter)
    assert adapter.lora_int_id > 1


async def test_who_replaces_it_replaces_it_everywhere_and_once() -> None:
    cluster = cluster_of("prefill-0", "decode-0", "decode-1")
    adapter = Adapter("sql", "/adapters/sql", load_inplace=True)
    await cluster.adapters.add(adapter)
    assert all(engine.calls == [("add_lora", ("sql", True))] for engine in cluster.engines.values())
    assert not adapter.load_inplace  # it travels with every request


async def test_what_an_engine_says_against_it_is_told() -> None:
    cluster = cluster_of("prefill-0", "decode-0")
    with pytest.raises(RuntimeError, match="no such file"):
        await cluster.adapters.add(Adapter("sql", "/adapters/missing"))
    view = cluster.fleet.view_of("decode-0")
    assert view is not None
    assert not view.adapters.is_loaded("sql")


async def test_it_is_pinned_where_it_is_and_removed_everywhere() -> None:
    cluster = cluster_of("prefill-0", "decode-0", "decode-1")
    adapter = Adapter("sql", "/adapters/sql")
    await cluster.adapters.add(adapter)
    assert await cluster.adapters.pin(adapter.lora_int_id)
    assert not await cluster.adapters.pin(99)
    assert await cluster.adapters.remove(adapter.lora_int_id)
    pinned = [
        name for name, engine in cluster.engines.items() if ("pin_lora", adapter.lora_int_id) in engine.calls
    ]
    assert pinned == ["prefill-0", "decode-0"]
    for name, engine in cluster.engines.items():
        assert engine.calls[-1] == ("remove_lora", adapter.lora_int_id)
        view = cluster.fleet.view_of(name)
        assert view is not None
        assert view.adapters.on_host == ()


def test_those_of_the_spec_are_named_to_vllms_server_beside_its_own() -> None:
    spec = parse_spec(
        {
            "model": "m",
            "engine_options": {"enable_lora": True},
            "lora": {"adapters": {"sql": "/adapters/sql"}},
            "ingress": {"server_options": {"lora_modules": ["chat=/adapters/chat"]}},
        }
    )
    words = server_arguments(spec)
    assert "--enable-lora" in words
    at = words.index("--lora-modules")
    assert words[at + 1 : at + 3] == ["chat=/adapters/chat", '{"name": "sql", "path": "/adapters/sql"}']
