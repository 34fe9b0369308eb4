"""Live twins read each other's KV over real sockets, in one process: tokens, blocks, leases, death."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.instance import Role
from cluster.sim_engine import KvGone, SimEngine
from cluster.sim_exchange import SocketExchange, nic_bytes_per_s
from cluster.sim_options import TwinOptions, twin_options
from cluster.spec import ClusterSpec, parse_spec
from cluster.wire import TokenOutput, TokenRequest
from tests.twins import expected_tokens, until

PROMPT = list(range(100, 148))
LEASE_S = 6


def spec_of(**sim: Any) -> ClusterSpec:
    return parse_spec(
        {
            "model": "m",
            "device": "cpu",
            "engine": "sim",
            "transfer": {"lease_s": LEASE_S},
            "sim": {"step_s": 0.0005, "max_model_len": 4096} | sim,
        }
    )


def test_who_shares_a_node_has_its_links_between_them() -> None:
    """Of an H100 450 GB/s within a node, 50 GB/s of it to others."""
    spec = spec_of(hardware="h100", shape="llama-3-8b")
    spec = spec.model_copy(update={"colocate": 2, "decode": spec.decode.model_copy(update={"count": 2})})
    facts = {"host": "127.0.0.1", "incarnation": "1", "kv_bytes_per_token": 1000}
    exchange = SocketExchange.of(spec, Role.DECODE, instance_id="decode-0", **facts)
    handle = {"remote_bytes_per_s": 50e9, "remote_beside_bytes_per_s": 450e9}
    near, far = (
        exchange._transfer_s({**handle, "remote_instance": name}, 1000) - spec.sim.network.latency_s
        for name in ("prefill-0", "decode-1")
    )
    assert (near, far) == (pytest.approx(1e6 / 450e9), pytest.approx(1e6 / 50e9))


class Twin:
    """An engine with its exchange, its outputs collected."""

    def __init__(self, instance_id: str, options: TwinOptions, *, slow_s: float, incarnation: str) -> None:
        self.exchange = SocketExchange(
            host="127.0.0.1",
            instance_id=instance_id,
            incarnation=incarnation,
            bytes_per_s=1e9,
            kv_bytes_per_token=1000,
            latency_s=slow_s,
        )
        self.engine = SimEngine(options, "m", exchange=self.exchange)
        self.exchange.source = self.engine
        self.outputs: dict[str, list[TokenOutput]] = {}

    async def start(self) -> None:
        await self.exchange.start()
        self.serving = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        self.serving.cancel()
        await asyncio.gather(self.serving, return_exceptions=True)
        await self.engine.stop()
        await self.exchange.close()

    async def _serve(self) -> None:
        while True:
            for output in (await self.engine.outputs()).outputs:
                self.outputs.setdefault(output.request_id, []).append(output)

    def submit(self, name: str, prompt: list[int], count: int, transfer: Any) -> None:
        params = {"max_tokens": count, "extra_args": {"kv_transfer_params": transfer}}
        self.engine.submit(
            TokenRequest(request_id=name, prompt_token_ids=list(prompt), sampling_params=params)
        )

    async def prefilled(self, name: str = "p") -> tuple[list[int], dict[str, Any]]:
        """The first token, and the handle of the blocks kept."""
        self.submit(name, PROMPT, 1, {"do_remote_decode": True})
        await until(lambda: name in self.outputs)
        output = self.outputs[name][-1]
        assert output.kv_transfer_params is not None
        return output.new_token_ids, output.kv_transfer_params

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.outputs.get(name, []) for token in output.new_token_ids]

    def read_tokens(self, name: str) -> int:
        stats = self.outputs[name][0].prefill_stats
        assert stats is not None
        return stats.num_external_cached_tokens


@asynccontextmanager
async def pair(slow_s: float = 0.0) -> AsyncIterator[tuple[Twin, Twin]]:
    options = twin_options(spec_of(), Role.PREFILL, {})
    twins = [
        Twin(instance_id, options, slow_s=slow_s, incarnation="1")
        for instance_id in ("prefill-0", "decode-0")
    ]
    for twin in twins:
        await twin.start()
    try:
        yield twins[0], twins[1]
    finally:
        for twin in twins:
            await twin.stop()


def lease_ends(twin: Twin, name: str) -> None:
    """As if `lease_s` had passed."""
    twin.engine._leases[name]._run()


async def test_a_reader_goes_on_with_the_same_tokens_and_the_source_frees_its_blocks() -> None:
    async with pair() as (source, reader):
        for number in range(3):
            first, handle = await source.prefilled(f"p{number}")
            assert not source.engine.idle
            reader.submit(f"d{number}", PROMPT + first, 9, handle)
            await until(lambda name=f"d{number}": len(reader.tokens(name)) == 9)  # type: ignore[misc]
            assert first + reader.tokens(f"d{number}") == expected_tokens(PROMPT, 10)
        assert reader.read_tokens("d0") == len(PROMPT)
        await until(lambda: source.engine.idle and reader.engine.idle)


async def test_reading_takes_latency_and_bytes_over_the_slower_nic() -> None:
    async with pair(slow_s=0.02) as (source, reader):
        _, handle = await source.prefilled()
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        reader.exchange._bytes_per_s = 1e6
        await reader.exchange.read(handle, 30)
        assert loop.time() - began_s >= 0.02 + 30 * 1000 / 1e6
        handle |= {"chunks_s": 0.01, "last_chunk_share": 0.2}
        reader.exchange._overlap = True
        assert reader.exchange._transfer_s(handle, 30) == pytest.approx(0.02 + 0.02)
        assert reader.exchange._transfer_s(handle | {"chunks_s": 9}, 30) == pytest.approx(0.02 + 0.006)


async def test_blocks_that_nobody_asks_for_are_freed_when_their_lease_ends() -> None:
    async with pair() as (source, reader):
        first, handle = await source.prefilled()
        lease_ends(source, "p")
        assert source.engine.idle
        with pytest.raises(KvGone, match="does not keep it"):
            await reader.exchange.read(handle, len(PROMPT))
        reader.submit("d", PROMPT + first, 9, handle)
        await until(lambda: len(reader.tokens("d")) == 9)
        assert first + reader.tokens("d") == expected_tokens(PROMPT, 10)
        assert reader.read_tokens("d") == 0


async def test_a_hold_ends_the_lease_and_a_reader_that_lets_go_starts_it_again() -> None:
    async with pair() as (source, reader):
        _, handle = await source.prefilled()
        assert "p" in source.engine._leases
        reader.exchange.hold(handle)
        await until(lambda: "p" not in source.engine._leases)
        assert not source.engine.idle
        reader.exchange.let_go(handle)
        await until(lambda: "p" in source.engine._leases)
        lease_ends(source, "p")
        assert source.engine.idle


async def test_a_reader_that_dies_gives_back_what_it_held() -> None:
    async with pair() as (source, reader):
        _, handle = await source.prefilled()
        reader.exchange.hold(handle)
        await until(lambda: "p" not in source.engine._leases)
        await reader.exchange.close()
        await until(lambda: "p" in source.engine._leases)


async def test_a_dead_source_is_told_at_once_and_the_reader_computes_it_anew() -> None:
    async with pair(slow_s=60.0) as (source, reader):
        first, handle = await source.prefilled()
        reader.submit("d", PROMPT + first, 9, handle)
        await until(lambda: "d" in reader.engine._reads and "p" not in source.engine._leases)
        await source.stop()
        await until(lambda: len(reader.tokens("d")) == 9)
        assert first + reader.tokens("d") == expected_tokens(PROMPT, 10)
        assert reader.read_tokens("d") == 0
        await source.start()  # to be stopped again; on another port
        with pytest.raises(KvGone, match=r"prefill-0: .*(refused|Connect call failed)"):
            await reader.exchange.read(handle, 1)


async def test_a_request_aborted_while_it_reads_frees_its_blocks_and_starts_the_lease_again() -> None:
    async with pair(slow_s=60.0) as (source, reader):
        first, handle = await source.prefilled()
        reader.submit("d", PROMPT + first, 9, handle)
        await until(lambda: "d" in reader.engine._reads and "p" not in source.engine._leases)
        assert reader.engine.load().kv_usage > 0
        reader.engine.abort(["d"])
        assert reader.engine.idle
        await until(lambda: "p" in source.engine._leases)
        source.engine.release(["p"])
        assert source.engine.idle


async def test_another_life_at_the_same_address_is_not_taken_for_the_source(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with pair() as (source, reader):
        _, handle = await source.prefilled()
        with pytest.raises(KvGone, match="its connection closed"):
            await reader.exchange.read(handle | {"remote_incarnation": "0"}, 1)
        assert "a reader looks for" in caplog.text
        assert "p" in source.engine._leases


async def test_a_message_that_can_not_be_read_costs_a_connection_and_not_the_source(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with pair() as (source, reader):
        _, handle = await source.prefilled()
        for line in (b"no json\n", b'["sing", "p"]\n'):
            link = reader.exchange._link_to(handle)
            await until(lambda link=link: link._writer is not None)  # type: ignore[misc]
            link._writer.write(line)  # type: ignore[union-attr]
            await until(lambda: not reader.exchange._sources)
        assert caplog.text.count("lost a reader") == 2
        await reader.exchange.read(handle, len(PROMPT))
        await until(lambda: source.engine.idle)


async def test_a_source_that_does_not_answer_is_gone_after_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.sim_exchange.ANSWER_DEADLINE_S", 0.01)
    async with pair() as (source, reader):
        _, handle = await source.prefilled()
        monkeypatch.setattr(source.exchange, "_take", lambda *_: None)
        with pytest.raises(KvGone, match=r"no answer in 0\.01 s"):
            await reader.exchange.read(handle, 1)


def test_the_rate_of_an_instance_is_that_of_all_its_nics() -> None:
    def rate(**sim: Any) -> float:
        spec = spec_of(**sim).model_copy()
        spec = spec.model_copy(
            update={"prefill": spec.prefill.model_copy(update={"tensor_parallel_size": 2})}
        )
        return nic_bytes_per_s(spec, Role.PREFILL)

    assert rate() == 2e15
    assert rate(network={"nic_gbps": 80}) == 2e10
    assert rate(hardware="h100", shape="llama-3-8b") == 2 * 50e9
    no_nvlink = {"nic_gbps": 4000, "nvlink_gbps": 0}
    assert rate(hardware="h100", shape="llama-3-8b", network=no_nvlink) == 2 * 64e9
