"""Running requests of a real vLLM engine go on in another one, over real NIXL."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from cluster import wire
from cluster.handle import Follower, KvHandle, follow, handle_of
from deploy.tiny_model_torch import build_tiny_model
from kv_transfer.stats_vllm import EARLY_BYTES
from tests.hybrid_model_torch import build_hybrid_model
from tests.test_engines_vllm import BLOCK, Process, pair
from tests.test_overlap_vllm import finished

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

TOKENS = 40
# The last token before a move is at, and beside, every kind of place in a block.
LENGTHS = [1, 100, *(2 * BLOCK - m for m in (12, 11, 10, 9, 8)), 700]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


async def until_handed_over(
    engine: Process, name: str, prompt: list[int], at_least: int, kv: dict[str, Any] | None = None
) -> tuple[list[int], KvHandle | None, Any]:
    """Its tokens until it is handed over, which it is told to be when it has so many."""
    await engine.add(name, prompt, TOKENS, kv)
    tokens: list[int] = []
    stats = None
    told = False
    while True:
        for output in await engine.step():
            if output.request_id != name:
                continue
            tokens += output.new_token_ids
            stats = output.prefill_stats or stats
            if output.finish_reason is not None:
                return tokens, handle_of(output.kv_transfer_params), stats
        if len(tokens) >= at_least and not told:
            told = True
            await engine.post(wire.HAND_OVER, wire.pack(wire.HandOver(name)))


async def empty(engine: Process) -> None:
    """No block is in use. What was read elsewhere is freed with a later step."""
    async with asyncio.timeout(20):
        while not engine.loads or engine.loads[-1].kv_usage > 0 or engine.loads[-1].running:
            await engine.step()


async def check_every_place_in_a_block(here: Process, there: Process) -> None:
    rng = random.Random(1)
    for length in LENGTHS:
        prompt = [rng.randrange(100, 4000) for _ in range(length)]
        whole, _, _ = await there.generate(f"whole-{length}", prompt, TOKENS)
        assert await there.call("reset_prefix_cache")
        first, handle, _ = await until_handed_over(here, f"a-{length}", prompt, rng.randint(1, 12))
        assert handle is not None
        assert 1 < len(first) < TOKENS
        assert handle.tokens == length + len(first) - 1
        left = TOKENS - len(first)
        rest, _, stats = await there.generate(f"b-{length}", prompt + first, left, dict(handle.params))
        assert first + rest == whole, length
        assert stats.num_external_cached_tokens == handle.tokens
        await empty(here)


async def check_back_and_forth(here: Process, there: Process) -> None:
    """A request that was read is handed over as well as one that began here."""
    rng = random.Random(2)
    prompt = [rng.randrange(100, 4000) for _ in range(2 * BLOCK - 5)]
    whole, _, _ = await here.generate("whole", prompt, 200)
    engines = [here, there]
    tokens: list[int] = []
    handle: KvHandle | None = None
    for hop in range(8):
        engine = engines[hop % 2]
        assert await engine.call("reset_prefix_cache")
        more, handle, stats = await until_handed_over(
            engine, f"hop-{hop}", prompt + tokens, rng.randint(1, 20), dict(handle.params) if handle else None
        )
        assert handle is not None
        if hop:
            assert stats.num_external_cached_tokens == len(prompt) + len(tokens) - 1
        tokens += more
    rest, _, _ = await here.generate("last", prompt + tokens, 200 - len(tokens), dict(handle.params))
    assert tokens + rest == whole
    await empty(here)
    await empty(there)


async def moved_ahead(
    here: Process, there: Process, name: str, prompt: list[int], more: int, poison: bool = False
) -> tuple[list[int], Any]:
    """A request that is told to go on with so many more tokens, and read meanwhile; its tokens, and the
    reader's statistics.

    Args:
        poison: let the reader have blocks in its cache of what keeps the places of tokens to come.
    """
    source, reader = f"{name}-source", f"{name}-reader"
    await here.add(source, prompt, TOKENS)
    tokens: list[int] = []
    while len(tokens) < 2:
        for output in await here.step():
            tokens += output.new_token_ids
    known = len(tokens)
    padded = prompt + tokens + [0] * (more - 1)
    if poison:
        await there.generate(f"{name}-poison", [*padded, 0], 1)
    await there.add(reader, padded, TOKENS - known - more, follow(len(padded), more - 1))
    follower = Follower(there.facts["news_address"], reader)
    await here.post(wire.HAND_OVER, wire.pack(wire.HandOver(source, known + more, follower)))
    rest, handle, _ = await finished(here, source)
    assert handle is not None
    assert len(rest) == more
    assert handle.tokens == len(prompt) + known + more - 1
    message = wire.GoOn(reader, rest, dict(handle.params), more - 1)
    await there.post(wire.GO_ON, wire.pack(message))
    last, _, stats = await finished(there, reader)
    return tokens + rest + last, stats


async def check_read_ahead(here: Process, there: Process) -> None:
    """What is there when it is told to go on is read while it still decodes, and the tokens are the same."""
    rng = random.Random(3)
    early = there.transfers.setdefault(EARLY_BYTES, [])
    for length in (1, 100, BLOCK - 30, 2 * BLOCK - 12, 700, 1500):
        prompt = [rng.randrange(100, 4000) for _ in range(length)]
        whole, _, _ = await there.generate(f"ahead-{length}", prompt, TOKENS)
        assert await there.call("reset_prefix_cache")
        before = sum(early)
        tokens, stats = await moved_ahead(here, there, f"ahead-{length}", prompt, rng.randint(6, 20))
        assert tokens == whole, length
        assert stats.num_local_cached_tokens == 0
        assert (sum(early) > before) == (length > BLOCK)
        await empty(here)
    prompt = [rng.randrange(100, 4000) for _ in range(2 * BLOCK - 6)]
    whole, _, _ = await here.generate("unread", prompt, TOKENS)
    assert await there.call("reset_prefix_cache")
    tokens, stats = await moved_ahead(here, there, "unread", prompt, 12, poison=True)
    assert tokens == whole
    assert stats.num_local_cached_tokens == BLOCK, "the first block, of the prompt alone"
    await empty(here)
    await empty(there)


async def check_what_is_not_handed_over(here: Process, there: Process) -> None:
    """Its last token, an unknown request, and one that its client has left."""
    prompt = [7] * 50
    tokens, handle, _ = await until_handed_over(here, "late", prompt, TOKENS - 1)
    assert len(tokens) == TOKENS
    assert handle is None
    for name in ("nobody", "late"):
        await here.post(wire.HAND_OVER, wire.pack(wire.HandOver(name)))
    again, _, _ = await here.generate("again", prompt, TOKENS)
    assert again == tokens
    await here.add("left", prompt, 400)
    while not any(output.new_token_ids for output in await here.step()):
        pass
    await here.post(wire.HAND_OVER, wire.pack(wire.HandOver("left")))
    await here.post(wire.ABORT, wire.pack(["left"]))
    await here.generate("after", prompt, 2)
    await empty(here)


async def test_requests_go_on_in_another_engine(model: Path) -> None:
    async with pair(model, "own") as (here, there):
        await check_every_place_in_a_block(here, there)
        await check_back_and_forth(here, there)
        await check_read_ahead(here, there)
        await check_what_is_not_handed_over(here, there)


async def test_with_sliding_windows(tmp_path: Path) -> None:
    async with pair(build_hybrid_model(tmp_path / "hybrid"), "thread") as (here, there):
        await check_back_and_forth(here, there)
