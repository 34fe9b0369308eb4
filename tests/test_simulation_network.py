"""Twins that read each other's KV over a modelled network: sharing, cuts, deaths."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from cluster.latency import ConstantLatency
from cluster.sim_engine import KvGone, SimEngine
from cluster.sim_options import TwinOptions
from cluster.spec import ClusterSpec, parse_spec
from cluster.wire import TokenRequest
from deploy.simulator.network import SimNetwork
from deploy.virtual_time import run_virtual

# Bytes per second between two nodes, and seconds until the first byte.
RATE = 1e9
LATENCY_S = 0.01
TOKENS = 100
# With this, the KV of a prompt takes a second on a link of its own.
BYTES_PER_TOKEN = int(RATE / TOKENS)


def spec_of(*, overlap: bool = False, **network: Any) -> ClusterSpec:
    return parse_spec(
        {
            "model": "m",
            "engine": "sim",
            "prefill": {"count": 2},
            "decode": {"count": 2},
            "transfer": {"overlap": overlap},
            "sim": {
                # Its NIC is not used: the spec names another.
                "hardware": "h100",
                "shape": "llama-3-8b",
                "network": {"gpus_per_node": 1, "nic_gbps": RATE * 8 / 1e9, "latency_s": LATENCY_S} | network,
            },
        }
    )


class World:
    """A network with a prefill twin in every place, and reads that are timed."""

    def __init__(self, **network: Any) -> None:  # as of spec_of
        self.network = SimNetwork(spec_of(**network))
        self.engines: dict[str, SimEngine] = {}
        self.serving: list[asyncio.Task[None]] = []
        self.handles: dict[str, dict[str, Any]] = {}
        self.done_s: dict[str, float] = {}
        self.failed: dict[str, KvGone] = {}
        for name in ("prefill-0", "prefill-1"):
            self.join(name, "1")

    def join(self, name: str, incarnation: str) -> None:
        options = TwinOptions(
            blocks=100,
            block_size=16,
            max_model_len=1000,
            max_num_seqs=8,
            max_num_batched_tokens=1000,
            latency=ConstantLatency(),
            lease_s=5.0,
        )
        engine = SimEngine(options, "m", exchange=self.network.exchange(name, incarnation, BYTES_PER_TOKEN))
        self.engines[name] = engine
        self.network.join(name, incarnation, engine)
        self.serving.append(asyncio.create_task(self._serve(engine), name=f"serve-{name}"))

    async def _serve(self, engine: SimEngine) -> None:
        while True:
            for output in (await engine.outputs()).outputs:
                assert output.kv_transfer_params is not None
                self.handles[output.request_id] = output.kv_transfer_params

    async def prefill(self, name: str, *requests: str) -> None:
        for request in requests:
            params = {"max_tokens": 1, "extra_args": {"kv_transfer_params": {"do_remote_decode": True}}}
            self.engines[name].submit(
                TokenRequest(request_id=request, prompt_token_ids=[1] * TOKENS, sampling_params=params)
            )
        while not set(requests) <= set(self.handles):
            await asyncio.sleep(0)

    def read(self, request: str, reader: str) -> asyncio.Task[None]:
        return asyncio.create_task(self._read(request, reader), name=f"read-{request}")

    async def _read(self, request: str, reader: str) -> None:
        loop = asyncio.get_running_loop()
        exchange = self.network.exchange(reader, "1", BYTES_PER_TOKEN)
        exchange.hold(self.handles[request])
        try:
            await exchange.read(self.handles[request], TOKENS)
        except KvGone as gone:
            self.failed[request] = gone
        self.done_s[request] = loop.time()

    async def stop(self) -> None:
        for task in self.serving:
            task.cancel()
        await asyncio.gather(*self.serving, return_exceptions=True)
        for engine in self.engines.values():
            await engine.stop()


def run(story: Coroutine[Any, Any, World]) -> World:
    async def main() -> World:
        world = await story
        await world.stop()
        return world

    return run_virtual(main())[0]


def test_kv_takes_the_time_of_its_bytes_and_frees_its_source() -> None:
    async def story() -> World:
        world = World()
        await world.prefill("prefill-0", "a")
        assert not world.engines["prefill-0"].idle
        await world.read("a", "decode-0")
        return world

    world = run(story())
    assert world.done_s["a"] == pytest.approx(1 + LATENCY_S)
    assert world.engines["prefill-0"].idle
    assert world.network.bytes_moved == TOKENS * BYTES_PER_TOKEN
    assert world.network.tokens_moved == TOKENS


def test_two_from_one_source_share_its_nic_and_two_apart_do_not() -> None:
    async def story(second_source: str, second_reader: str) -> World:
        world = World()
        await world.prefill("prefill-0", "a")
        await world.prefill(second_source, "b")
        await asyncio.gather(world.read("a", "decode-0"), world.read("b", second_reader))
        return world

    for source, reader, takes_s in (
        ("prefill-0", "decode-1", 2),
        ("prefill-1", "decode-0", 2),
        ("prefill-1", "decode-1", 1),
    ):
        world = run(story(source, reader))
        assert world.done_s == pytest.approx({"a": takes_s + LATENCY_S, "b": takes_s + LATENCY_S})


def test_a_later_one_slows_the_first_only_while_both_move() -> None:
    async def story() -> World:
        world = World(latency_s=0)
        await world.prefill("prefill-0", "a", "b")
        first = world.read("a", "decode-0")
        await asyncio.sleep(0.5)
        await asyncio.gather(first, world.read("b", "decode-1"))
        return world

    # Half alone in 0.5 s, the rest at half the rate; then b's second half alone.
    assert run(story()).done_s == pytest.approx({"a": 1.5, "b": 2.0})


def test_a_cut_fails_what_moves_and_what_comes_until_it_is_restored() -> None:
    async def story() -> World:
        world = World()
        await world.prefill("prefill-0", "moving", "refused", "elsewhere", "later")
        moving = world.read("moving", "decode-0")
        await asyncio.sleep(0.5)
        world.network.cut("prefill-0", "decode-0")
        await moving
        await world.read("refused", "decode-0")
        assert world.done_s == {"moving": 0.5, "refused": 0.5}
        await world.read("elsewhere", "decode-1")
        world.network.restore("prefill-0", "decode-0")
        await world.read("later", "decode-0")
        return world

    world = run(story())
    assert set(world.failed) == {"moving", "refused"}
    assert "prefill-0 to decode-0 is cut" in str(world.failed["moving"])
    assert world.failed["moving"].request_id == "moving"
    assert world.network.tokens_moved == 2 * TOKENS


@pytest.mark.parametrize("leaves", ["prefill-0", "decode-0"])
def test_who_leaves_while_kv_moves_ends_its_transfers_and_no_other(leaves: str) -> None:
    async def story() -> World:
        world = World(latency_s=0)
        await world.prefill("prefill-0", "a")
        await world.prefill("prefill-1", "b")
        reads = world.read("a", "decode-0"), world.read("b", "decode-1")
        await asyncio.sleep(0.5)
        world.network.leave(leaves)
        await asyncio.gather(*reads)
        return world

    world = run(story())
    assert set(world.failed) == {"a"}
    assert f"{leaves} is gone" in str(world.failed["a"])
    assert world.done_s == pytest.approx({"a": 0.5, "b": 1.0})


def test_a_new_life_has_nothing_of_the_one_before() -> None:
    async def story() -> World:
        world = World()
        await world.prefill("prefill-0", "a")
        world.network.leave("prefill-0")
        world.join("prefill-0", "2")
        await world.read("a", "decode-0")
        return world

    assert "does not keep it any more" in str(run(story()).failed["a"])


def test_kv_whose_lease_has_ended_is_gone() -> None:
    async def story() -> World:
        world = World()
        await world.prefill("prefill-0", "a")
        await asyncio.sleep(5.5)
        await world.read("a", "decode-0")
        return world

    world = run(story())
    assert set(world.failed) == {"a"}
    assert world.network.bytes_moved == 0


def test_a_reader_that_is_cancelled_leaves_the_link_to_the_others() -> None:
    async def story() -> World:
        world = World(latency_s=0)
        await world.prefill("prefill-0", "a", "b")
        reads = world.read("a", "decode-0"), world.read("b", "decode-1")
        await asyncio.sleep(1.0)
        reads[0].cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        return world

    world = run(story())
    # Half of it in the first second, the rest alone.
    assert world.done_s == pytest.approx({"b": 1.5})


def test_with_overlap_only_what_the_chunks_left_is_moved() -> None:
    async def story(*, overlap: bool) -> World:
        world = World(latency_s=0, overlap=overlap)
        await world.prefill("prefill-0", "a")
        # As after chunks of 80 and 20 tokens, the first sent in the 10 s that the second took.
        world.handles["a"] |= {"chunks_s": 10.0, "last_chunk_share": 0.2}
        await world.read("a", "decode-0")
        return world

    assert run(story(overlap=False)).done_s["a"] == pytest.approx(1.0)
    assert run(story(overlap=True)).done_s["a"] == pytest.approx(0.2)


def test_without_hardware_kv_is_there_at_once() -> None:
    spec = parse_spec({"model": "m", "engine": "sim"})

    async def main() -> float:
        network = SimNetwork(spec)
        handle = {"remote_request_id": "a", "remote_instance": "prefill-0", "remote_incarnation": "1"}
        await network.move("prefill-0", "decode-0", handle, 1e9)
        return asyncio.get_running_loop().time()

    assert run_virtual(main())[0] < 1e-4
