"""Instances of a simulation: twins, their hosts and the links to them, started by the live controller."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.engine import tell_doorman
from cluster.instance import GroupRank, InstanceInfo, InstanceLoad, Role
from cluster.latency import Batch, LatencyProfile, Levels, ProfiledLatency, level_at
from cluster.sim_engine import Counters, KvExchange, SimEngine, Watcher
from cluster.sim_group import SimGroup
from cluster.sim_options import TwinOptions, twin_options
from cluster.spec import ClusterSpec
from cluster.wire import DUE_PARAM, KEEP_PARAM, Blocks, GoOn, HandOver, Offer, TokenOutput, TokenRequest
from cluster.worker import Ready
from decode_worker.phase import phase_options as decode_options
from decode_worker.phase import twin_parts as decode_parts
from deploy.simulator.network import SimNetwork
from deploy.simulator.scenario import Scenario
from prefill_worker.phase import doorman_of
from prefill_worker.phase import phase_options as prefill_options
from prefill_worker.phase import twin_parts as prefill_parts
from router.hop import Hop, HopKind
from router.router import Router

# How long a running request may go without news: far below any deadline, far above an iteration.
QUIET_S = 5.0


_PARTS = {Role.PREFILL: prefill_parts, Role.DECODE: decode_parts}


class HopWatcher(Protocol):
    """Told what happens to hops; ids are those of hops."""

    def sent(self, hop: Hop, now_s: float) -> None: ...
    def refused(self, hop_id: str) -> None: ...
    def begun(self, request_id: str, now_s: float) -> None: ...
    def reading(self, request_id: str, now_s: float) -> None: ...
    def read(self, request_id: str, now_s: float) -> None: ...
    def iterated(self, instance_id: str, start_s: float, end_s: float, steps: int, batch: Batch) -> None: ...


@dataclass(slots=True)
class Record:
    """What one place did, over all its lives."""

    instance_id: str
    role: Role
    options: TwinOptions
    lives: list[Counters]
    present_s: float = 0.0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    adapter_loads: int = 0


class _EngineWatcher:
    """Adds the instance's name."""

    __slots__ = ("_instance_id", "_watcher", "begun", "read", "reading")

    def __init__(self, watcher: HopWatcher, instance_id: str) -> None:
        self._watcher = watcher
        self._instance_id = instance_id
        self.begun: Callable[[str, float], None] = watcher.begun
        self.reading: Callable[[str, float], None] = watcher.reading
        self.read: Callable[[str, float], None] = watcher.read

    def iterated(self, start_s: float, end_s: float, steps: int, batch: Batch) -> None:
        self._watcher.iterated(self._instance_id, start_s, end_s, steps, batch)


