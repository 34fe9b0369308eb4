"""What routers are told of an engine's cache, from what vLLM says of its memory and of what is behind it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import vllm_api
from cluster.prefix_hash import chain_hashes
from cluster.vllm_kv_events import VllmKvEvents

pytestmark = pytest.mark.vllm

BLOCK = 128
TOKENS = list(range(2 * BLOCK))
NAMES = list(chain_hashes(TOKENS, BLOCK))
KEYS = [b"a", b"b"]


@pytest.fixture
def events() -> Iterator[VllmKvEvents]:
    made = VllmKvEvents({})
    yield made
    made.close()


def stored(medium: str = "GPU") -> Any:
    return vllm_api.BlockStored(
        block_hashes=list(KEYS), parent_block_hash=None, token_ids=TOKENS if medium == "GPU" else [],
        block_size=BLOCK, lora_id=None, medium=medium, lora_name=None,
    )  # fmt: skip


class BlockRemoved(SimpleNamespace):
    """As vLLM's."""


class AllBlocksCleared(SimpleNamespace):
    """As vLLM's."""


def removed(medium: str = "GPU") -> Any:
    return BlockRemoved(block_hashes=list(KEYS), medium=medium, group_idx=None)


@pytest.mark.parametrize("order", [("GPU", "CPU"), ("CPU", "GPU")])
def test_what_main_memory_has_is_there(events: VllmKvEvents, order: tuple[str, str]) -> None:
    """Whichever comes first: blocks of another instance's files are in main memory before."""
    for medium in order:
        events._apply(stored(medium))
    assert events._changes.take().stored == NAMES
    events._apply(removed())
    assert not events._changes
    events._apply(stored())  # and in the engine again
    events._apply(removed())
    assert not events._changes.take().removed
    events._apply(removed("CPU"))
    assert events._changes.take().removed == NAMES
    assert not events._places


def test_an_engine_that_forgets_all_leaves_what_main_memory_has(events: VllmKvEvents) -> None:
    events._apply(stored())
    events._apply(AllBlocksCleared())
    assert events._changes.take().removed == NAMES
    events._apply(stored())
    events._apply(stored("CPU"))
    events._apply(AllBlocksCleared())
    assert events._changes.take().stored == NAMES
    events.host_is_empty()
    assert events._changes.take().removed == NAMES
    assert not events._places
