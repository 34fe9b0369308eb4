from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.errors import IncompatiblePeer
from cluster.instance import InstanceState, Role
from cluster.registry import Registry
from tests.twins import FACTS


def ready(registry: Registry, instance_id: str, incarnation: str = "1", facts=FACTS) -> None:
    registry.starting(instance_id, incarnation=incarnation)
    registry.register(
        instance_id, incarnation=incarnation, address="tcp://127.0.0.1:1", node="n", pid=7, facts=facts
    )


def two_places() -> Registry:
    return Registry([("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE)])


def test_a_life_from_start_to_end() -> None:
    registry = two_places()
    ready(registry, "prefill-0")
    assert [i.instance_id for i in registry.snapshot().ready(Role.PREFILL)] == ["prefill-0"]
    registry.draining("prefill-0")
    assert registry.get("prefill-0").state is InstanceState.DRAINING
    registry.gone("prefill-0", incarnation="1", detail="drained")
    assert registry.get("prefill-0").state is InstanceState.GONE
    assert registry.get("prefill-0").address == ""


def test_every_change_makes_a_newer_snapshot() -> None:
    registry = two_places()
    versions = [registry.snapshot().version]
    ready(registry, "prefill-0")
    versions.append(registry.snapshot().version)
    registry.gone("prefill-0", incarnation="1", detail="died")
    versions.append(registry.snapshot().version)
    registry.gone("prefill-0", incarnation="1", detail="died")
    assert versions == sorted(set(versions))
    assert registry.snapshot().version == versions[-1]


def test_news_of_an_earlier_life_changes_nothing() -> None:
    registry = two_places()
    ready(registry, "prefill-0", "1")
    ready(registry, "prefill-0", "2")
    registry.gone("prefill-0", incarnation="1", detail="late news")
    registry.progress("prefill-0", incarnation="1", detail="late news")
    assert registry.get("prefill-0").state is InstanceState.READY
    assert registry.get("prefill-0").incarnation == "2"


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", "x"), ("dtype", "float32"), ("block_size_tokens", 32), ("engine", "vllm 9")],
)
def test_another_fingerprint_is_refused_with_both(field: str, value: object) -> None:
    registry = two_places()
    ready(registry, "prefill-0")
    other = replace(FACTS, fingerprint=replace(FACTS.fingerprint, **{field: value}))
    with pytest.raises(IncompatiblePeer) as caught:
        ready(registry, "decode-0", facts=other)
    assert caught.value.ours == FACTS.fingerprint
    assert caught.value.theirs == other.fingerprint
    assert registry.get("decode-0").state is InstanceState.STARTING


def test_with_nobody_ready_the_next_sets_the_fingerprint() -> None:
    registry = two_places()
    ready(registry, "prefill-0")
    registry.gone("prefill-0", incarnation="1", detail="rolled")
    other = replace(FACTS, fingerprint=replace(FACTS.fingerprint, model="new"))
    ready(registry, "decode-0", facts=other)
    assert registry.fingerprint == other.fingerprint
