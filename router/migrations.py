"""Running requests that go on at another instance, their KV handed over: asked for, to keep more SLOs, or as
their instance will go."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from cluster.instance import InstanceState, Role
from cluster.metrics import IngressMetrics
from router.decisions import Decisions
from router.fleet import Fleet, L, Member
from router.links import NETWORK, NODE, link_between
from router.predictor import Predictor
from router.rebalance import EVERY_S, best_move, iteration_s, overloaded
from router.view import InstanceView

if TYPE_CHECKING:
    from router.run import Run

Rebalance = Literal["off", "memory", "all"]

logger = logging.getLogger(__name__)

# What links between instances do at least where KV is worth moving: PCIe or shared memory, a good Ethernet. A
# move is put off for as long as copying takes by that, or by what hand-overs were seen to take.
BYTES_PER_S = {NODE: 10e9, NETWORK: 2.5e9}


class Migrations:
    """Decides and begins them; a `Run` carries its own out."""

    def __init__(
        self,
        fleet: Fleet[L],
        runs: Mapping[str, Run],
        metrics: IngressMetrics,
        predictor: Predictor | None = None,
        rebalance: Rebalance = "off",
        decisions: Decisions | None = None,
    ) -> None:
        """
        Args:
            runs: under way, by request id.
            predictor: of a policy that predicts times; others don't rebalance.
            decisions: told of each, for those who ask.
        """
        self._fleet = fleet
        self._runs = runs
        self._metrics = metrics
        self._predictor = predictor
        self._decisions = decisions
        self._for_tpot = rebalance == "all"
        # Instances that go, and when those are looked for that have begun to decode there since.
        self._emptying: set[str] = set()
        self._empty_s = self._moves_s = -math.inf
        self._look_s = -math.inf if predictor is not None and rebalance != "off" else math.inf

    def begin(self, request_id: str, instance_id: str, cause: str = "asked") -> bool:
        """Let a running request go on at another instance; False where it does not decode now, or has a
        sampler that can't change engines, or the instance is not there."""
        run = self._runs.get(request_id)
        if run is None or not run.can_move() or run.decodes_at == instance_id:
            return False
        target = self._fleet.get(instance_id)
        if target is None or target.info.state is not InstanceState.READY:
            return False
        logger.debug("%s goes from %s to %s: %s", request_id, run.decodes_at, instance_id, cause)
        self._metrics.migrations.labels(cause=cause).inc()
        if self._decisions is not None:
            now_s = asyncio.get_running_loop().time()
            self._decisions.moved(request_id, run.decodes_at, instance_id, cause, now_s)
        run.move(instance_id, self._copy_s(run, target))
        return True

    def _copy_s(self, run: Run, target: Member[L]) -> float:
        """What it takes to copy a running request's KV, beside that of all others that move now."""
        here, facts = self._fleet.view_of(run.decodes_at), target.info.facts
        if here is None or facts is None:
            return 0.0
        tokens = run.tokens
        link = link_between(here, target.view)
        seconds = tokens * facts.kv_bytes_per_token / BYTES_PER_S[link]
        if self._predictor is not None:
            seconds = max(seconds, self._predictor.hand_overs.seconds(link, tokens))
        return seconds * sum(bool(one.moves_to) or one is run for one in self._runs.values())

    def look(self, now_s: float) -> None:
        """Rebalance, and empty what is to be empty, unless it was looked at a moment ago."""
        if now_s >= self._moves_s:
            self._moves_s = now_s + EVERY_S
            for run in self._runs.values():
                if run.moves_to:
                    run.stay()
        if self._emptying and now_s >= self._empty_s:
            self._empty_s = now_s + EVERY_S
            self._emptying = {one for one in self._emptying if self._drains(one)}
            for instance_id in self._emptying:
                self._move_all(instance_id)
        if now_s < self._look_s or self._predictor is None:
            return
        self._look_s = now_s + EVERY_S
        if sources := overloaded(self._fleet, self._predictor, for_tpot=self._for_tpot):
            self._rebalance(sources, self._predictor)

    def empty(self, instance_id: str) -> None:
        """Let what runs on an instance that will go continue elsewhere, as far as there is room; and what is
        on its way there when it runs."""
        self._emptying.add(instance_id)
        self._move_all(instance_id)

    def _move_all(self, instance_id: str) -> None:
        promised: dict[str, int] = {}
        for run in self._runs.values():
            if run.moves_to:
                promised[run.moves_to] = promised.get(run.moves_to, 0) + run.tokens
        for run in self._decoding().get(instance_id, []):
            tokens = run.tokens
            for target in self._fleet.by_tokens(Role.DECODE):
                more = promised.get(target.instance_id, 0) + tokens
                if target.instance_id != instance_id and target.has_room(more):
                    if self.begin(run.request.request_id, target.instance_id, "drain"):
                        promised[target.instance_id] = more
                    break

    def _drains(self, instance_id: str) -> bool:
        member = self._fleet.get(instance_id)
        return member is not None and member.info.state is InstanceState.DRAINING

    def _decoding(self) -> dict[str, list[Run]]:
        """Runs that can move, by the instance that decodes them."""
        found: dict[str, list[Run]] = {}
        for run in self._runs.values():
            if run.can_move():
                found.setdefault(run.decodes_at, []).append(run)
        return found

    def _rebalance(self, sources: list[InstanceView], predictor: Predictor) -> None:
        running = self._decoding()
        moving = [run for run in self._runs.values() if run.moves_to]
        busy = {end for run in moving for end in (run.moves_to, run.decodes_at)}
        for source in sources:
            runs = running.get(source.instance_id, [])
            if not runs or source.instance_id in busy:
                continue
            here_s = iteration_s(source, predictor)
            progress = [run.progress(here_s) for run in runs]
            found = best_move(source, progress, self._fleet, predictor, busy)
            if found is not None and self.begin(found.request_id, found.target, found.cause):
                busy |= {found.source, found.target}
