"""An engine's host and an ingress' link over real ZeroMQ, with the twin engine, in one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from cluster import wire
from cluster.engine import Doorman, EngineDied
from cluster.errors import EngineFailure, IncompatiblePeer, InstanceLost, NoInstance, ServingError
from cluster.host_zmq import EngineHost
from cluster.instance import InstanceInfo, InstanceState, Role
from cluster.metrics import IngressMetrics
from cluster.registry import Membership
from cluster.request import ServeRequest
from cluster.sim_engine import SIM_ENGINE_NAME, SimEngine
from cluster.spec import ClusterSpec, DeadlineSpec, SimEngineSpec
from cluster.wire import Offer, StepOutputs, TokenRequest
from prefill_worker.doorman import LearningDoorman
from router.hop import Hop
from router.link_zmq import LinkKeeper, ZmqLink
from router.policy import LeastTokens
from router.router import Router
from tests.twins import expected_tokens, info_of, until

PROMPT = list(range(100, 130))
SIM = SimEngineSpec(step_s=0.001, max_model_len=200_000)
SPEC = ClusterSpec(model="m", device="cpu", engine="sim", sim=SIM)


class OneAtATime:
    """A doorman that takes a prompt when there is none."""

    def __init__(self) -> None:
        self.inside: set[str] = set()
        self.most = 0

    def asked(self, offer: Offer, now_s: float) -> float | None:
        if self.inside and not offer.must_take:
            return 0.001
        self.inside.add(offer.request_id)
        self.most = max(self.most, len(self.inside))
        return None

    def answered(self, request_ids: Iterable[str], now_s: float) -> None:
        self.inside.difference_update(request_ids)

    def left(self, request_ids: Iterable[str], now_s: float) -> None:
        self.inside.difference_update(request_ids)


class Instance:
    """A host with a twin engine, serving in this loop."""

    def __init__(self, instance_id: str, index: int = 0, doorman: Doorman | None = None) -> None:
        self.engine = SimEngine.of(SPEC, Role.PREFILL, tells_blocks=True)
        self.host = EngineHost(
            self.engine,
            engine_name=SIM_ENGINE_NAME,
            instance_id=instance_id,
            incarnation="1",
            doorman=doorman,
        )
        self.info: InstanceInfo = info_of(instance_id, index)

    async def start(self) -> Instance:
        address = await self.host.bind("127.0.0.1")
        self.info = replace(self.info, address=address)
        self.serving = asyncio.create_task(self.host.serve())
        return self

    async def stop(self) -> None:
        self.serving.cancel()
        with suppress(asyncio.CancelledError, EngineDied):
            await self.serving
        await self.host.close()


class Ingress:
    """A router with a LinkKeeper; collects what its clients get."""

    def __init__(self, name: str, *, with_prefixes: bool = False) -> None:
        self.router = Router(
            LeastTokens(),
            DeadlineSpec(),
            self,
            IngressMetrics(CollectorRegistry()),
            with_prefixes=with_prefixes,
        )
        self.keeper = LinkKeeper(
            self.router,
            ingress=name,
            engine=SIM_ENGINE_NAME,
            encode=self._encode,
            on_outputs=self._on_outputs,
            on_left=lambda info: self.left.append(info.instance_id),
        )
        self.left: list[str] = []
        self.tokens: dict[str, list[int]] = {}
        self.errors: dict[str, ServingError] = {}
        self.messages = 0

    def _encode(self, hop: Hop) -> Sequence[Any]:
        extra: dict[str, Any] = {}
        if (kv_params := hop.kv_params) is not None:
            extra = {"kv_transfer_params": dict(kv_params)}
        params = {"max_tokens": hop.max_tokens, "extra_args": extra}
        request = TokenRequest(
            request_id=hop.hop_id, prompt_token_ids=hop.prompt_token_ids, sampling_params=params
        )
        return [msgspec.msgpack.encode(request)]

    def _on_outputs(self, info: InstanceInfo, frames: Sequence[Any]) -> None:
        self.messages += 1
        step = msgspec.msgpack.decode(frames[0], type=StepOutputs)
        for output in self.router.on_outputs(info.instance_id, step.outputs):
            self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)

    def fail(self, request_id: str, error: ServingError) -> None:
        self.errors[request_id] = error

    def forget(self, request_id: str) -> None:
        pass

    async def reach(self, *instances: Instance) -> None:
        self.keeper.sync(Membership(version=1, instances=tuple(i.info for i in instances)))
        await until(lambda: len(self.keeper.links) == len(instances))

    def submit(self, request_id: str, count: int) -> None:
        self.router.submit(ServeRequest(request_id=request_id, prompt_token_ids=PROMPT, max_tokens=count))


@asynccontextmanager
async def cluster(
    *instance_ids: str, doormen: dict[str, Doorman] | None = None
) -> AsyncIterator[tuple[Ingress, dict[str, Instance]]]:
    at = doormen or {}
    instances = {i: await Instance(i, n, at.get(i)).start() for n, i in enumerate(instance_ids)}
    ingress = Ingress("ingress-1")
    await ingress.reach(*instances.values())
    try:
        yield ingress, instances
    finally:
        await ingress.keeper.close()
        for instance in instances.values():
            await instance.stop()


async def test_requests_go_through_the_split() -> None:
    async with cluster("prefill-0", "decode-0") as (ingress, _):
        for number in range(20):
            ingress.submit(f"r{number}", 10)
        await until(lambda: not ingress.router.pending)
        assert ingress.errors == {}
        assert all(tokens == expected_tokens(PROMPT, 10) for tokens in ingress.tokens.values())
        assert len(ingress.tokens) == 20


async def test_an_ingress_learns_what_is_cached_where_also_when_it_comes_later() -> None:
    prompt = list(range(100, 400))  # and all that a prompt has of them are two spans of 128
    asked = ServeRequest(request_id="next", prompt_token_ids=prompt, max_tokens=2)
    salted = replace(asked, plain_prompt=False)
    async with cluster("prefill-0", "decode-0") as (plain, instances):
        one = Ingress("ingress-2", with_prefixes=True)
        await one.reach(*instances.values())
        one.router.submit(replace(asked, request_id="r", max_tokens=40))
        await until(lambda: not one.router.pending)
        await until(lambda: one.router.fleet.cached(asked) == {"prefill-0": 256, "decode-0": 256})
        two = Ingress("ingress-3", with_prefixes=True)
        await two.reach(*instances.values())
        await until(lambda: two.router.fleet.cached(asked) == {"prefill-0": 256, "decode-0": 256})
        assert two.router.fleet.cached(salted) == {}
        assert plain.router.fleet.cached(asked) == {}
        await instances["prefill-0"].stop()
        await until(lambda: one.router.fleet.cached(asked) == {"decode-0": 256})
        await one.keeper.close()
        await two.keeper.close()


async def test_one_message_per_step_and_not_per_token() -> None:
    async with cluster("prefill-0", "decode-0") as (ingress, instances):
        for number in range(50):
            ingress.submit(f"r{number}", 20)
        await until(lambda: not ingress.router.pending)
        steps = sum(instance.host.steps for instance in instances.values())
        assert ingress.messages <= steps < 50 * 20 / 5


async def test_two_ingresses_share_instances_and_one_may_leave() -> None:
    async with cluster("prefill-0", "decode-0") as (one, instances):
        two = Ingress("ingress-2")
        await two.reach(*instances.values())
        one.submit("same-id", 200)
        two.submit("other-id", 200)
        await until(lambda: two.tokens.get("other-id"))
        two.router.abort(["other-id"])
        await two.keeper.close()
        await until(lambda: not one.router.pending)
        assert one.tokens["same-id"] == expected_tokens(PROMPT, 200)
        await until(lambda: all(i.host.requests == 0 for i in instances.values()))
        assert all(i.host.ingresses == ["ingress-1"] for i in instances.values())


async def test_an_ingress_that_vanishes_has_its_requests_aborted() -> None:
    async with cluster("prefill-0", "decode-0") as (_, instances):
        two = Ingress("ingress-2")
        await two.reach(*instances.values())
        two.submit("r", 100_000)
        await until(lambda: len(two.tokens.get("r", [])) > 3)
        for link in list(two.keeper.links.values()):
            link._socket.close(linger=0)  # no goodbye, as a killed process
        await until(lambda: all(i.host.requests == 0 for i in instances.values()))
        await until(lambda: not instances["decode-0"].engine.load().running)
        two.router.abort(["r"])
        await two.keeper.close()


async def test_an_aborted_request_leaves_the_engine() -> None:
    async with cluster("prefill-0", "decode-0") as (ingress, instances):
        ingress.submit("r", 100_000)
        await until(lambda: len(ingress.tokens.get("r", [])) > 3)
        ingress.router.abort(["r"])
        await until(lambda: not instances["decode-0"].engine.load().running)
        assert instances["decode-0"].host.requests == 0


async def test_a_busy_instance_refuses_what_another_takes() -> None:
    doorman = OneAtATime()
    doorman.inside.add("of another ingress")
    async with cluster("prefill-0", "prefill-1", "decode-0", doormen={"prefill-0": doorman}) as (one, others):
        for number in range(10):
            one.submit(f"r{number}", 5)
        await until(lambda: not one.router.pending)
        assert one.errors == {}
        assert all(tokens == expected_tokens(PROMPT, 5) for tokens in one.tokens.values())
        assert one.router.metrics.refusals.labels(role="prefill")._value.get() >= 1
        assert doorman.inside == {"of another ingress"}
        assert others["prefill-0"].host.requests == 0


async def test_ingresses_that_know_nothing_of_each_other_share_what_each_instance_takes() -> None:
    doormen = {"prefill-0": OneAtATime(), "prefill-1": OneAtATime()}
    async with cluster("prefill-0", "prefill-1", "decode-0", doormen=doormen) as (one, instances):
        two = Ingress("ingress-2")
        await two.reach(*instances.values())
        for number in range(10):
            one.submit(f"one-{number}", 5)
            two.submit(f"two-{number}", 5)
        await until(lambda: not one.router.pending and not two.router.pending)
        assert one.errors == two.errors == {}
        assert len(one.tokens) == len(two.tokens) == 10
        assert [(doorman.most, doorman.inside) for doorman in doormen.values()] == [(1, set())] * 2
        await two.keeper.close()


async def test_a_doorman_hears_of_every_end() -> None:
    doormen = {name: LearningDoorman(60.0, batch_tokens=64) for name in ("prefill-0", "decode-0")}
    async with cluster("prefill-0", "decode-0", doormen=doormen) as (one, instances):
        two = Ingress("ingress-2")
        await two.reach(*instances.values())
        for number in range(20):
            one.submit(f"r{number}", 100_000 if number % 2 else 5)
            two.submit(f"t{number}", 100_000)
        await until(lambda: one.tokens.get("r0") and len(two.tokens) == 20)
        for link in list(two.keeper.links.values()):
            link._socket.close(linger=0)
        link = one.keeper.links["prefill-0"]
        link._encode = lambda hop: [b"\xc1 no msgpack"]
        one.submit("unreadable", 5)
        one.router.abort([f"r{number}" for number in range(20)])
        two.router.abort([f"t{number}" for number in range(20)])
        await until(lambda: not one.router.pending and "unreadable" in one.errors)
        await until(lambda: not any(doorman.tokens for doorman in doormen.values()))
        await two.keeper.close()


async def test_an_instance_that_dies_is_noticed_and_its_requests_move() -> None:
    async with cluster("prefill-0", "decode-0", "decode-1") as (ingress, instances):
        ingress.submit("r", 300)
        await until(lambda: len(ingress.tokens.get("r", [])) > 3)
        await instances["decode-0"].stop()
        await until(lambda: not ingress.router.pending)
        assert ingress.tokens["r"] == expected_tokens(PROMPT, 300)
        assert ingress.left == ["decode-0"]


def post_until_lost(link: ZmqLink) -> None:
    """While the loop hears of nothing."""
    for _ in range(500):
        link._post([wire.ABORT, wire.pack(["r"])])
        time.sleep(0.01)


async def test_what_is_sent_to_an_instance_that_is_gone_is_an_error_at_once() -> None:
    async with cluster("prefill-0", "decode-0") as (ingress, instances):
        link = ingress.keeper.links["decode-0"]
        await instances["decode-0"].stop()
        with pytest.raises(InstanceLost):
            post_until_lost(link)
        await until(lambda: "decode-0" not in ingress.keeper.links)
        with pytest.raises(InstanceLost):
            await link.call("is_sleeping", [], 1.0)
        link.abort(["r"])
        link.release(["r"])
        link.hand_over(wire.HandOver("r"))
        link.go_on(wire.GoOn("r", [], {}))


async def test_a_dead_engine_is_told_to_every_ingress() -> None:
    async with cluster("prefill-0", "decode-0") as (ingress, instances):
        ingress.submit("r", 100_000)
        await until(lambda: len(ingress.tokens.get("r", [])) > 3)

        async def die() -> StepOutputs:
            raise EngineDied(detail="out of memory")

        SimEngine.outputs, working = lambda self: die() if self is dying else working(self), SimEngine.outputs
        dying = instances["decode-0"].engine
        try:
            await until(lambda: "r" in ingress.errors)
            assert isinstance(ingress.errors["r"], NoInstance)
            with pytest.raises(EngineDied, match="out of memory"):
                await instances["decode-0"].serving
        finally:
            SimEngine.outputs = working


async def test_an_ingress_of_another_version_is_refused() -> None:
    async with cluster("prefill-0", "decode-0") as (ingress, instances):
        link = ZmqLink(
            ingress.keeper._context,
            instances["prefill-0"].info,
            ingress._encode,
            ingress._on_outputs,
            lambda info, what: None,
        )
        try:
            with pytest.raises(IncompatiblePeer, match=r"vllm 0\.1"):
                await link.open("ingress-old", "vllm 0.1")
        finally:
            link.close()


async def test_a_message_that_can_not_be_read_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async with cluster("prefill-0", "decode-0") as (ingress, _):
        link = ingress.keeper.links["decode-0"]
        for frames in ([b"?", b"x"], [wire.ABORT], [wire.HELLO], [wire.ADD], [wire.CALL, b"\xc1"]):
            link._post(frames)
        ingress.submit("r", 5)
        await until(lambda: not ingress.router.pending)
        assert ingress.tokens["r"] == expected_tokens(PROMPT, 5)
        assert "can't be read" in caplog.text


async def test_a_request_that_can_not_be_read_ends_with_an_error() -> None:
    async with cluster("prefill-0", "decode-0") as (ingress, _):
        for link in ingress.keeper.links.values():
            link._encode = lambda hop: [b"\xc1 no msgpack"]
        ingress.submit("r", 5)
        await until(lambda: "r" in ingress.errors)
        assert isinstance(ingress.errors["r"], EngineFailure)
        assert ingress.router.pending == 0


async def test_outputs_that_can_not_be_read_cost_a_connection_and_not_the_instance() -> None:
    async with cluster("prefill-0", "decode-0") as (ingress, _):
        ingress.keeper.links["prefill-0"]._on_outputs = lambda info, frames: 1 / 0
        ingress.submit("r", 5)
        await until(lambda: "r" in ingress.errors)
        await until(lambda: len(ingress.keeper.links) == 2)
        ingress.submit("again", 5)
        await until(lambda: not ingress.router.pending)
        assert ingress.tokens["again"] == expected_tokens(PROMPT, 5)


async def test_a_client_that_leaves_as_the_link_closes_is_not_served_on() -> None:
    async with cluster("prefill-0", "decode-0", "decode-1") as (ingress, instances):
        ingress.submit("r", 100_000)
        await until(lambda: len(ingress.tokens.get("r", [])) > 3)
        ingress.keeper.links["decode-0"].close()
        ingress.router.abort(["r"])
        await until(lambda: not ingress.router.pending)
        await until(lambda: not instances["decode-1"].engine.load().running)
        assert "r" not in ingress.errors


async def test_a_call_of_a_method_the_engine_has_not_fails_with_its_words() -> None:
    async with cluster("prefill-0", "decode-0") as (ingress, _):
        with pytest.raises(RuntimeError, match="no method 'sing'"):
            await ingress.keeper.links["decode-0"].call("sing", [], 5.0)


async def test_a_draining_instance_keeps_its_requests_and_gets_no_more() -> None:
    async with cluster("prefill-0", "decode-0", "decode-1") as (ingress, instances):
        ingress.submit("r", 50)
        await until(lambda: ingress.tokens.get("r"))
        infos = [i.info for i in instances.values()]
        infos[1] = replace(infos[1], state=InstanceState.DRAINING)
        ingress.keeper.sync(Membership(version=2, instances=tuple(infos)))
        for number in range(5):
            ingress.submit(f"late-{number}", 3)
        await until(lambda: not ingress.router.pending)
        assert ingress.tokens["r"] == expected_tokens(PROMPT, 50)
        assert await instances["decode-0"].host.drained(1.0)


async def test_an_ingress_hears_when_another_ones_requests_have_ended() -> None:
    async with cluster("prefill-0", "decode-0") as (first, instances):
        second = Ingress("ingress-2")
        try:
            await second.reach(*instances.values())
            for ingress, name, count in ((first, "long", 300), (second, "short", 50)):
                ingress.submit(name, count)
            await until(lambda: "short" in second.tokens and not second.router.pending)
            assert second.keeper.links["decode-0"].load.running
            await until(lambda: not first.router.pending)
            await until(lambda: not any(link.load.running for link in second.keeper.links.values()))
            await until(lambda: not any(link.load.kv_usage for link in first.keeper.links.values()))
        finally:
            await second.keeper.close()
