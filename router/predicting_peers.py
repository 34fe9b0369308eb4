"""Policies of others that predict times, each as its source describes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

from cluster.instance import Role
from cluster.request import ServeRequest
from router.policy import Decision, pair, pool_of
from router.predictor import Prediction, Predictor
from router.view import InstanceView, View

# llm-d's draw: the instance with the least room that suffices has so many times the chance of the one with
# the most; and now and then one is tried that is predicted to miss.
MOST_WEIGHT, EXPLORED = 100, 0.01


class Mooncake:
    """Mooncake's Algorithm 1 (FAST'25): the prefill instance with the lowest predicted TTFT, its cached
    prefix left out, and the decode instance with the lowest predicted time between tokens that has room. Its
    rejection is the admission's. Prefixes are not fetched from another instance's cache."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        prefill_pool, decode_pool = (pool_of(view, role) for role in Role)
        times = _Times(self._predictor, request, view, now_s)
        roomy = [v for v in decode_pool if v.has_room(times.prompt + times.output)] or decode_pool
        prefill = min(prefill_pool, key=lambda v: (times.ttft_s(v), v.info.engine_index))
        decode = min(roomy, key=lambda v: (times.tbt_s(v), v.info.engine_index))
        is_kept = times.ttft_s(prefill) <= request.slo.ttft_s and (
            times.tbt_s(decode) <= request.slo.tpot_s or request.max_tokens == 1
        )
        return times.decision(prefill, decode, chance=float(is_kept))


class LlmdScorers:
    """llm-d's predicted-latency scheduling (llm-d.ai, and its origin in the Gateway API inference extension):
    of the instances that are predicted to keep the bound one is drawn, the likelier the less room it has;
    where there is none, the one that misses by least, and requests of low priority are shed. The bound on
    TPOT is the tightest of all that run there."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        prefill_pool, decode_pool = (pool_of(view, role) for role in Role)
        times = _Times(self._predictor, request, view, now_s)
        rng = Random(request.request_id)

        def ttft_room_s(instance: InstanceView) -> float:
            return request.slo.ttft_s - times.ttft_s(instance)

        def tpot_room_s(instance: InstanceView) -> float:
            return min((request.slo.tpot_s, *instance.decodes.bounds)) - times.tbt_s(instance)

        prefill, decode = _drawn(prefill_pool, ttft_room_s, rng), _drawn(decode_pool, tpot_room_s, rng)
        is_kept = ttft_room_s(prefill) > 0 and tpot_room_s(decode) > 0
        return times.decision(prefill, decode, chance=0.0 if request.priority > 0 and not is_kept else 1.0)


class _Times:
    """What is expected of one request on each instance.

    Attributes:
        prompt, output: its tokens.
    """

    def __init__(self, predictor: Predictor, request: ServeRequest, view: View, now_s: float) -> None:
        self._predictor = predictor
        self._cached = view.cached(request)
        self._deadline_s = now_s + request.slo.ttft_s
        self._now_s = now_s
        self.prompt = len(request.prompt_token_ids)
        self.output = predictor.output_tokens(request)

    def ttft_s(self, instance: InstanceView) -> float:
        alone_s, _ = self._prefill_s(instance)
        pace, queue_s = instance.prefill_pace, self._queue_s(instance)
        return queue_s + alone_s * pace.factor + (pace.late_s if queue_s else 0.0)

    def tbt_s(self, instance: InstanceView) -> float:
        return self._iteration_s(instance) * instance.decode_pace.factor

    def decision(self, prefill: InstanceView, decode: InstanceView, *, chance: float) -> Decision:
        """The decision for these two."""
        ttft_s, tbt_s = self.ttft_s(prefill), self.tbt_s(decode)
        predicted = Prediction(
            queue_s=self._queue_s(prefill),
            work_s=self._prefill_s(prefill)[1],
            ttft_s=ttft_s,
            tpot_s=tbt_s,
            iteration_s=self._iteration_s(decode),
            output_tokens=self.output,
            chance=chance,
            cached_tokens=self._cached.get(prefill.instance_id, 0),
        )
        reason = f"TTFT {ttft_s * 1e3:.0f} ms, {tbt_s * 1e3:.1f} ms between tokens"
        return pair(prefill, decode, reason, predicted)

    def _queue_s(self, instance: InstanceView) -> float:
        return instance.prompts.wait_s(self._deadline_s, self._now_s)

    def _prefill_s(self, instance: InstanceView) -> tuple[float, float]:
        cached = self._cached.get(instance.instance_id, 0)
        return self._predictor.prefill_s(Role.PREFILL, self.prompt, cached)

    def _iteration_s(self, instance: InstanceView) -> float:
        return self._predictor.iteration_s(instance, 1, self.prompt + self.output // 2)


def _drawn(
    pool: Sequence[InstanceView], room_s: Callable[[InstanceView], float], rng: Random
) -> InstanceView:
    rooms_s = [(room_s(instance), instance) for instance in pool]
    able = [(room, instance) for room, instance in rooms_s if room > 0]
    rest = [(room, instance) for room, instance in rooms_s if room <= 0]
    if rest and (not able or rng.random() < EXPLORED):
        return max(rest, key=lambda entry: (entry[0], -entry[1].info.engine_index))[1]
    most_s = max(room for room, _ in able)
    if most_s == math.inf:  # without a bound all have the same room
        weights = [1.0] * len(able)
    else:
        weights = [1 + (most_s - room) / most_s * (MOST_WEIGHT - 1) for room, _ in able]
    return rng.choices([instance for _, instance in able], weights)[0]
