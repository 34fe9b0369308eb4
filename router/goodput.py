"""The joint policy: serve a request within its SLO at the least cost to the SLOs of the others.

Of each instance it is asked how likely this request keeps its bound there, and how many of the requests that
are there, or will be, would lose theirs. An instance's "will be" is the average of its pool: what a light
instance is worth to those with tight bounds counts before any of them comes (Llumnix's virtual usage, with
SLOs instead of memory), so that requests with loose bounds gather where nobody tight could be served anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from cluster.instance import Role
from cluster.request import Handoff, ServeRequest
from router.choice import INDIFFERENT, Choice, best_of, best_pair, kept_by, search_near
from router.links import NETWORK, NODE, NONE, link_between
from router.pace import chance
from router.policy import Decision, pool_of
from router.predictor import Prediction, Predictor
from router.view import InstanceView, View

# Of its KV cache, an instance is given no more than this to be used at once: what preemption costs, nobody's
# slack can pay.
KV_SHARE = 0.95
# A bound that is so many times as long, or short, as an iteration is kept, or missed, whatever its error.
CLEAR = 0.4
# Who has less than that in its own pool may have its prompt computed among decodes: what it does to them is
# known less well, so not for a little.
SURE = 0.5
# A prompt that takes longer is not computed there: who is handed over to that instance meanwhile waits for
# all of it, as it takes what each iteration has room for.
MOST_AMONG_S = 2.0
# A request's part in the order of batches: of those that are as fast, the one with the fewest comes first.
TIE_S = 1e-9
# Of the usual ones that an instance has no more time for, the others find their place elsewhere.
STAY = 0.25


class _Usual(NamedTuple):
    """What an average instance of a pool has beside what this one has.

    Attributes:
        tpot: (bound, requests that would stay, the fewest that any instance has).
        ttft: (bound, prompts).
        work_s: of one such prompt.
    """

    tpot: tuple[tuple[float, float, int], ...]
    ttft: tuple[tuple[float, float], ...] = ()
    work_s: float = 0.0


class Goodput:
    """Maximises expected goodput, one request at a time."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        prefill_pool, decode_pool = (pool_of(view, role) for role in Role)
        cached = view.cached(request)
        output = self._predictor.output_tokens(request)
        usual = _usual(view, len(prefill_pool), decode_pool)
        by_batch = sorted(decode_pool, key=self._by_batch)
        # As if it were near; farther ones are weighed when it is known from where.
        decode = search_near(
            request.adapter,
            by_batch,
            lambda instance: self._decode(request, instance, output, usual, NODE),
            1.0,
        )
        by_ttft = self._by_ttft(request, prefill_pool, cached, now_s)

        def weigh_prefill(instance: InstanceView) -> Choice:
            return self._prefill(request, instance, cached, usual, now_s)

        prefill = search_near(request.adapter, by_ttft, weigh_prefill, decode.own)
        if prefill.own - prefill.harm < SURE:
            # A busy pool's prompts may be computed where there is time for them, among decodes.
            among = search_near(
                request.adapter,
                by_batch,
                lambda instance: self._prefill_among(request, instance, output, cached, usual, now_s),
                decode.own,
            )
            if among.work_s <= MOST_AMONG_S:
                prefill = best_of([prefill, among], decode.own)
            if prefill.instance.info.role is Role.DECODE:
                # Then it stays there, unless that costs more than moving its KV.
                here = self._decode(request, prefill.instance, output, usual, NONE)
                if here.fits and here.kept(prefill.own) >= decode.kept(prefill.own) - INDIFFERENT:
                    decode = here
        if link_between(prefill.instance, decode.instance) == NETWORK:
            far = (
                self._from_afar(request, prefill),
                self._decode(request, decode.instance, output, usual, NETWORK),
            )
            # Computed among decodes, as there was no time for it elsewhere, it does not go on beside, where
            # it is fuller, as long as the way costs nothing.
            costs = kept_by(*far) < kept_by(prefill, decode) - INDIFFERENT
            if costs or prefill.instance.info.role is Role.PREFILL:
                soonest = chain([prefill.instance], (one for one in by_ttft if one is not prefill.instance))
                prefill, decode = best_pair(
                    far,
                    decode,
                    ((one, view.beside(one, Role.DECODE)) for one in soonest),
                    lambda instance: prefill if instance is prefill.instance else weigh_prefill(instance),
                    lambda instance: self._decode(request, instance, output, usual, NODE),
                    output,
                )
        return self._decision(request, prefill, decode, output)

    def _by_ttft(
        self,
        request: ServeRequest,
        pool: Sequence[InstanceView],
        cached: Mapping[str, int],
        now_s: float,
    ) -> Sequence[InstanceView]:
        deadline_s, prompt = now_s + request.slo.ttft_s, len(request.prompt_token_ids)
        uncached_s, _ = self._predictor.prefill_s(Role.PREFILL, prompt)

        def ttft_s(instance: InstanceView) -> float:
            alone_s = uncached_s
            if cached and (found := cached.get(instance.instance_id)) is not None:
                alone_s, _ = self._predictor.prefill_s(Role.PREFILL, prompt, found)
            if request.adapter:
                alone_s += self._load_s(request, instance)
                wait_s = _queue_s(request, instance, deadline_s, now_s)
            else:
                # As `_queue_s`, for every instance of the pool.
                queue = instance.prompts
                wait_s = queue.wait_s(deadline_s, now_s) if queue.work_s else 0.0
            return wait_s + alone_s * instance.prefill_pace.factor

        # A pool is in the order of the spec, and a sort keeps the order of equals.
        return sorted(pool, key=ttft_s)

    def _decision(self, request: ServeRequest, prefill: Choice, decode: Choice, output: int) -> Decision:
        names = prefill.instance.instance_id, decode.instance.instance_id
        # Who wants one token decodes nowhere.
        odds = prefill.own * (decode.own if request.max_tokens > 1 else 1.0)
        return Decision(
            prefill=names[0],
            decode=names[1],
            link=link_between(prefill.instance, decode.instance),
            reason=f"TTFT {prefill.seconds * 1e3:.0f} ms on {names[0]}, TPOT {decode.seconds * 1e3:.1f} ms "
            f"on {names[1]}: {odds:.0%} to keep its SLO, {prefill.harm + decode.harm:.2f} others lost",
            candidates=((names[0], prefill.own), (names[1], decode.own)),
            predicted=Prediction(
                queue_s=prefill.queue_s,
                work_s=prefill.work_s,
                ttft_s=prefill.seconds,
                tpot_s=decode.seconds,
                iteration_s=decode.raw_s,
                output_tokens=output,
                chance=odds,
                cached_tokens=prefill.cached,
                # A sum over the pool: its last digits depend on the order in which prompts came.
                harm=round(prefill.harm + decode.harm, 6),
                load_s=prefill.load_s,
            ),
        )

    def _prompt_s(
        self, request: ServeRequest, instance: InstanceView, cached: Mapping[str, int]
    ) -> tuple[int, float, float, float]:
        """Tokens of its prompt that need no computing there, and seconds of the others, alone and in a queue,
        without the instance's factor; both with the seconds, told last, that loading its adapter takes."""
        found = cached.get(instance.instance_id, 0)
        alone_s, work_s = self._predictor.prefill_s(instance.info.role, len(request.prompt_token_ids), found)
        load_s = self._load_s(request, instance)
        return found, alone_s + load_s, work_s + load_s, load_s

    def _load_s(self, request: ServeRequest, instance: InstanceView) -> float:
        """Until its adapter is there. vLLM loads between two iterations: all that run there wait too."""
        if not request.adapter or instance.adapters.is_loaded(request.adapter):
            return 0.0
        return self._predictor.load_s

    def _prefill(
        self,
        request: ServeRequest,
        instance: InstanceView,
        cached: Mapping[str, int],
        usual: _Usual,
        now_s: float,
    ) -> Choice:
        """On an instance that computes prompts only."""
        pace, bound_s, queue = instance.prefill_pace, request.slo.ttft_s, instance.prompts
        found, alone_s, work_s, load_s = self._prompt_s(request, instance, cached)
        more_s = work_s * pace.factor
        deadline_s = now_s + bound_s
        queue_s = _queue_s(request, instance, deadline_s, now_s)
        late_s = pace.late_s if queue_s else 0.0
        seconds = queue_s + alone_s * pace.factor + late_s
        spread = pace.spread(seconds, queue_s)
        harm = 0.0
        for prompt, end_s in queue.behind(deadline_s, now_s):
            harm += _less(prompt.deadline_s - now_s, end_s - now_s + late_s, more_s, spread)
        # And those that will come while it waits, or is computed.
        common = tuple(
            count
            * _less(other_s, queue.wait_s(now_s + other_s, now_s) + usual.work_s + late_s, more_s, spread)
            if bound_s <= other_s or not queue.by_deadline
            else 0.0
            for other_s, count in usual.ttft
        )
        own = chance(bound_s, seconds, spread)
        return Choice(
            instance, own, harm + sum(common), seconds, 0.0, queue_s, work_s, found, True, common, load_s
        )

    def _from_afar(self, request: ServeRequest, choice: Choice) -> Choice:
        """Where no token comes from the prefill instance, the first one waits for the hand-over."""
        if request.handoff is Handoff.TOKENS:
            return choice
        seconds = choice.seconds + self._predictor.delay_s(NETWORK, len(request.prompt_token_ids), 0.0)
        spread = choice.instance.prefill_pace.spread(seconds, choice.queue_s)
        return choice._replace(seconds=seconds, own=chance(request.slo.ttft_s, seconds, spread))

    def _prefill_among(
        self,
        request: ServeRequest,
        instance: InstanceView,
        output: int,
        cached: Mapping[str, int],
        usual: _Usual,
        now_s: float,
    ) -> Choice:
        """On an instance that decodes: every decode waits for the prompt once."""
        pace = instance.prefill_pace
        found, alone_s, work_s, load_s = self._prompt_s(request, instance, cached)
        batch_s = self._predictor.batch_s(instance)
        queue_s = _queue_s(request, instance, now_s + request.slo.ttft_s, now_s) + batch_s / 2
        queue_s += _slot_wait_s(request, instance, output, batch_s)
        seconds = queue_s + (alone_s + batch_s) * pace.factor + pace.late_s
        own = chance(request.slo.ttft_s, seconds, pace.spread(seconds, queue_s))
        if not batch_s:  # the usual ones would find an iteration with themselves in it
            batch_s = self._predictor.iteration_s(instance, 1, len(request.prompt_token_ids) + output // 2)
        before_s = self._tpot_s(instance, output, batch_s)
        after_s = self._tpot_s(instance, output, batch_s, work_s)
        harm, common = _lost(instance, usual.tpot, before_s, after_s)
        fits = instance.has_room(len(request.prompt_token_ids), KV_SHARE)
        return Choice(instance, own, harm, seconds, 0.0, queue_s, work_s, found, fits, common, load_s)

    def _decode(
        self, request: ServeRequest, instance: InstanceView, output: int, usual: _Usual, link: str
    ) -> Choice:
        # The inner loop of a decision: sixteen of them among 32 instances.
        pace, slo_s = instance.decode_pace, request.slo.tpot_s
        prompt = len(request.prompt_token_ids)
        raw_s = self._predictor.iteration_s(instance, 1, prompt + output // 2)
        load_s = self._load_s(request, instance) if request.adapter else 0.0
        seconds = self._tpot_s(instance, output, raw_s, load_s)
        # On an idle instance the usual ones would find an iteration with themselves in it.
        batch_s = self._predictor.batch_s(instance) or raw_s
        before_s = seconds - (raw_s - batch_s) * pace.factor
        if load_s:
            before_s = self._tpot_s(instance, output, batch_s)
        harm, common = _lost(instance, usual.tpot, before_s, seconds)
        if request.adapter:
            # It alone waits for a slot, and its answer is what both are spread over.
            wait_s = load_s + _slot_wait_s(request, instance, output, before_s)
            seconds = self._tpot_s(instance, output, raw_s) + wait_s / max(1, output - 1)
        # Where the first token is prefill's, the second one waits for the hand-over.
        if request.handoff is Handoff.TOKENS:
            delay_s = self._predictor.delay_s(link, prompt, raw_s * pace.factor)
            seconds += delay_s / max(1, output - 1)
        own = chance(slo_s, seconds, pace.spread)
        fits = instance.has_room(prompt + output, KV_SHARE)
        return Choice(instance, own, harm, seconds, raw_s, 0.0, 0.0, 0, fits, common, load_s)

    def _by_batch(self, instance: InstanceView) -> float:
        batch_s = instance.decodes.iteration_s
        if batch_s is None:
            batch_s = self._predictor.batch_s(instance)
        return batch_s * instance.decode_pace.rounded + TIE_S * len(instance.decodes)

    @staticmethod
    def _tpot_s(instance: InstanceView, output: int, iteration_s: float, work_s: float = 0.0) -> float:
        """With the prompts that are computed in between, spread over an answer."""
        prompts_s = instance.prompts.work_s + work_s
        if not prompts_s:
            return iteration_s * instance.decode_pace.factor
        return iteration_s * instance.decode_pace.factor + prompts_s / instance.decodes.usual_output(output)


def _usual(view: View, prefills: int, decode_pool: Sequence[InstanceView]) -> _Usual:
    share = STAY / len(decode_pool)
    tpot = tuple(
        (bound_s, share * count, min([one.decodes.bounds.get(bound_s, 0) for one in decode_pool]))
        for bound_s, count in view.bounds(Role.DECODE).items()
    )
    pending = view.pending(Role.PREFILL)
    if not pending.bounds:
        return _Usual(tpot)
    ttft = tuple((bound_s, count / prefills) for bound_s, count in pending.bounds.items())
    return _Usual(tpot, ttft, pending.work_s / sum(pending.bounds.values()))


def _queue_s(request: ServeRequest, instance: InstanceView, deadline_s: float, now_s: float) -> float:
    """Until its prompt could begin; one whose adapter finds no slot goes behind all that have one."""
    if request.adapter and not instance.adapters.can_run(request.adapter):
        deadline_s = math.inf
    return instance.prompts.wait_s(deadline_s, now_s)


def _slot_wait_s(request: ServeRequest, instance: InstanceView, output: int, token_s: float) -> float:
    """Until the decodes of some other adapter have ended, where those have all slots."""
    if not request.adapter:
        return 0.0
    return instance.adapters.wait_answers(request.adapter) * instance.decodes.usual_output(output) * token_s


def _lost(
    instance: InstanceView, usual: Sequence[tuple[float, float, int]], before_s: float, after_s: float
) -> tuple[float, tuple[float, ...]]:
    """Requests that slower iterations lose, of those that are there and the usual ones; and by bound, what
    they would lose of the usual ones and the fewest that are anywhere."""
    batch, spread = instance.decodes, instance.decode_pace.spread
    bounds = batch.bounds
    lost = 0.0
    common = []
    for bound_s, count, least in usual:
        less = 0.0
        # Far on either side of a bound nothing changes.
        if CLEAR * bound_s < after_s and before_s < bound_s / CLEAR:
            less = batch.chance(bound_s, before_s, spread) - chance(bound_s, after_s, spread)
            lost += less * (count + bounds.get(bound_s, 0))
        common.append(less * (count + least))
    return lost, tuple(common)


def _less(bound_s: float, before_s: float, more_s: float, spread: float) -> float:
    """How much chance to keep a bound something loses that takes `more_s` longer than `before_s`."""
    after_s = before_s + more_s
    if after_s < CLEAR * bound_s or before_s * CLEAR > bound_s:
        return 0.0
    return chance(bound_s, before_s, spread) - chance(bound_s, after_s, spread)
