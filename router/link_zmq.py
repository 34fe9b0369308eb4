"""ZmqLink: an ingress' way to one instance, and LinkKeeper, which keeps the ways to all of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from cluster import wire
from cluster.errors import IncompatiblePeer, InstanceLost
from cluster.host_zmq import set_liveness
from cluster.instance import InstanceInfo, InstanceLoad, InstanceState
from cluster.registry import Membership
from router.hop import Hop
from router.router import Router

logger = logging.getLogger(__name__)

HELLO_DEADLINE_S = 5.0
# Pauses between attempts to reach an instance that the controller says is READY.
RECONNECT_S = (0.2, 0.5, 1.0, 2.0, 5.0)

Encode = Callable[[Hop], Sequence[Any]]
OnOutputs = Callable[[InstanceInfo, Sequence[Any]], None]
OnNotTaken = Callable[[InstanceInfo, wire.Unreadable | wire.Busy], None]
OnBlocks = Callable[[str, wire.Blocks], None]


class ZmqLink:
    """One connection to one life of one instance."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        info: InstanceInfo,
        encode: Encode,
        on_outputs: OnOutputs,
        on_not_taken: OnNotTaken,
        on_blocks: OnBlocks | None = None,
    ) -> None:
        """
        Args:
            on_not_taken: told of requests that the instance could not read, or was too busy for.
            on_blocks: told how the instance's prefix cache changes, all that is in it first.
        """
        self.info = info
        self._encode = encode
        self._on_outputs = on_outputs
        self._on_not_taken = on_not_taken
        self._on_blocks = on_blocks
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._last_call = 0
        self.load = InstanceLoad()
        self._socket = context.socket(zmq.DEALER)
        set_liveness(self._socket)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # One life, one connection: a reconnect by ZeroMQ itself would hide that requests were lost.
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED
        )

    async def open(self, ingress: str, engine: str) -> None:
        """Connect and say hello.

        Raises:
            IncompatiblePeer: the instance speaks another version.
            InstanceLost: it does not answer, or it is another life than expected.
        """
        self._socket.connect(self.info.address)
        hello = wire.Hello(wire.WIRE_VERSION, engine, ingress, wants_blocks=self._on_blocks is not None)
        try:
            async with asyncio.timeout(HELLO_DEADLINE_S):
                await self._socket.send_multipart([wire.HELLO, wire.pack(hello)])
                kind, body = await self._socket.recv_multipart()
        except (TimeoutError, ValueError):
            raise InstanceLost(instance=self.info.instance_id, stage="hello") from None
        if kind == wire.REFUSED:
            raise IncompatiblePeer(
                ours=hello, theirs=msgspec.msgpack.decode(body), instance=self.info.instance_id
            )
        welcome = msgspec.msgpack.decode(body, type=wire.Welcome)
        if welcome.incarnation != self.info.incarnation:
            raise InstanceLost(instance=self.info.instance_id, stage="hello")

    async def run(self) -> str:
        """Move outputs until the connection is lost; returns why."""
        lost = asyncio.ensure_future(self._disconnected())
        receiving = asyncio.ensure_future(self._receive())
        try:
            await asyncio.wait([lost, receiving], return_when=asyncio.FIRST_COMPLETED)
            return receiving.result() if receiving.done() else lost.result()
        finally:
            for task in (lost, receiving):
                task.cancel()
            for call in self._calls.values():
                if not call.done():
                    call.set_exception(InstanceLost(instance=self.info.instance_id, stage="call"))

    def send(self, hop: Hop) -> None:
        offer = hop.offer(asyncio.get_running_loop().time())
        self._post([wire.ADD, wire.pack(offer), *self._encode(hop)])

    def abort(self, request_ids: list[str]) -> None:
        self._tell(wire.ABORT, request_ids)

    def release(self, request_ids: list[str]) -> None:
        self._tell(wire.RELEASE, request_ids)

    def hand_over(self, message: wire.HandOver) -> None:
        self._tell(wire.HAND_OVER, message)

    def go_on(self, message: wire.GoOn) -> None:
        self._tell(wire.GO_ON, message)

    async def call(self, method: str, args: list[Any], deadline_s: float) -> Any:
        """Call an engine method that is no request. Raises InstanceLost, TimeoutError, RuntimeError."""
        self._last_call += 1
        call_id = self._last_call
        answer = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._post([wire.CALL, wire.pack(wire.Call(call_id=call_id, method=method, args=args))])
            async with asyncio.timeout(deadline_s):
                return await answer
        finally:
            del self._calls[call_id]

    def close(self) -> None:
        """Leave: the instance aborts what it has of this ingress."""
        if not self._socket.closed:
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send_multipart([wire.BYE], flags=zmq.DONTWAIT)
            self._socket.disable_monitor()
            self._socket.close(linger=200)

    def _tell(self, kind: bytes, header: Any) -> None:
        # An instance that is gone has nothing to do for it.
        with contextlib.suppress(InstanceLost):
            self._post([kind, wire.pack(header)])

    def _post(self, frames: list[Any]) -> None:
        if not self._socket.closed:
            # The queue is unbounded: this never waits, and only a peer that is gone can't be sent to.
            sent: Any = self._socket.send_multipart(frames, flags=zmq.DONTWAIT)
            if not sent.done() or sent.exception() is None:
                return
        raise InstanceLost(instance=self.info.instance_id, stage="send")

    async def _receive(self) -> str:
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            kind = bytes(frames[0].buffer)
            if kind == wire.OUTPUTS:
                load = msgspec.msgpack.decode(frames[1].buffer, type=wire.Load)
                self.load = InstanceLoad(running=load.running, waiting=load.waiting, kv_usage=load.kv_usage)
                self._on_outputs(self.info, [frame.buffer for frame in frames[2:]])
            elif kind == wire.BLOCKS and self._on_blocks is not None:
                changes = msgspec.msgpack.decode(frames[1].buffer, type=wire.Blocks)
                self._on_blocks(self.info.instance_id, changes)
            elif kind == wire.UNREADABLE:
                self._on_not_taken(self.info, msgspec.msgpack.decode(frames[1].buffer, type=wire.Unreadable))
            elif kind == wire.BUSY:
                self._on_not_taken(self.info, msgspec.msgpack.decode(frames[1].buffer, type=wire.Busy))
            elif kind == wire.RESULT:
                self._answer(msgspec.msgpack.decode(frames[1].buffer, type=wire.CallResult))
            elif kind == wire.FATAL:
                return str(msgspec.msgpack.decode(frames[1].buffer))

    def _answer(self, result: wire.CallResult) -> None:
        call = self._calls.get(result.call_id)
        if call is None or call.done():
            return
        if result.error:
            call.set_exception(RuntimeError(f"{self.info.instance_id}: {result.error}"))
        else:
            call.set_result(result.result)

    async def _disconnected(self) -> str:
        while True:
            event = await recv_monitor_message(self._monitor)
            if event["event"] in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED, zmq.EVENT_CONNECT_RETRIED):
                return "its connection closed"


