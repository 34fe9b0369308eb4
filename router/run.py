"""The state machine of a request: ADMIT -> PREFILL -> TRANSFER -> DECODE -> DONE.

One coroutine per request. Every stage has a deadline, every exit gives back what it held, and a request ends
as what really happened: all its tokens, or a typed error.
"""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.errors import EngineFailure, InstanceBusy, InstanceLost, ServingError, StageTimeout, TooLate
from cluster.handle import KvHandle
from cluster.request import Handoff, ServeRequest, Stage, Timeline
from router.claim import Claim
from router.hop import Hop, HopKind
from router.offers import Offers
from router.policy import Decision
from router.predictor import Prediction
from router.read_ahead import LATE, ReadAhead, tokens_ahead
from router.rebalance import LEAST_LEFT, Progress

if TYPE_CHECKING:
    from router.router import Router

logger = logging.getLogger(__name__)

# With fewer tokens it says little how long they took.
LEAST_TOKENS = 4
# A move can cure these; anything else would happen again elsewhere.
_CURABLE = (InstanceLost, StageTimeout, EngineFailure)


class Run:
    """One request on its way.

    Attributes:
        stage: where it is now.
        generated: output tokens sent to the client.
        timeline: when it reached its stages.
        task: serves it; its owner's.

    Room is reserved at both instances from the decision on: by the prompt's end where it is computed, by the
    request's end where it decodes.
    """

    def __init__(self, request: ServeRequest, router: Router, now_s: float) -> None:
        self.request = request
        self.stage = Stage.ADMIT
        self.generated: list[int] = []
        self.timeline = Timeline(arrived_s=now_s)
        self._router = router
        self._hops = 0
        self._read = False
        self._avoid: frozenset[str] = frozenset()
        self._offers = Offers(request, router.deadlines.prefill_s, now_s)
        self._decoding: Hop | None = None
        self._next = ""
        self._is_moving = False
        self._ends_at = 0
        self._ahead = ReadAhead()
        self.task: asyncio.Task[None]
        self._decision: Decision
        self._claim: Claim

    def admit(self) -> bool:
        """Decide where it goes and reserve room there; False when all have refused it. Raises ServingError
        when it can't go anywhere, Rejected for a request without tokens that would miss its SLO, and NoSlack
        for one that fills slack and finds none."""
        asked = self.request
        if self._offers.count and not self.generated:
            asked = replace(asked, slo=self._offers.left(asked.slo, self._now()))
        decision = self._router.decide(asked, self._avoid, self._offers.refused)
        if decision is None:
            return False
        self._decision = decision
        if not self._avoid:
            self._let_in(decision)
        self._claim = Claim(
            self._router.fleet,
            self.request,
            decision,
            lone=self._lone_engine(decision),
            tokens=len(self.request.prompt_token_ids) + self._carried(),
            now_s=self._now(),
            predictor=self._router.predictor,
        )
        return True

    def _let_in(self, decision: Decision) -> None:
        slack, admission, predicted = self._router.slack, self._router.admission, decision.predicted
        if self.request.fills_slack:
            slack.require(self.request, decision, self._now())
        elif not self._offers.count:
            slack.came(self.request.slo, self._now())
            admission.require(self.request, predicted, self._now())
            admission.admitted(self.request, predicted)
        elif predicted is not None:
            waited_s = self._now() - self.timeline.arrived_s
            admission.require_chance(self.request, replace(predicted, ttft_s=predicted.ttft_s + waited_s))

    @property
    def predicted(self) -> Prediction | None:
        """What the last decision expected."""
        return self._decision.predicted

    @property
    def expected(self) -> Prediction | None:
        """What was predicted of it; None where times were not, or where it was decided on more than once."""
        predicted = self.predicted if not (self._avoid or self._offers.count) else None
        return predicted if predicted is not None and predicted.ttft_s else None

    def can_move(self) -> bool:
        """Whether it decodes and could go on at another instance, its KV handed over."""
        hop = self._decoding
        if hop is None or self._is_moving or not hop.has_started or hop.has_ended:
            return False
        # One token comes before it goes, and one must be left.
        left = self.request.max_tokens - len(self.generated)
        return self.request.handoff is Handoff.TOKENS and left > 2

    @property
    def tokens(self) -> int:
        """Tokens that are there of it, in all."""
        return len(self.request.prompt_token_ids) + len(self.generated)

    def move(self, instance_id: str, copy_s: float = 0.0) -> None:
        """Let it go on at another instance; only where it `can_move`.

        Its engine ends it soon, which it may do for good instead: then it does not move. Until then the other
        one reads what is there, where it can hear of it.

        Args:
            copy_s: what that takes, roughly.
        """
        source = self._decoding
        assert source is not None
        self._next, self._is_moving = instance_id, True
        tokens = self.tokens
        self._claim.moving(instance_id, tokens)
        source.hands_over = True
        at_tokens, self._ends_at = 0, len(self.generated) + 1
        if news_address := self._router.news_address(source, instance_id):
            done = len(self.generated)
            token_s = self._token_s()
            # What comes in steps of several tokens is behind what is there.
            unseen_s = self._now() - source.progress_s
            more = tokens_ahead(copy_s + unseen_s, token_s, self.request.max_tokens - done)
            reader = self._hop(instance_id, HopKind.DECODE, source=source)
            reader.follow(news_address, more)
            try:
                self._ahead.begin(reader, self._router.open(reader), done + more)
            except ServingError:  # the other one was lost this moment: known when it is to go there
                source.follower = None
            else:
                at_tokens, self._ends_at = tokens + more - len(source.prompt_token_ids), done + more
        self._router.hand_over(source, at_tokens)

    def stay(self) -> None:
        """It was told to move so long ago that its engine can't have heard: nobody waits for it elsewhere any
        more, and it may be told again."""
        if len(self.generated) > self._ends_at + LATE:
            self._ahead.close()
            self._claim.stays()
            self._is_moving = False

    def _token_s(self) -> float:
        """Between two of its tokens; 0 where that is not known."""
        first_s, since = self.timeline.first_token_s, len(self.generated) - 1
        if first_s is None or since < LEAST_TOKENS:
            return self.predicted.tpot_s if self.predicted is not None else 0.0
        return (self._now() - first_s) / since

    @property
    def moves_to(self) -> str:
        """Where it was asked to go, until it is there; empty for nowhere."""
        return self._next if self._is_moving else ""

    @property
    def decodes_at(self) -> str:
        """The instance that decodes it now; empty for none."""
        return self._decoding.instance_id if self._decoding is not None else ""

    def progress(self, iteration_s: float) -> Progress:
        """How far it is, while it decodes where an iteration takes so long."""
        now_s, timeline, hop = self._now(), self.timeline, self._decoding
        assert hop is not None
        assert timeline.first_token_s is not None
        # What comes in steps of several tokens is behind what is there.
        unseen = int((now_s - hop.progress_s) / iteration_s) if iteration_s > 0 else 0
        done = len(self.generated) + unseen
        predicted = self.predicted
        expected = predicted.output_tokens if predicted is not None else 0
        return Progress(
            request_id=self.request.request_id,
            context_tokens=len(self.request.prompt_token_ids) + done,
            tpot_bound_s=self.request.slo.tpot_s,
            spent_s=now_s - timeline.first_token_s,
            tokens=max(0, done - 1),
            left=max(1, min(self.request.max_tokens, max(expected, done + LEAST_LEFT)) - done),
        )

    def give_back(self) -> None:
        """Release what is reserved still."""
        self._ahead.close()
        self._claim.close(self._now())

    async def serve(self) -> None:
        """Serve the request, which was admitted, to its end. Raises ServingError when it can't be."""
        deadlines = self._router.deadlines
        attempt = 1
        is_decided = True
        while True:
            try:
                if not is_decided:
                    await self._decide_again()
                await self._attempt(self._decision)
                break
            except InstanceBusy as busy:
                # No attempt: nothing was done, and nothing has failed.
                self._offers.add(busy, self._now())
            except _CURABLE as error:
                self._avoid |= {error.facts["instance"]}
                logger.warning("request %s, attempt %d: %s", self.request.request_id, attempt, error)
                if attempt == deadlines.attempts or self._would_meet_the_same_queue(error):
                    raise
                self._router.metrics.moves.labels(cause=error.reason, stage=self.stage.value).inc()
                attempt += 1
            finally:
                self.give_back()
            is_decided = False
        self.stage = Stage.DONE
        self.timeline.done_s = self._now()

    async def _decide_again(self) -> None:
        """Decide anew, at once; or, when all have refused it, as soon as one may have room. Raises Rejected
        when that would be too late."""
        while not self.admit():
            self.stage = Stage.ADMIT
            offers = self._offers
            if not await self._router.line.turn(offers.room_s, offers.give_up_s):
                raise offers.rejection(self._now())
            offers.again()

    def _would_meet_the_same_queue(self, error: ServingError) -> bool:
        # A timeout may be a long queue: joining its end again would only make it longer.
        return isinstance(error, StageTimeout) and self._router.all_tried(self._avoid)

    async def _attempt(self, decision: Decision) -> None:
        lone = self._lone_engine(decision)
        self._next, self._is_moving = "", False
        if lone is None:
            await self._split(decision)
        else:
            await self._whole(lone)

    def _lone_engine(self, decision: Decision) -> str | None:
        """The instance that serves both phases, where one does."""
        handoff = self.request.handoff
        nothing_to_hand_over = len(self.request.prompt_token_ids) == 1 and handoff is not Handoff.TOKENS
        if handoff is Handoff.NOTHING or nothing_to_hand_over:
            return decision.decode
        if self.request.max_tokens - self._carried() == 1 or decision.prefill == decision.decode:
            # Nothing to hand over, or nobody to hand it to.
            return decision.prefill
        return None

    def _carried(self) -> int:
        """Output tokens of this request that its next engine gets as prompt."""
        return len(self.generated) if self.request.handoff is Handoff.TOKENS else 0

    async def _whole(self, instance_id: str) -> None:
        """Both phases on one instance."""
        self.stage = Stage.PREFILL
        hop = self._hop(instance_id, HopKind.WHOLE)
        self.timeline.prefill_sent_s = self._now()
        with self._router.open(hop):
            await self._started(hop, self._router.deadlines.prefill_s)
            self._prompt_done()
            self.stage = Stage.DECODE
            await self._decoded(hop)
        self._router.computed(hop)
        await self._elsewhere(hop)

    async def _split(self, decision: Decision) -> None:
        """Prefill on one instance, decode on another, which is sent a long prompt before it is computed."""
        prefill = self._hop(decision.prefill, HopKind.PREFILL)
        decode: Hop | None = None
        try:
            with ExitStack() as opened:
                if news_address := self._router.news_address(prefill, decision.decode):
                    decode = self._hop(decision.decode, HopKind.DECODE, source=prefill)
                    decode.follow(news_address)
                    opened.enter_context(self._router.open(decode))
                if (handle := await self._prefill(prefill)) is None:
                    return
                if decode is None:
                    decode = self._hop(decision.decode, HopKind.DECODE, source=prefill)
                    opened.enter_context(self._router.open(decode))
                else:
                    self._router.go_on(decode, handle)
                await self._decode(decode, handle)
        finally:
            self._let_go(prefill, decode)
        await self._elsewhere(decode)

    async def _elsewhere(self, source: Hop) -> None:
        """Go on at other instances for as long as one hands the request over."""
        while source.handle is not None:
            decode: Hop | None = None
            try:
                if source.is_last:  # it ended just when it was told to hand over
                    return
                self._next = self._router.target(self._next, source.instance_id)
                self._is_moving = False
                self._claim.moved(self._next, self.tokens, len(self.generated))
                with ExitStack() as opened:
                    handle = source.handle
                    if (decode := self._ahead.take(len(self.generated), handle.tokens, opened)) is not None:
                        self._router.go_on(decode, handle)
                    else:
                        decode = self._hop(self._next, HopKind.DECODE, source=source)
                        opened.enter_context(self._router.open(decode))
                    await self._decode(decode, handle)
            finally:
                self._let_go(source, decode)
            source = decode

    def _let_go(self, source: Hop, reader: Hop | None) -> None:
        """A decode that read blocks has told their source; one that computed them anew, or had them in its
        own cache, may not have."""
        read = reader is not None and reader.has_started and self._read
        if source.handle is not None and not read:
            self._router.release(source.instance_id, [source.handle.request_id])

    async def _prefill(self, hop: Hop) -> KvHandle | None:
        """One token, and the prompt's blocks kept for a reader; None when the request ends with it."""
        self.stage = Stage.PREFILL
        self.timeline.prefill_sent_s = self._now()
        with self._router.open(hop):
            await self._started(hop, self._router.deadlines.prefill_s)
            await self._ended(hop)
        self._prompt_done()
        self._router.computed(hop)
        self._observe(Stage.PREFILL, self.timeline.prefill_sent_s)
        # When its token is the client's, a stop token ends the request here. Otherwise it was sampled for
        # nobody, and the decode instance will say what comes first.
        if hop.deliver and hop.is_last:
            return None
        if hop.handle is None:
            raise EngineFailure(
                instance=hop.instance_id, stage=self.stage.value, detail="it kept no blocks to be read"
            )
        return hop.handle

    def _prompt_done(self) -> None:
        self._claim.prefilled(self._now())
        self._router.line.news()

    async def _decode(self, hop: Hop, handle: KvHandle) -> None:
        """Decode on an instance that reads the blocks first, and that the hop is open at."""
        self.stage = Stage.TRANSFER
        self.timeline.decode_sent_s = self._now()
        await self._started(hop, self._router.deadlines.transfer_s)
        if not self.timeline.decode_first_s:
            self.timeline.decode_first_s = self._now()
        self._observe(Stage.TRANSFER, self.timeline.decode_sent_s)
        if hop.source is not None and hop.source.kind is not HopKind.PREFILL:
            self._router.metrics.migration_stall_seconds.observe(self._now() - hop.source.progress_s)
        else:
            self._router.handed_over(hop, self._now() - self.timeline.decode_sent_s)
        self.stage = Stage.DECODE
        self._next = ""
        self._account(hop, handle)
        before, since_s = len(self.generated), self._now()
        await self._decoded(hop)
        self._claim.decoded(len(self.generated) - before, self._now() - since_s)

    def _account(self, hop: Hop, handle: KvHandle) -> None:
        stats = hop.stats
        if stats is None:
            self._read = True
            return
        moved = stats.num_external_cached_tokens
        recomputed = max(0, handle.tokens - moved - stats.num_local_cached_tokens)
        self._router.metrics.kv_tokens_moved.inc(moved)
        if moved and hop.source is not None:
            moved_bytes = moved * self._router.kv_bytes_per_token(hop.instance_id)
            link = self._router.link(hop.source.instance_id, hop.instance_id)
            self._router.metrics.kv_bytes_moved.labels(link=link).inc(moved_bytes)
        self._read = moved > 0 and not recomputed
        if recomputed:
            self._router.metrics.kv_tokens_recomputed.inc(recomputed)
            logger.error(
                "fault: %s recomputed %d of %d KV tokens that %s had sent for request %s",
                hop.instance_id,
                recomputed,
                handle.tokens,
                hop.source.instance_id if hop.source else "?",
                self.request.request_id,
            )

    def _hop(self, instance_id: str, kind: HopKind, source: Hop | None = None) -> Hop:
        carries = self.request.handoff is Handoff.TOKENS
        sent = self._carried()
        predicted = self._decision.predicted
        self._hops += 1
        return Hop(
            hop_id=f"{self.request.request_id}~{self._hops}",
            instance_id=instance_id,
            kind=kind,
            request=self.request,
            prompt_token_ids=self._prompt_for(kind, sent),
            generated=self.generated,
            max_tokens=1 if kind is HopKind.PREFILL else self.request.max_tokens - sent,
            deliver=kind is not HopKind.PREFILL or carries,
            swallow=0 if carries else len(self.generated),
            source=source,
            cached_tokens=predicted.cached_tokens if predicted is not None else 0,
            deadline_s=math.inf if self.generated else self.timeline.arrived_s + self.request.slo.ttft_s,
            keep_s=self._router.keep_s(self.request, instance_id, self.predicted),
        )

    def _prompt_for(self, kind: HopKind, sent: int) -> list[int]:
        prompt = self.request.prompt_token_ids
        if kind is HopKind.PREFILL and self.request.handoff is not Handoff.TOKENS:
            # The reader computes the prompt's last token itself. Would the source compute it too, a
            # sliding-window layer of it might have given up a block that the reader needs for it.
            return prompt[:-1]
        return prompt + self.generated[:sent] if sent else prompt

    async def _started(self, hop: Hop, deadline_s: float) -> None:
        patience_s = self._patience_s()
        try:
            await hop.until_started(min(deadline_s, patience_s))
        except TimeoutError:
            if patience_s < deadline_s:
                raise self._too_late() from None
            raise self._timeout(hop, deadline_s) from None
        if self.timeline.first_token_s is None and self.generated:
            self.timeline.first_token_s = self._now()

    async def _decoded(self, hop: Hop) -> None:
        self._decoding = hop
        try:
            await self._ended(hop)
        except BaseException:
            # It may have handed the request over already, to nobody now.
            self._let_go(hop, None)
            raise
        finally:
            self._decoding = None

    async def _ended(self, hop: Hop) -> None:
        stall_s = self._router.deadlines.stall_s
        try:
            await hop.until_ended(stall_s)
        except TimeoutError:
            raise self._timeout(hop, stall_s) from None

    def _patience_s(self) -> float:
        """What is left of the time for which its first token is waited for."""
        if self.generated:
            return math.inf
        longest_s = self._router.deadlines.ttft_patience * self.request.slo.ttft_s
        return max(0.0, self.timeline.arrived_s + longest_s - self._now())

    def _too_late(self) -> TooLate:
        return TooLate(
            stage=self.stage.value,
            waited_s=self._now() - self.timeline.arrived_s,
            bound_s=self.request.slo.ttft_s,
        )

    def _timeout(self, hop: Hop, deadline_s: float) -> StageTimeout:
        return StageTimeout(stage=self.stage.value, instance=hop.instance_id, deadline_s=deadline_s)

    def _observe(self, stage: Stage, since_s: float | None) -> None:
        assert since_s is not None
        self._router.stage_seconds[stage].observe(self._now() - since_s)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
