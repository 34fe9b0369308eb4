"""Worker: the heart of a worker actor, free of Ray. Starts an engine, opens its data path, drains, ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.engine import Doorman, Engine, EngineDied
from cluster.instance import EngineFacts, GroupRank, InstanceState, Role
from cluster.latency import LatencyModel
from cluster.placement import placements_of
from cluster.ports import free_ports
from cluster.spec import ClusterSpec

if TYPE_CHECKING:  # a worker on a GPU has none
    from cluster.sim_exchange import SocketExchange

TwinParts = Callable[[LatencyModel], Mapping[str, Any]]

logger = logging.getLogger(__name__)

# How a life ended that was asked to.
DRAINED = "drained"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a started worker registers with."""

    address: str
    node: str
    pid: int
    facts: EngineFacts


class Worker:
    """One life of one instance."""

    def __init__(
        self,
        spec: ClusterSpec,
        role: Role,
        *,
        instance_id: str,
        incarnation: str,
        host: str,
        cores: str,
        phase_options: dict[str, Any],
        on_phase: Callable[[str], object],
        twin_parts: TwinParts | None = None,
        doorman: Doorman | None = None,
    ) -> None:
        """
        Args:
            twin_parts: what a twin gets of its phase, given its latency model: arguments of `SimEngine`;
                vLLM has its part in `phase_options`.
            doorman: see `EngineHost`.
        """
        self._spec = spec
        self._role = role
        self._instance_id = instance_id
        self._incarnation = incarnation
        self._host = host
        self._cores = cores
        self._phase_options = phase_options
        self._on_phase = on_phase
        self._twin_parts = twin_parts
        self._doorman = doorman
        self._engine: Engine | None = None
        self._exchange: SocketExchange | None = None
        self._hosting: Any = None
        self._ended = asyncio.Event()
        self.state = InstanceState.STARTING

    def meeting(self) -> tuple[str, int]:
        """Host and port where the others of its data-parallel group will find it. Raises EnvironmentProblem
        without a free port."""
        (port,) = free_ports(self._host, 1)
        return self._host, port

    async def start(self, group: GroupRank | None = None) -> Ready:
        """Load the engine and open the data path.

        Args:
            group: which of a data-parallel group it is; all of them start at the same time.

        Raises:
            SpecError, EnvironmentProblem: the engine can't run as the spec says.
        """
        engine, name = await asyncio.to_thread(self._make_engine, group)
        self._engine = engine
        if self._exchange is not None:
            await self._exchange.start()
        facts = await engine.start(self._note)
        from cluster.host_zmq import EngineHost

        self._hosting = EngineHost(
            engine,
            engine_name=name,
            instance_id=self._instance_id,
            incarnation=self._incarnation,
            doorman=self._doorman,
        )
        address = await self._hosting.bind(self._host)
        self.state = InstanceState.READY
        node = socket.gethostname()
        if self._spec.engine == "sim" and self._spec.colocate:  # as far apart as their transfers take it
            node = next(
                f"node-{p.node}" for p in placements_of(self._spec) if p.instance_id == self._instance_id
            )
        return Ready(address=address, node=node, pid=os.getpid(), facts=facts)

    async def run(self) -> str:
        """Serve until drained or until the engine dies; returns how it ended."""
        serving = asyncio.create_task(self._hosting.serve())
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait([serving, ended], return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            return DRAINED
        except EngineDied as died:
            return str(died)
        finally:
            serving.cancel()
            ended.cancel()
            await self._stop()

    async def quiet(self, deadline_s: float) -> bool:
        """Let the running requests end; False when the deadline came first."""
        self.state = InstanceState.DRAINING
        return bool(await self._hosting.drained(deadline_s)) if self._hosting is not None else True

    async def drain(self, deadline_s: float) -> bool:
        """Let the running requests end, then stop; False when the deadline cut some off."""
        clean = await self.quiet(deadline_s)
        self._ended.set()
        return clean

    def _note(self, phase: str) -> None:
        self._on_phase(phase)
        logger.info("%s: %s", self._instance_id, phase)

    def _make_engine(self, group: GroupRank | None) -> tuple[Engine, str]:
        if self._spec.engine == "sim":
            return self._make_twin()
        from cluster.vllm_options import engine_options, require_device, set_engine_environment

        require_device(self._spec, self._instance_id)
        # Before vLLM is imported: it reads its environment once.
        side_port, news_port = free_ports(self._host, 2)
        set_engine_environment(
            self._spec,
            self._role,
            host=self._host,
            side_port=side_port,
            news_port=news_port,
            cores=self._cores,
            rank=group.rank if group else 0,
        )
        self._note("importing vLLM")
        from cluster import vllm_engine

        options = engine_options(self._spec, self._role, self._phase_options, group)
        in_thread = self._spec.engine_process == "thread"
        kind = vllm_engine.ThreadEngine if in_thread else vllm_engine.ProcessEngine
        return kind(options), vllm_engine.VLLM_ENGINE_NAME

    def _make_twin(self) -> tuple[Engine, str]:
        from cluster.sim_engine import SIM_ENGINE_NAME, SimEngine
        from cluster.sim_exchange import SocketExchange
        from cluster.sim_options import twin_options

        options = twin_options(self._spec, self._role, self._phase_options)
        exchange = SocketExchange.of(
            self._spec,
            self._role,
            host=self._host,
            instance_id=self._instance_id,
            incarnation=self._incarnation,
            kv_bytes_per_token=options.kv_bytes_per_token,
        )
        parts = self._twin_parts(options.latency) if self._twin_parts is not None else {}
        engine = SimEngine(options, self._spec.model, exchange=exchange, tells_blocks=True, **parts)
        exchange.source = engine
        self._exchange = exchange
        return engine, SIM_ENGINE_NAME

    async def _stop(self) -> None:
        self.state = InstanceState.GONE
        if self._hosting is not None:
            await self._hosting.close()
        if self._engine is not None:
            with contextlib.suppress(EngineDied):
                await self._engine.stop()
        if self._exchange is not None:
            await self._exchange.close()
