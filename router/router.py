"""The router: owns the runs, knows the instances, moves outputs to the runs they belong to."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from cluster.errors import Draining, EngineFailure, InstanceBusy, InstanceLost, ServingError
from cluster.handle import KvHandle
from cluster.instance import InstanceInfo, InstanceLoad, InstanceState, Role
from cluster.metrics import IngressMetrics
from cluster.request import ServeRequest, Stage
from cluster.spec import DeadlineSpec
from cluster.wire import GoOn, HandOver
from router.admission import Admission, retry_s
from router.decisions import Decisions
from router.fleet import Fleet
from router.hop import EngineOutput, Hop, HopKind
from router.links import NETWORK, link_between
from router.migrations import Migrations, Rebalance
from router.policy import Decision, Policy, Unsplit
from router.predictor import Prediction, Predictor
from router.run import Run
from router.session_ttl import SessionTtl, Turn, WithSession
from router.slack import Slack
from router.view import ClusterView, View
from router.waiting_line import WaitingLine

logger = logging.getLogger(__name__)

# What an instance tells of its queue is not believed for longer: an instance that nobody asks tells no news.
MOST_TOLD_S = 10.0


class Link(Protocol):
    """The way to one instance.

    Attributes:
        load: what the instance last said of itself.
    """

    load: InstanceLoad

    def send(self, hop: Hop) -> None:
        """Give the instance a request. Raises ServingError for one that can't be built."""
        ...

    def abort(self, request_ids: list[str]) -> None:
        """Stop requests there. Never raises: an instance that is gone has none."""
        ...

    def release(self, request_ids: list[str]) -> None:
        """Free blocks kept for a reader that will not come. Never raises."""
        ...

    def hand_over(self, message: HandOver) -> None:
        """End a running request early, and keep its blocks for a reader. Never raises."""
        ...

    def go_on(self, message: GoOn) -> None:
        """A request there has the prompt that it follows. Never raises."""
        ...


class Client(Protocol):
    """Where a request's end is told when no engine output tells it."""

    def fail(self, request_id: str, error: ServingError) -> None:
        """The request ended with an error."""
        ...

    def forget(self, request_id: str) -> None:
        """The request is over, well or badly."""
        ...


def _policy_failure(request: ServeRequest, found: Exception) -> ServingError:
    logger.error("the policy failed on request %s", request.request_id, exc_info=found)
    return EngineFailure(instance="router", stage=Stage.ADMIT.value, detail=repr(found))


class OpenHop:
    """A hop on its instance: sent when the block is entered, and stopped there if it has not ended when it is
    left. A class, as a generator costs twice as much, and every request has two."""

    __slots__ = ("_hop", "_hops", "_link")

    def __init__(self, hops: dict[str, Hop], hop: Hop, link: Link) -> None:
        self._hops, self._hop, self._link = hops, hop, link

    def __enter__(self) -> None:
        self._hops[self._hop.hop_id] = self._hop
        try:
            self._link.send(self._hop)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        del self._hops[self._hop.hop_id]
        if not self._hop.engine_ended:
            self._link.abort([self._hop.hop_id])


