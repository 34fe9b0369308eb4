"""Either side of a transfer is killed at any time: the other one frees its blocks, and serves right tokens.

PDSERVE_CHAOS=50 pytest tests/test_chaos_vllm.py is the docs' figure, and takes a quarter of an hour.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import pytest
import zmq.asyncio

from cluster import wire
from cluster.handle import Follower, KvHandle, follow, handle_of, keep_for_reader
from deploy.tiny_model_torch import build_tiny_model
from tests.test_engines_vllm import Process, start
from tests.test_overlap_vllm import OPTIONS

KILLS = int(os.environ.get("PDSERVE_CHAOS", "2"))
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240 + 40 * KILLS)]

PROMPT, TOKENS = 3000, 6
# From sending a prompt on, within which its KV has moved.
LATEST_S = 0.35
FREE_WITHIN_S = 2.0
OTHER = {"prefill": "decode", "decode": "prefill"}
CORES = {"prefill": "0", "decode": "1"}


class Pair:
    """Two engines, of which one is killed now and then, and a request as the router drives it."""

    def __init__(self, model: Path, context: zmq.asyncio.Context) -> None:
        self._model = model
        self._context = context
        self.engines: dict[str, Process] = {}
        self.handle: KvHandle | None = None

    async def start(self, role: str) -> None:
        overrides = {"engine_options": OPTIONS}
        self.engines[role] = await start(self._model, role, "thread", CORES[role], self._context, overrides)

    async def kill(self, role: str) -> None:
        engine = self.engines.pop(role)
        engine.process.kill()
        await engine.process.wait()
        engine.socket.close()

    async def request(self, name: str, prompt: list[int], *, early: bool) -> None:
        """One request, to its end or until it is cancelled."""
        prefill, decode = self.engines["prefill"], self.engines["decode"]
        source, reader = f"{name}-p", f"{name}-d"
        self.handle = None
        follower = None
        if early:
            await decode.add(reader, list(prompt), TOKENS, follow(len(prompt)))
            follower = Follower(decode.facts["news_address"], reader)
        await prefill.add(source, prompt, 1, keep_for_reader(follower))
        first: list[int] = []
        while self.handle is None:
            for output in await prefill.step():
                if output.request_id == source:
                    first += output.new_token_ids
                    self.handle = handle_of(output.kv_transfer_params)
        params = dict(self.handle.params)
        if early:
            await decode.post(wire.GO_ON, wire.pack(wire.GoOn(reader, first, params)))
        else:
            await decode.add(reader, prompt + first, TOKENS, params)
        while True:
            await decode.step()

    async def given_up(self, name: str, survivor: str) -> float:
        """As the router does when an instance is lost; seconds until the other one has freed all."""
        engine = self.engines[survivor]
        began_s = time.monotonic()
        await engine.post(wire.ABORT, wire.pack([f"{name}-p", f"{name}-d"]))
        await engine.post(wire.RELEASE, wire.pack([f"{name}-p"]))
        # Its answer comes after what it has said before.
        await engine.call("is_sleeping")
        async with asyncio.timeout(20):
            while engine.loads and (engine.loads[-1].kv_usage > 0 or engine.loads[-1].running):
                await engine.step()
        return time.monotonic() - began_s


async def test_the_survivor_frees_its_blocks_and_serves_right_tokens(tmp_path: Path) -> None:
    rng = random.Random(11)
    context = zmq.asyncio.Context()
    both = Pair(build_tiny_model(tmp_path / "tiny"), context)
    freed_s: list[float] = []
    read = 0
    try:
        await both.start("prefill")
        await both.start("decode")
        probe = [rng.randrange(100, 4000) for _ in range(900)]
        right, _, _ = await both.engines["decode"].generate("right", probe, TOKENS)
        for number in range(KILLS):
            victim = ("prefill", "decode")[number % 2]
            prompt = [rng.randrange(100, 4000) for _ in range(PROMPT)]
            await both.engines["decode"].generate(f"warm-{number}", [5] * 9, 1)
            before = sum(both.engines["decode"].transfers.get("bytes_transferred", ()))
            serving = asyncio.create_task(both.request(f"r{number}", prompt, early=number % 4 < 2))
            await asyncio.sleep(rng.uniform(0.0, LATEST_S))
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await both.kill(victim)
            survivor = OTHER[victim]
            freed_s.append(await both.given_up(f"r{number}", survivor))
            engine = both.engines[survivor]
            tokens, _, _ = await engine.generate(f"probe-{number}", probe, TOKENS)
            assert tokens == right, number
            if survivor == "decode":
                read += sum(engine.transfers.get("bytes_transferred", ())) > before
            # Nothing that it read of a prompt without an end is found in its cache.
            tokens, _, _ = await engine.generate(f"again-{number}", prompt, TOKENS)
            await both.start(victim)
            fresh, _, _ = await both.engines[victim].generate(f"fresh-{number}", prompt, TOKENS)
            assert tokens == fresh, number
    finally:
        for role in list(both.engines):
            await both.kill(role)
        context.destroy(linger=0)
    print(f"\n{KILLS} kills, {read} with KV moved before; blocks free after {max(freed_s):.2f} s at most")
    assert max(freed_s) < FREE_WITHIN_S
