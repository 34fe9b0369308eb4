"""EngineHost: one engine behind one ZeroMQ socket, for any number of ingresses that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from cluster import wire
from cluster.engine import Doorman, Engine, EngineDied, tell_doorman

logger = logging.getLogger(__name__)

# A peer that is gone without a word (host lost, process stopped) is noticed after this; a peer whose process
# died closes its connection at once.
HEARTBEAT_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 6_000
# How long what was said last may take to leave.
LAST_WORDS_MS = 200
# Output messages queued for one ingress before it counts as stuck and is dropped.
SEND_QUEUE = 100_000


def set_liveness(socket: zmq.asyncio.Socket) -> None:
    """Let a socket notice a silent peer."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


class EngineHost:
    """Moves requests and outputs between an engine and its ingresses."""

    def __init__(
        self,
        engine: Engine,
        *,
        engine_name: str,
        instance_id: str,
        incarnation: str,
        doorman: Doorman | None = None,
    ) -> None:
        """
        Args:
            doorman: whom it asks before it takes a request; without one it takes all.
        """
        self._engine = engine
        self._doorman = doorman
        self._engine_name = engine_name
        self._welcome = wire.Welcome(instance=instance_id, incarnation=incarnation)
        self._owner: dict[str, bytes] = {}
        self._ingresses: dict[bytes, str] = {}
        # Those that route by prefixes, and what there is to be found.
        self._want_blocks: set[bytes] = set()
        self._blocks: dict[int, None] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stepped = asyncio.Event()
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self.steps = 0

    @property
    def requests(self) -> int:
        """Requests in the engine."""
        return len(self._owner)

    @property
    def ingresses(self) -> list[str]:
        """Names of the ingresses that said hello."""
        return list(self._ingresses.values())

    async def bind(self, host: str) -> str:
        """Open the data path on a free port of `host`; returns its ZeroMQ endpoint."""
        socket = self._context.socket(zmq.ROUTER)
        set_liveness(socket)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
        socket.setsockopt(zmq.RCVHWM, 0)
        port = socket.bind_to_random_port(f"tcp://{host}")
        self._socket = socket
        return f"tcp://{host}:{port}"

    async def serve(self) -> None:
        """Run until cancelled. Raises EngineDied after telling every ingress."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive(), name="host-receive")
                group.create_task(self._forward(), name="host-forward")
                group.create_task(self._tell_blocks(), name="host-blocks")
        except* EngineDied as errors:
            died = errors.exceptions[0]
            for ingress in list(self._ingresses):
                await self._send(ingress, [wire.FATAL, wire.pack(str(died))])
            raise died from None
        finally:
            for call in self._calls:
                call.cancel()

    async def drained(self, deadline_s: float) -> bool:
        """Wait until no request is left and nobody reads what was kept of those that went on elsewhere; False
        when the deadline passed with a request here still."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
                while self._engine.load().kv_usage > 0:
                    self._stepped.clear()
                    await self._stepped.wait()
        return not self._owner

    async def close(self) -> None:
        """Close the data path. What was said last still goes out: that no memory is in use, for example."""
        if self._socket is not None:
            self._socket.close(linger=LAST_WORDS_MS)
        self._context.term()

    async def _receive(self) -> None:
        assert self._socket is not None
        while True:
            ingress, *frames = [f.buffer for f in await self._socket.recv_multipart(copy=False)]
            try:
                await self._handle(bytes(ingress), bytes(frames[0]), frames[1:])
            except (msgspec.DecodeError, LookupError, ValueError, TypeError) as error:
                logger.error("dropped a message that can't be read: %s", error)

    async def _handle(self, ingress: bytes, kind: bytes, frames: list[Any]) -> None:
        match kind:
            case wire.ADD:
                await self._add(ingress, msgspec.msgpack.decode(frames[0], type=wire.Offer), frames[1:])
            case wire.ABORT:
                request_ids = msgspec.msgpack.decode(frames[0], type=list[str])
                self._engine.abort(request_ids)
                self._forget(request_ids)
            case wire.RELEASE:
                self._engine.release(msgspec.msgpack.decode(frames[0], type=list[str]))
            case wire.HAND_OVER:
                self._engine.hand_over(msgspec.msgpack.decode(frames[0], type=wire.HandOver))
            case wire.GO_ON:
                self._engine.go_on(msgspec.msgpack.decode(frames[0], type=wire.GoOn))
            case wire.CALL:
                call = msgspec.msgpack.decode(frames[0], type=wire.Call)
                task = asyncio.create_task(self._call(ingress, call))
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)
            case wire.HELLO:
                await self._greet(ingress, msgspec.msgpack.decode(frames[0], type=wire.Hello))
            case wire.BYE:
                self._drop(ingress, "it said goodbye")
            case _:
                raise ValueError(f"unknown kind {kind!r}")

    async def _add(self, ingress: bytes, offer: wire.Offer, frames: list[Any]) -> None:
        request_id, doorman = offer.request_id, self._doorman
        if doorman is not None and (wait_s := doorman.asked(offer, self._now())) is not None:
            await self._send(ingress, [wire.BUSY, wire.pack(wire.Busy(request_id, wait_s))])
            return
        try:
            self._engine.add(frames)
        except Exception as error:  # whatever is wrong with it, its client must hear of it
            logger.exception("request %s can't be taken", request_id)
            self._forget([request_id])
            refusal = wire.Unreadable(request_id=request_id, why=f"{type(error).__name__}: {error}")
            await self._send(ingress, [wire.UNREADABLE, wire.pack(refusal)])
            return
        self._owner[request_id] = ingress
        self._idle.clear()

    async def _greet(self, ingress: bytes, hello: wire.Hello) -> None:
        ours = wire.Hello(wire.WIRE_VERSION, self._engine_name, hello.ingress, hello.wants_blocks)
        if hello != ours:
            reason = f"ingress {hello.ingress} speaks {hello}, this instance speaks {ours}"
            await self._send(ingress, [wire.REFUSED, wire.pack(reason)])
            return
        self._ingresses[ingress] = hello.ingress
        await self._send(ingress, [wire.WELCOME, wire.pack(self._welcome)])
        if hello.wants_blocks:
            # Enqueued before anything else has its turn, so every later change comes after it.
            self._want_blocks.add(ingress)
            await self._send(ingress, [wire.BLOCKS, wire.pack(wire.Blocks(stored=list(self._blocks)))])

    async def _call(self, ingress: bytes, call: wire.Call) -> None:
        try:
            result = wire.CallResult(
                call_id=call.call_id, error="", result=await self._engine.call(call.method, call.args)
            )
        except Exception as error:  # the edge: whatever the engine raises is the caller's answer
            result = wire.CallResult(call_id=call.call_id, error=f"{type(error).__name__}: {error}")
        await self._send(ingress, [wire.RESULT, wire.pack(result)])

    async def _forward(self) -> None:
        while True:
            step = await self._engine.outputs()
            self.steps += 1
            self._stepped.set()
            if self._doorman is not None:
                tell_doorman(self._doorman, step.outputs, self._now())
            load = wire.pack(self._engine.load())
            with_stats = True
            for ingress, members in self._by_ingress(step).items():
                frames = self._engine.part(step, members, with_stats=with_stats)
                with_stats = False
                await self._send(ingress, [wire.OUTPUTS, load, *frames])
            if not self._owner:
                self._idle.set()

    async def _tell_blocks(self) -> None:
        while True:
            changes = await self._engine.block_changes()
            if changes.cleared:
                self._blocks.clear()
            for name in changes.removed:
                self._blocks.pop(name, None)
            self._blocks.update(dict.fromkeys(changes.stored))
            packed = wire.pack(changes)
            for ingress in list(self._want_blocks):
                await self._send(ingress, [wire.BLOCKS, packed])

    def _by_ingress(self, step: Any) -> dict[bytes, list[Any]]:
        groups: dict[bytes, list[Any]] = {}
        unread: list[str] = []
        owner = self._owner
        for output in step.outputs:
            request_id = output.request_id
            ingress = owner.get(request_id)
            if ingress is None:
                # Aborted while this was under way: nobody is left to read the blocks it kept.
                if output.kv_transfer_params:
                    unread.append(request_id)
                continue
            if output.finish_reason is not None:
                del owner[request_id]
            groups.setdefault(ingress, []).append(output)
        if unread:
            self._engine.release(unread)
        if not groups and step.scheduler_stats is not None:
            # Statistics without tokens (transfers, cache usage back to zero): any one ingress counts them.
            groups = {ingress: [] for ingress in list(self._ingresses)[:1]}
        if not owner or not step.outputs:
            for ingress in self._ingresses:  # nothing may come for long to tell them of the load
                groups.setdefault(ingress, [])
        return groups

    async def _send(self, ingress: bytes, frames: list[Any]) -> None:
        assert self._socket is not None
        try:
            await self._socket.send_multipart([ingress, *frames], flags=zmq.DONTWAIT)
        except zmq.ZMQError as error:
            # EHOSTUNREACH: it is gone. EAGAIN: its queue is full, so it has not read for a long time.
            self._drop(ingress, str(error))

    def _drop(self, ingress: bytes, why: str) -> None:
        name = self._ingresses.pop(ingress, None)
        self._want_blocks.discard(ingress)
        orphans = [request_id for request_id, owner in self._owner.items() if owner == ingress]
        if orphans:
            self._engine.abort(orphans)
            self._forget(orphans)
        if name is not None:
            logger.info("ingress %s left (%s); aborted %d of its requests", name, why, len(orphans))

    def _forget(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._owner.pop(request_id, None)
        if self._doorman is not None:
            self._doorman.left(request_ids, self._now())
        if not self._owner:
            self._idle.set()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