class SimLife:
    """One life of one instance: the controller's `WorkerHandle`, and the router's `Link` to it."""

    def __init__(self, cluster: SimInstances, info: InstanceInfo, incarnation: str) -> None:
        self._cluster = cluster
        self._instance_id = info.instance_id
        self._incarnation = incarnation
        self.record = cluster.records[info.instance_id]
        options = self.record.options
        exchange: KvExchange = cluster.network.exchange(
            info.instance_id, incarnation, options.kv_bytes_per_token
        )
        watcher: Watcher = _EngineWatcher(cluster.watcher, info.instance_id)
        self.engine = SimEngine(
            options,
            cluster.spec.model,
            exchange=exchange,
            watcher=watcher,
            on_busy=cluster.on_busy(info),
            quiet_s=QUIET_S,
            tells_blocks=cluster.router.wants_blocks,
            group=cluster.groups.get(info.instance_id),
            **_PARTS[info.role](cluster.spec, options.latency),
        )
        self._doorman = doorman_of(cluster.spec) if info.role is Role.PREFILL else None
        self.load = InstanceLoad()
        profile = _profile(options)
        hop_s = cluster.spec.sim.hop_s
        self._delay_s = {
            HopKind.PREFILL: profile.frontend_s if profile else hop_s,
            HopKind.WHOLE: profile.frontend_s if profile else hop_s,
            HopKind.DECODE: profile.handoff_s if profile else hop_s,
        }
        self._beside_s = profile.handoff_beside_s if profile else 0.0
        self._each_s = profile.handoff_each_s if profile else 0.0
        # Of a network that the spec gives, the links take their time for the bytes.
        network = cluster.spec.sim.network
        is_known = network.nic_gbps or network.nvlink_gbps or cluster.spec.sim.hardware
        self._token_delay_s = profile.handoff_token_s if profile and not is_known else 0.0
        self._on_the_way: dict[str, asyncio.TimerHandle] = {}
        self._following: dict[str, Hop] = {}
        self._ready_s = 0.0
        self._serving: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._dead = False
        self._why = "killed"

    # --- the controller's side

    async def meeting(self) -> tuple[str, int]:
        return "virtual", 0

    async def start(self, group: GroupRank | None) -> Ready:
        await asyncio.sleep(self._cluster.start_s(self._instance_id))
        self._ready_s = asyncio.get_running_loop().time()
        self._cluster.network.join(self._instance_id, self._incarnation, self.engine)
        self.record.lives.append(self.engine.counters)
        self._serving = asyncio.create_task(self._serve(), name=f"serve-{self._instance_id}")
        self._cluster.lives[self._instance_id] = self
        if (together := self._cluster.groups.get(self._instance_id)) is not None:
            together.join(self.engine)
        node = self._cluster.network.node_of(self._instance_id)
        return Ready(address="virtual", node=node, pid=0, facts=self.engine.facts())

    async def ended(self) -> str:
        await self._ended.wait()
        return self._why

    async def quiet(self, deadline_s: float) -> bool:
        return self.engine.idle

    async def drain(self, deadline_s: float) -> bool:
        self._why = "drained"
        self._ended.set()
        return self.engine.idle

    async def kill(self) -> None:
        if self._instance_id in self._cluster.groups and not self._dead:
            self._cluster.router.leave(self._instance_id, why="another of its group is gone")
        await self.die()

    async def die(self) -> None:
        """The process is gone, and with it all it held; whoever is connected hears of it later."""
        if self._serving is None or self._dead:
            return
        self._dead = True
        self._serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._serving
        now_s = asyncio.get_running_loop().time()
        self.record.present_s += now_s - self._ready_s
        self.record.preemptions += self.engine.preemptions
        self.record.prefix_hit_tokens += self.engine.prefix_hit_tokens
        self.record.adapter_loads += self.engine.adapter_loads
        self._cluster.lives.pop(self._instance_id, None)
        self._cluster.network.leave(self._instance_id)
        for timer in self._on_the_way.values():
            timer.cancel()
        await self.engine.stop()

    def noticed(self) -> None:
        """Its death is known."""
        self._ended.set()

    # --- the router's side

    # A dead process hears nothing; whoever speaks to it learns that later.

    def send(self, hop: Hop) -> None:
        if hop.follows:
            # What moves before its prompt is computed is in the model of the links: it comes when it goes on.
            self._following[hop.hop_id] = hop
            return
        now_s = asyncio.get_running_loop().time()
        self._cluster.watcher.sent(hop, now_s)
        delay_s = self._delay_s[hop.kind]
        if hop.kind is HopKind.DECODE:
            if self._beside_s and self._cluster.both_busy():
                delay_s = max(delay_s, self._beside_s)
            if self._each_s:
                delay_s += self._cluster.in_turn(self._each_s)
        if self._token_delay_s and hop.kind is HopKind.DECODE:
            delay_s += self._token_delay_s * len(hop.prompt_token_ids)
        if delay_s:
            self._on_the_way[hop.hop_id] = asyncio.get_running_loop().call_later(
                delay_s, self._receive, hop.offer(now_s + delay_s), _request(hop, now_s + delay_s)
            )
        else:
            self._receive(hop.offer(now_s), _request(hop, now_s))

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if (timer := self._on_the_way.pop(request_id, None)) is not None:
                timer.cancel()
            self._following.pop(request_id, None)
        if not self._dead:
            self.engine.abort(request_ids)
            self._forget(request_ids)

    def release(self, request_ids: list[str]) -> None:
        if not self._dead:
            self.engine.release(request_ids)

    def hand_over(self, message: HandOver) -> None:
        if not self._dead:
            self.engine.hand_over(message)

    def go_on(self, message: GoOn) -> None:
        if (hop := self._following.pop(message.request_id, None)) is not None:
            self.send(hop)

    def _receive(self, offer: Offer, request: TokenRequest) -> None:
        hop_id = offer.request_id
        self._on_the_way.pop(hop_id, None)
        if self._dead:
            return
        if self._doorman is not None:
            wait_s = self._doorman.asked(offer, asyncio.get_running_loop().time())
            if wait_s is not None:
                # A hop's time is that of both ways, so the answer is there.
                self._cluster.watcher.refused(hop_id)
                self._cluster.router.refused(hop_id, self._instance_id, wait_s)
                return
        known = self._cluster.block_hashes
        name = hop_id.rsplit("~", 1)[0]
        try:
            known[name] = self.engine.submit(request, known.get(name))
        except ValueError as error:
            self._forget([hop_id])
            self._cluster.router.fail_hop(hop_id, self._instance_id, str(error))

    def _forget(self, request_ids: list[str]) -> None:
        if self._doorman is not None:
            self._doorman.left(request_ids, asyncio.get_running_loop().time())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        delay_s = self._cluster.scenario.state_delay_s
        while True:
            step = await self.engine.outputs()
            if self._doorman is not None:
                tell_doorman(self._doorman, step.outputs, loop.time())
            load = self.engine.load()
            seen = InstanceLoad(running=load.running, waiting=load.waiting, kv_usage=load.kv_usage)
            changes = self.engine.take_block_changes()
            if delay_s:
                loop.call_later(delay_s, self._tell, seen, changes)
            else:
                self._tell(seen, changes)
            self._cluster.deliver(self._instance_id, step.outputs)

    def _tell(self, load: InstanceLoad, changes: Blocks | None) -> None:
        """What the router gets to know of it beside its outputs."""
        self.load = load
        if changes is not None and not self._dead:
            self._cluster.router.fleet.blocks_changed(self._instance_id, changes)