class LinkKeeper:
    """Holds a link to every READY instance of the membership, and tells the router who is reachable."""

    def __init__(
        self,
        router: Router,
        *,
        ingress: str,
        engine: str,
        encode: Encode,
        on_outputs: OnOutputs,
        on_left: Callable[[InstanceInfo], None],
    ) -> None:
        """
        Args:
            on_left: told of an instance that was reached and is no more.
        """
        self._router = router
        self._ingress = ingress
        self._engine = engine
        self._encode = encode
        self._on_outputs = on_outputs
        self._on_left = on_left
        self._context = zmq.asyncio.Context()
        self._keeping: dict[str, tuple[InstanceInfo, asyncio.Task[None]]] = {}
        self.links: dict[str, ZmqLink] = {}
        self.membership = Membership(version=-1, instances=())

    def sync(self, membership: Membership) -> None:
        """Take over a newer membership."""
        self.membership = membership
        for info in membership.instances:
            kept = self._keeping.get(info.instance_id)
            reachable = info.state in (InstanceState.READY, InstanceState.DRAINING)
            if kept is not None and (not reachable or kept[0].incarnation != info.incarnation):
                self._drop(info.instance_id, why=info.detail or f"it is {info.state.value}")
                kept = None
            if kept is None and info.state is InstanceState.READY:
                task = asyncio.create_task(self._keep(info), name=f"link-{info.instance_id}")
                self._keeping[info.instance_id] = info, task
            elif kept is not None:
                self._router.update(info)

    async def close(self) -> None:
        """Leave every instance."""
        for instance_id in list(self._keeping):
            self._drop(instance_id, why="the ingress is closing")
        await asyncio.sleep(0)
        self._context.destroy(linger=200)

    def _drop(self, instance_id: str, *, why: str) -> None:
        self._keeping.pop(instance_id)[1].cancel()
        self._router.leave(instance_id, why=why)

    def _not_taken(self, info: InstanceInfo, what: wire.Unreadable | wire.Busy) -> None:
        if isinstance(what, wire.Busy):
            self._router.refused(what.request_id, info.instance_id, what.wait_s)
        else:
            self._router.fail_hop(what.request_id, info.instance_id, what.why)

    async def _keep(self, info: InstanceInfo) -> None:
        failures = 0
        while True:
            link = ZmqLink(
                self._context,
                info,
                self._encode,
                self._on_outputs,
                self._not_taken,
                self._router.fleet.blocks_changed if self._router.wants_blocks else None,
            )
            why = "it was left"
            try:
                await link.open(self._ingress, self._engine)
                self.links[info.instance_id] = link
                self._router.join(info, link)
                logger.info("reached %s at %s", info.instance_id, info.address)
                failures = 0
                why = await link.run()
            except InstanceLost as error:
                why = str(error)
            except IncompatiblePeer as error:
                logger.error("%s", error)
                return
            except (
                Exception
            ) as error:  # a message this side can't read: the requests there are lost all the same
                logger.exception("the link to %s broke", info.instance_id)
                why = repr(error)
            finally:
                if self.links.pop(info.instance_id, None) is not None:
                    self._on_left(info)
                link.close()
                self._router.leave(info.instance_id, why=why)
            await asyncio.sleep(RECONNECT_S[min(failures, len(RECONNECT_S) - 1)])
            failures += 1
