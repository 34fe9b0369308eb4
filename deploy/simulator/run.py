"""The simulator: the live router, state machine, policies and controller on virtual time, over twins.

Nothing here decides anything. It starts what `pdserve up` starts, with twins for engines and links that take
the time the network model says, sends a workload, does what the scenario says, and writes down what happened.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random

from prometheus_client import CollectorRegistry

from cluster.errors import ServingError, SpecError
from cluster.instance import InstanceState
from cluster.metrics import IngressMetrics
from cluster.request import ServeRequest
from cluster.spec import ClusterSpec
from cluster.wire import TokenOutput
from deploy.controller import Controller
from deploy.simulator.instances import SimInstances
from deploy.simulator.journal import Journal
from deploy.simulator.result import SimulationResult
from deploy.simulator.scenario import QUIET, Cut, Kill, Scenario, Slow
from deploy.slo_classes import SloClass
from deploy.virtual_time import VirtualTimeLoop, run_virtual
from deploy.workload import WorkloadRequest, fast_prompt_tokens
from router.policies import PREFIX_AWARE, make_policy
from router.policy import Policy
from router.predictor import Predictor
from router.router import Router

# The controller answers a watcher at the latest after this, as it does an ingress.
WATCH_S = 60.0


class SimulationLeak(ServingError):
    """All requests have ended and something is still held. Facts: `held`."""

    reason = "simulation-leak"

    held: str

    def describe(self) -> str:
        return f"all requests have ended, and still held are: {self.held}"


class Simulation:
    """One run of a cluster under a workload."""

    def __init__(
        self,
        spec: ClusterSpec,
        requests: Sequence[WorkloadRequest],
        classes: Sequence[SloClass] | None = None,
        *,
        scenario: Scenario = QUIET,
        seed: int = 0,
        with_spans: bool = False,
        on_progress: Callable[[float, int], None] | None = None,
        policy: Policy | None = None,
        wrap: Callable[[Policy], Policy] = lambda policy: policy,
    ) -> None:
        """
        Args:
            requests: sorted by arrival.
            classes: the SLO class of each request; None for no bounds.
            with_spans: whether to keep every iteration, for pictures.
            on_progress: told the virtual time and the requests that have ended, now and then.
            policy: instead of the spec's; it is asked about request `r<index>`.
            wrap: what is to be done to the policy, for those who look into its decisions.

        Raises:
            SpecError: the spec can't be simulated.
            ValueError: no requests.
        """
        if not requests:
            raise ValueError("no requests to simulate")
        # Whatever engine it names: here twins stand in for it.
        self._spec = spec.model_copy(update={"engine": "sim"})
        self._requests = requests
        self._scenario = scenario
        self._seed = seed
        self._journal = Journal(requests, classes, with_spans=with_spans, on_progress=on_progress)
        self._instances = SimInstances(self._spec, scenario, self._journal, self._deliver)
        predictor = Predictor(self._instances.latency, load_s=spec.sim.adapter_load_s)
        self._router = Router(
            wrap(policy or make_policy(spec.policy, predictor)),
            spec.deadlines,
            self._journal,
            IngressMetrics(CollectorRegistry()),
            predictor,
            by_deadline=spec.prefill_order == "deadline",
            with_prefixes=spec.policy in PREFIX_AWARE and _have_common_beginnings(requests, scenario),
            tenant_weights=spec.slo.tenant_weights,
            promised_tpot_s=spec.slo.tightest_tpot_s,
            keeps_sessions=spec.keep_sessions,
            rebalance=spec.rebalance,
        )
        self._instances.router = self._router
        self._journal.on_end = lambda name: self._instances.block_hashes.pop(name, None)
        self._journal.tokens_recomputed = self._router.metrics.kv_tokens_recomputed

    @property
    def router(self) -> Router:
        """The router that decides, for those who want to know how."""
        return self._router

    def run(self) -> SimulationResult:
        """Run to the end of the last request.

        Raises:
            SimulationDeadlock, SimulationLivelock: the live code hangs, or spins.
            SimulationLeak: it ended and holds something still.
        """
        began_s = time.perf_counter()
        with _quiet_logs(), _rare_collections():
            duration_s, loop = run_virtual(self._main())
        return self._journal.result(
            name=self._spec.name,
            seed=self._seed,
            duration_s=duration_s,
            instances=self._instances,
            events=loop.events,
            wall_s=time.perf_counter() - began_s,
        )

    async def _main(self) -> float:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        controller = Controller(self._spec, self._instances)
        await controller.start()
        watching = asyncio.create_task(self._watch(controller), name="watch-membership")
        await self._journal.ready.wait()
        start_s = self._journal.begin(loop.time())
        helpers = [
            asyncio.create_task(self._send(start_s), name="clients"),
            *(
                asyncio.create_task(self._happen(fault, start_s), name=f"fault-{number}")
                for number, fault in enumerate(self._scenario.faults)
            ),
        ]
        await self._journal.all_ended.wait()
        duration_s = loop.time() - start_s
        await asyncio.sleep(0)  # what ended now gives back what it held
        self._require_nothing_held()
        for task in (*helpers, watching):
            task.cancel()
        await asyncio.gather(*helpers, watching, return_exceptions=True)
        await controller.stop(0.0)
        return duration_s

    async def _watch(self, controller: Controller) -> None:
        """What an ingress does with the membership."""
        version = -1
        places = len(self._spec.places())
        while True:
            membership = await controller.watch(version, WATCH_S)
            version = membership.version
            for info in membership.instances:
                life = self._instances.lives.get(info.instance_id)
                if info.state is InstanceState.READY and life is not None:
                    if info.instance_id not in self._router.fleet:
                        self._router.join(info, life)
                elif hopeless := info.hopeless:
                    raise SpecError(file="(spec)", path=info.instance_id, value=hopeless, allowed=info.detail)
            if self._router.fleet.size == places:
                self._journal.ready.set()

    async def _send(self, start_s: float) -> None:
        """Send every request when it is due, and let some clients leave."""
        loop = asyncio.get_running_loop()
        rng = Random(f"{self._seed}/cancel")
        scenario = self._scenario
        leaving = set(
            rng.sample(range(len(self._requests)), round(scenario.cancel_share * len(self._requests)))
        )
        for index, request in enumerate(self._requests):
            due_s = start_s + request.arrival_s
            if due_s > loop.time():
                await _sleep_until(loop, due_s)
            name = f"r{index}"
            slo_class = self._journal.class_of(index)
            self._journal.arrived(name, index, loop.time())
            if index in leaving:
                loop.call_later(rng.uniform(0, scenario.cancel_within_s), self._leave, name)
            try:
                self._router.submit(
                    ServeRequest(
                        request_id=name,
                        prompt_token_ids=fast_prompt_tokens(request, index),
                        max_tokens=request.output_tokens,
                        slo=slo_class.slo,
                        slo_class=slo_class.name,
                        fills_slack=slo_class.fills_slack,
                        plain_prompt=not request.adapter,
                        adapter=request.adapter,
                        session_id=request.session_id or "",
                    )
                )
            except ServingError as error:
                self._journal.fail(name, error)
                self._journal.forget(name)

    def _leave(self, name: str) -> None:
        if self._journal.leave(name):
            self._router.abort([name])

    async def _happen(self, fault: Kill | Slow | Cut, start_s: float) -> None:
        loop = asyncio.get_running_loop()
        await _sleep_until(loop, start_s + fault.at_s)
        note = self._journal.note
        if isinstance(fault, Kill):
            killed = await self._instances.kill(fault.kill)
            note(loop.time(), f"killed {fault.kill}" if killed else f"{fault.kill} was dead already")
        elif isinstance(fault, Slow):
            self._set_slowdown(fault.slow, fault.factor)
            note(loop.time(), f"{fault.slow} takes {fault.factor:g} times as long")
            if fault.for_s is not None:
                await asyncio.sleep(fault.for_s)
                self._set_slowdown(fault.slow, 1.0)
                note(loop.time(), f"{fault.slow} is as fast as before")
        else:
            source, target = fault.cut
            self._instances.network.cut(source, target)
            note(loop.time(), f"cut the link from {source} to {target}")
            if fault.for_s is not None:
                await asyncio.sleep(fault.for_s)
                self._instances.network.restore(source, target)
                note(loop.time(), f"the link from {source} to {target} works again")

    def _set_slowdown(self, instance_id: str, factor: float) -> None:
        if (life := self._instances.lives.get(instance_id)) is not None:
            life.engine.set_slowdown(factor)

    def _deliver(self, instance_id: str, outputs: list[TokenOutput]) -> None:
        now_s = asyncio.get_running_loop().time()
        for output in self._router.on_outputs(instance_id, outputs):  # type: ignore[arg-type]
            self._journal.tokens(output.request_id, len(output.new_token_ids), now_s, output.finish_reason)

    def _require_nothing_held(self) -> None:
        busy = [name for name, life in self._instances.lives.items() if not life.engine.idle]
        held = {
            "requests in engines or blocks": busy,
            "reservations": dict(self._router.reservations.outstanding()),
            "hops": self._router.open_hops,
            "runs": self._router.pending,
        }
        if any(held.values()):
            raise SimulationLeak(held=", ".join(f"{what}: {which}" for what, which in held.items() if which))


async def _sleep_until(loop: asyncio.AbstractEventLoop, when_s: float) -> None:
    """As `asyncio.sleep`, to the bit: a sum of durations is not always the time it was the difference to."""
    reached = loop.create_future()
    timer = loop.call_at(when_s, reached.set_result, None)
    try:
        await reached
    finally:
        timer.cancel()


def _have_common_beginnings(requests: Sequence[WorkloadRequest], scenario: Scenario) -> bool:
    """Whether some prompt may be found in a cache: where none begins like another and nothing fails, so that
    none is computed again, the index of all that is cached would only take time."""
    return scenario != QUIET or any(request.hash_ids or request.session_id for request in requests)


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Faults that the scenario asks for are no news; the result tells of them."""
    loggers = [logging.getLogger(name) for name in ("router", "deploy.controller", "cluster")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Collect garbage rarely: requests under way are many, and next to nothing of theirs is cyclic."""
    thresholds = gc.get_threshold()
    gc.set_threshold(200_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