def _profile(options: TwinOptions) -> LatencyProfile | None:
    """What was measured of such an instance, where its times are measured ones."""
    return options.latency.profile if isinstance(options.latency, ProfiledLatency) else None


def _contention(record: Record) -> Levels:
    """How many times as long an iteration takes there while another instance computes, by the requests that
    decode in it; empty for as long."""
    profile = _profile(record.options)
    if profile is None or not (profile.prefill_contention > 1 or profile.decode_contention):
        return ()
    decode = profile.decode_contention
    # Prompts have a factor of their own: it is not between none and one decode.
    one = level_at(decode, 1) if decode else 1.0
    return ((0, profile.prefill_contention), (1, one), *(level for level in decode if level[0] > 1))


def _shares(record: Record) -> bool:
    """Whether it matters there what other instances do."""
    profile = _profile(record.options)
    return bool(_contention(record) or (profile is not None and profile.handoff_beside_s))


def _request(hop: Hop, now_s: float) -> TokenRequest:
    extra: dict[str, Any] = {}
    if (kv_params := hop.kv_params) is not None:
        extra = {"kv_transfer_params": kv_params}
    if hop.deadline_s < math.inf:
        extra[DUE_PARAM] = hop.deadline_s - now_s
    if hop.keep_s:
        extra[KEEP_PARAM] = hop.keep_s
    return TokenRequest(
        request_id=hop.hop_id,
        prompt_token_ids=hop.prompt_token_ids,
        sampling_params={"max_tokens": hop.max_tokens, "extra_args": extra},
        lora_request=[hop.request.adapter] if hop.request.adapter else None,
    )


class SimInstances:
    """The controller's launcher, and everything alive.

    Attributes:
        lives: READY lives by instance id.
        block_hashes: of the prompts under way by request id, so that no engine hashes what another has.
        records: what each place did.
        groups: of those that compute together, by instance id.
        latency: of the instances of each role.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        scenario: Scenario,
        watcher: HopWatcher,
        deliver: Callable[[str, list[TokenOutput]], None],
    ) -> None:
        self.spec = spec
        self.scenario = scenario
        self.watcher = watcher
        self.deliver = deliver
        self.router: Router
        self.network = SimNetwork(spec)
        self.lives: dict[str, SimLife] = {}
        self.block_hashes: dict[str, list[int]] = {}
        self._front_free_s = 0.0
        # Instances that compute.
        self._busy: dict[Role, set[str]] = {role: set() for role in Role}
        of_role = {
            Role.PREFILL: twin_options(spec, Role.PREFILL, prefill_options(spec)),
            Role.DECODE: twin_options(spec, Role.DECODE, decode_options(spec)),
        }
        self.latency = {role: options.latency for role, options in of_role.items()}
        self.records = {
            instance_id: Record(instance_id, role, of_role[role], []) for instance_id, role in spec.places()
        }
        self.groups: dict[str, SimGroup] = {}
        for ids in spec.groups():
            if len(ids) > 1:
                together = SimGroup(self.records[ids[0]].options.latency, len(ids))
                self.groups |= dict.fromkeys(ids, together)

    def on_busy(self, info: InstanceInfo) -> Callable[[bool], None] | None:
        """What an engine shall tell: where instances share cores, one slows the other."""
        if not any(map(_shares, self.records.values())):
            return None
        busy = self._busy[info.role]

        def told(is_busy: bool) -> None:
            (busy.add if is_busy else busy.discard)(info.instance_id)
            computing = [*self._busy[Role.PREFILL], *self._busy[Role.DECODE]]
            for instance_id, life in self.lives.items():
                others = len(computing) - (instance_id in computing)
                life.engine.set_contention(_contention(life.record) if others else ())

        return told

    def in_turn(self, seconds: float) -> float:
        """How long the front end is busy with others' hand-overs; then with this one for so many seconds."""
        now_s = asyncio.get_running_loop().time()
        begin_s = max(now_s, self._front_free_s)
        self._front_free_s = begin_s + seconds
        return begin_s - now_s

    def both_busy(self) -> bool:
        """Whether some instance of each role computes, as far as that matters."""
        return all(self._busy.values())

    def start_s(self, instance_id: str) -> float:
        """Seconds until a launched life is READY; the first lives are there when the traffic begins."""
        return self.scenario.restart_s if self.records[instance_id].lives else 0.0

    async def launch(self, instance_id: str, role: Role, *, index: int, incarnation: str) -> SimLife:
        info = InstanceInfo(instance_id=instance_id, role=role, engine_index=index)
        return SimLife(self, info, incarnation)

    def give_up(self, instance_ids: Sequence[str]) -> None:
        """Nothing is reserved."""

    async def kill(self, instance_id: str) -> bool:
        """Kill the life in a place; router and controller notice it later. False when there is none."""
        life = self.lives.get(instance_id)
        if life is None:
            return False
        await life.die()

        def noticed() -> None:
            self.router.leave(instance_id, why="its connection closed")
            life.noticed()

        asyncio.get_running_loop().call_later(self.scenario.detect_s, noticed)
        return True