class Router:
    """Serves requests with the instances it is told of.

    Attributes:
        on_decision: told every decision as it is made, with the loop's time.
        predictor: the policy's; None for a policy without one.
        line: requests that every instance was too busy for.
        migrations: of running requests, to other instances.
        wants_blocks: whether instances shall tell how their prefix caches change.
    """

    def __init__(
        self,
        policy: Policy,
        deadlines: DeadlineSpec,
        client: Client,
        metrics: IngressMetrics,
        predictor: Predictor | None = None,
        *,
        by_deadline: bool = False,
        with_prefixes: bool = False,
        decisions: Decisions | None = None,
        tenant_weights: Mapping[str, float] | None = None,
        promised_tpot_s: float = math.inf,
        keeps_sessions: bool = False,
        rebalance: Rebalance = "off",
    ) -> None:
        """
        Args:
            predictor: the policy's; it is told how long answers were.
            by_deadline: whether instances compute prompts in the order of their deadlines.
            with_prefixes: whether the policy wants to know what is in the instances' caches.
            decisions: keeps what is decided, for those who ask.
            tenant_weights: shares of tenants that are not 1.
            promised_tpot_s: the tightest bound of all classes, for which those that fill slack leave room.
            keeps_sessions: whether instances shall keep the KV of a session for its next turn.
            rebalance: when running requests go on elsewhere, as far as the policy predicts times.
        """
        self.deadlines = deadlines
        self.metrics = metrics
        # Looked up once: a lookup by label costs more than the observation.
        self.stage_seconds = {
            stage: metrics.stage_seconds.labels(stage=stage.value)
            for stage in (Stage.PREFILL, Stage.TRANSFER)
        }
        self.fleet: Fleet[Link] = Fleet(by_deadline=by_deadline, with_prefixes=with_prefixes)
        self.wants_blocks = with_prefixes
        self.reservations = self.fleet.reservations
        self._policy = policy
        self.predictor = predictor
        self._decisions = decisions
        self.line = WaitingLine()
        self._sessions = SessionTtl() if keeps_sessions else None
        self.admission = Admission(deadlines.prefill_s, tenant_weights)
        self.slack = Slack(self.fleet, promised_tpot_s)
        self._client = client
        self._hops: dict[str, Hop] = {}
        self._runs: dict[str, Run] = {}
        self.migrations = Migrations(self.fleet, self._runs, metrics, predictor, rebalance, decisions)
        self._outcomes: dict[str, str] = {}
        self.on_decision: Callable[[ServeRequest, Decision, float], None] | None = None
        self._draining = False
        self._quiet = asyncio.Event()
        self._quiet.set()

    # --- the instances

    def join(self, info: InstanceInfo, link: Link) -> None:
        """An instance is READY and can be reached."""
        self.fleet.join(info, link)
        self._count_instances()
        self.line.news()

    def leave(self, instance_id: str, *, why: str) -> None:
        """An instance is gone: every hop that needs it fails, and its run goes elsewhere."""
        if self.fleet.leave(instance_id) is None:
            return
        self._count_instances()
        waiting = [hop for hop in self._hops.values() if hop.waits_for(instance_id)]
        logger.warning("lost instance %s (%s) with %d requests", instance_id, why, len(waiting))
        for hop in waiting:
            hop.fail(InstanceLost(instance=instance_id, stage=hop.kind.value))

    def update(self, info: InstanceInfo) -> None:
        """News of a known instance, for example that it is DRAINING: it keeps its requests, gets no more."""
        if not self.fleet.update(info):
            return
        self._count_instances()
        if info.state is InstanceState.DRAINING:
            self.migrations.empty(info.instance_id)

    def view(self) -> ClusterView:
        """The READY instances now, as a value."""
        return self.fleet.snapshot()

    def kv_bytes_per_token(self, instance_id: str) -> int:
        """Bytes of KV cache a token takes there; 0 when it is gone."""
        member = self.fleet.get(instance_id)
        return member.info.facts.kv_bytes_per_token if member and member.info.facts else 0

    # --- the requests

    def submit(self, request: ServeRequest) -> None:
        """Begin to serve a request; its end comes as an output or through `Client.fail`.

        It is decided here and now where it goes, and room is reserved: the next decision sees it.

        Raises:
            Draining: this router takes no new requests.
            NoInstance: a role has no READY instance.
            Rejected: it would miss its SLO.
            NoSlack: it fills slack, and there is none.
        """
        if self._draining:
            raise Draining()
        now_s = asyncio.get_running_loop().time()
        if self._sessions is not None and request.session_id:
            self._sessions.came(request.session_id, now_s)
        run = Run(request, self, now_s)
        try:
            run.admit()
        except Exception as found:
            # The edge of a request, as `_ended` is: whoever submits knows what to do with a ServingError.
            error = found if isinstance(found, ServingError) else _policy_failure(request, found)
            self._over(run, error.reason)
            raise error from None
        run.task = asyncio.create_task(run.serve(), name=f"run-{request.request_id}")
        self._runs[request.request_id] = run
        self._quiet.clear()
        self.slack.running += request.fills_slack
        run.task.add_done_callback(lambda ended: self._ended(run, ended))

    def abort(self, request_ids: Iterable[str], outcome: str = "cancelled") -> None:
        """Stop these requests wherever they are and free what they hold; nobody waits for more of them.

        Args:
            outcome: how the metrics count them: `cancelled` by their clients, `ok` at a stop string, or the
                reason of an error that was told already.
        """
        for request_id in request_ids:
            if (run := self._runs.get(request_id)) is not None:
                self._outcomes.setdefault(request_id, outcome)
                run.task.cancel()

    def on_outputs(self, instance_id: str, outputs: list[EngineOutput]) -> list[EngineOutput]:
        """Take one engine step's outputs; returns those for the clients of this router, rewritten."""
        now_s = asyncio.get_running_loop().time()
        hops = self._hops
        forward: list[EngineOutput] = []
        unread: list[str] = []
        for output in outputs:
            hop = hops.get(output.request_id)
            if hop is None:
                # Left while this was on its way; blocks kept for it have no reader.
                if output.kv_transfer_params:
                    unread.append(output.request_id)
                continue
            rewritten = hop.receive(output, now_s)
            if rewritten is not None:
                forward.append(rewritten)
        if unread:
            self.release(instance_id, unread)
        self.migrations.look(now_s)
        return forward

    def fail_hop(self, hop_id: str, instance_id: str, why: str) -> None:
        """An instance could not take a request."""
        if (hop := self._hops.get(hop_id)) is not None:
            hop.engine_ended = True
            hop.fail(EngineFailure(instance=instance_id, stage=hop.kind.value, detail=why))

    def refused(self, hop_id: str, instance_id: str, wait_s: float) -> None:
        """An instance is too busy to take a request, whose prompt could begin there after `wait_s`."""
        hop, member = self._hops.get(hop_id), self.fleet.get(instance_id)
        if hop is None or member is None:  # it, or the instance, left while this was on its way
            return
        self.metrics.refusals.labels(role=member.info.role.value).inc()
        now_s = asyncio.get_running_loop().time()
        member.view.prompts.told(hop.request.request_id, min(wait_s, MOST_TOLD_S), now_s)
        hop.engine_ended = True
        hop.fail(InstanceBusy(instance=instance_id, wait_s=wait_s, retry_after_s=retry_s(wait_s)))

    def can_serve(self) -> bool:
        """Whether a request would find the instances it needs now. No decision: a policy may count those."""
        enough = any if isinstance(self._policy, Unsplit) else all
        return not self._draining and enough(bool(self.fleet.of(role)) for role in Role)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    @property
    def pending(self) -> int:
        """Requests under way."""
        return len(self._runs)

    @property
    def open_hops(self) -> int:
        """Requests in engines."""
        return len(self._hops)

    async def drain(self, deadline_s: float) -> None:
        """Take no new requests, let the running ones end, and end those that have not by the deadline with
        an error that says so."""
        self._draining = True
        try:
            async with asyncio.timeout(deadline_s):
                await self._quiet.wait()
        except TimeoutError:
            for request_id in list(self._runs):
                self._client.fail(request_id, Draining())
                self.abort([request_id], outcome=Draining.reason)
            await self._quiet.wait()

    # --- what runs use

    def hand_over(self, hop: Hop, at_tokens: int = 0) -> None:
        """Let the engine of a hop end it with so many output tokens, its blocks kept; with its next one where
        it has them already."""
        if (member := self.fleet.get(hop.instance_id)) is not None:
            member.link.hand_over(HandOver(hop.hop_id, at_tokens, hop.follower))

    def target(self, wanted: str, source: str) -> str:
        """Where a request goes on that an instance has handed over: where it was to go, or, if that one is
        gone, at the decode instance with the least to do."""
        if wanted in self.fleet:
            return wanted
        others = (view.instance_id for view in self.fleet.by_tokens(Role.DECODE))
        return next((name for name in others if name != source), wanted)

    def news_address(self, source: Hop, instance_id: str) -> str:
        """Where an instance hears how far a hop elsewhere is; empty where it shall be told only of its end:
        of a prompt that is computed at once there is no news before."""
        there, reader = self.fleet.get(source.instance_id), self.fleet.get(instance_id)
        if there is None or reader is None or there.info.facts is None or reader.info.facts is None:
            return ""
        chunk = there.info.facts.chunk_tokens
        if source.kind is HopKind.PREFILL and (
            not chunk or len(source.prompt_token_ids) - source.cached_tokens <= chunk
        ):
            return ""
        return reader.info.facts.news_address

    def go_on(self, hop: Hop, handle: KvHandle) -> None:
        """Tell the instance of a hop that its prompt is computed."""
        message = hop.go_on(handle, asyncio.get_running_loop().time())
        if (member := self.fleet.get(hop.instance_id)) is not None:
            member.link.go_on(message)

    def handed_over(self, hop: Hop, seconds: float) -> None:
        """A hop that reads from a prefill instance has begun to decode, so long after that one's token."""
        if self.predictor is not None and hop.source is not None:
            link = self.link(hop.source.instance_id, hop.instance_id)
            self.predictor.hand_overs.came(link, len(hop.prompt_token_ids), seconds)

    def link(self, source: str, reader: str) -> str:
        """The way from one instance to another (`router.links`); one that has left is not on this node."""
        there, here = self.fleet.view_of(source), self.fleet.view_of(reader)
        return link_between(there, here) if there is not None and here is not None else NETWORK

    def decide(
        self, request: ServeRequest, avoid: frozenset[str], refused: frozenset[str] = frozenset()
    ) -> Decision | None:
        """The policy's decision on the instances there are now, without those that failed the request and
        those that were too busy for it; None when it finds nobody but one of the latter."""
        without = avoid | refused
        view: View = self.fleet.without(without) if without else self.fleet
        now_s = asyncio.get_running_loop().time()
        # Where engines tell what they have, what they don't tell is gone.
        is_told = self.wants_blocks and request.plain_prompt
        if self._sessions is not None and not is_told and (kept := self._sessions.kept(request, now_s)):
            view = WithSession(view, kept)
        decision = self._policy.decide(request, view, now_s)
        if decision.prefill in refused:
            return None
        if self._decisions is not None:
            self._decisions.decided(request, decision, now_s)
        if self.on_decision is not None:
            self.on_decision(request, decision, now_s)
        return decision

    def all_tried(self, tried: frozenset[str]) -> bool:
        """Whether some role has no instance left but those in `tried`."""
        pools = [self.fleet.of(role) for role in Role]
        return any(pool and all(i.instance_id in tried for i in pool) for pool in pools)

    def open(self, hop: Hop) -> OpenHop:
        """Send a hop to its instance, for as long as the block runs. Raises InstanceLost."""
        member = self.fleet.get(hop.instance_id)
        if member is None:
            raise InstanceLost(instance=hop.instance_id, stage=hop.kind.value)
        if hop.source is not None and hop.source.instance_id not in self.fleet:
            raise InstanceLost(instance=hop.source.instance_id, stage=hop.kind.value)
        hop.progress_s = asyncio.get_running_loop().time()
        return OpenHop(self._hops, hop, member.link)

    def keep_s(self, request: ServeRequest, instance_id: str, predicted: Prediction | None) -> float:
        """How long an instance shall keep the KV of a prompt for the session's next turn; 0 for not at all,
        as where it would be read for its answer only."""
        member = self.fleet.get(instance_id)
        if self._sessions is None or not request.session_id or member is None:
            return 0.0
        if member.info.role is not Role.PREFILL:
            return 0.0
        if predicted is not None:
            self._sessions.waited(predicted.queue_s)
        tokens, facts = len(request.prompt_token_ids), member.info.facts
        reload_s = self.predictor.prefill_s(Role.PREFILL, tokens)[0] if self.predictor is not None else 0.0
        return self._sessions.keep_s(reload_s, tokens / facts.kv_capacity_tokens if facts else 1.0)

    def computed(self, hop: Hop) -> None:
        """An instance has computed a prompt."""
        session_id = hop.request.session_id
        if self._sessions is not None and session_id:
            now_s = asyncio.get_running_loop().time()
            turn = Turn(hop.instance_id, len(hop.prompt_token_ids), now_s, now_s + hop.keep_s)
            self._sessions.computed(session_id, turn)

    def release(self, instance_id: str, request_ids: list[str]) -> None:
        """Let an instance free blocks that nobody will read."""
        if (member := self.fleet.get(instance_id)) is not None:
            member.link.release(request_ids)
            self.metrics.kv_released.inc(len(request_ids))

    def _ended(self, run: Run, task: asyncio.Task[None]) -> None:
        """A run is over. A callback of its task: one cancelled before it began runs no code at all."""
        request_id = run.request.request_id
        run.give_back()
        del self._runs[request_id]
        outcome = self._outcomes.pop(request_id, "ok")
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, ServingError):
                # The edge of a request: it must end at its client, whatever went wrong in here.
                logger.error("request %s", request_id, exc_info=error)
                error = EngineFailure(instance="router", stage=run.stage.value, detail=repr(error))
            outcome = error.reason
            self._client.fail(request_id, error)
        if run.request.fills_slack:
            self.slack.running -= 1
        else:
            self.admission.ended(run.request, run.predicted, len(run.generated))
        if outcome == "ok" and self.predictor is not None:
            self.predictor.lengths.add(run.request.slo_class, len(run.generated))
        self._client.forget(request_id)
        self._over(run, outcome)
        if not self._runs:
            self._quiet.set()

    def _over(self, run: Run, outcome: str) -> None:
        """Count a request's end, and what was expected of it beside what came."""
        self.metrics.requests.labels(outcome=outcome).inc()
        timeline, tokens = run.timeline, len(run.generated)
        if timeline.done_s is None:
            timeline.done_s = asyncio.get_running_loop().time()
        if self._decisions is not None:
            self._decisions.ended(run.request, timeline, tokens, outcome)
        if outcome == "ok" and (expected := run.expected) is not None:
            self.metrics.predicted("ttft", expected.ttft_s, timeline.ttft_s())
            self.metrics.predicted("tpot", expected.tpot_s, timeline.tpot_s(tokens))

    def _count_instances(self) -> None:
        for role in Role:
            for state in (InstanceState.READY, InstanceState.DRAINING):
                count = self.fleet.count(role, state)
                self.metrics.instances.labels(role=role.value, state=state.value).set(count)
