"""Other systems' rules behind the same protocol, as they are published: to compare with, and to use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from cluster.instance import Role
from cluster.request import ServeRequest
from router.policy import Decision, pool_of
from router.predictor import Prediction, Predictor
from router.view import InstanceView, View

# Splitwise's simulator: a prompt machine that has this many pending tokens takes no further prompt.
SPLITWISE_PENDING_TOKENS = 8192


class RoundRobin:
    """Each instance of a role in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        prefill, decode = (pool_of(view, role) for role in Role)
        turn, self._turn = self._turn, self._turn + 1
        return _decision(prefill[turn % len(prefill)], decode[turn % len(decode)], f"turn {turn}")


class PowerOfTwo:
    """Of two instances drawn at random, the one with fewer requests: Ray Serve's choice, for each role.

    The draw depends on the request's id alone, so a decision can be had again.
    """

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        rng = Random(request.request_id)
        prefill, decode = (self._of_two(pool_of(view, role), rng) for role in Role)
        requests = f"{prefill.outstanding_requests} and {decode.outstanding_requests} requests"
        return _decision(prefill, decode, f"fewer of two: {requests}")

    @staticmethod
    def _of_two(pool: Sequence[InstanceView], rng: Random) -> InstanceView:
        drawn = rng.sample(pool, min(2, len(pool)))
        return min(drawn, key=lambda v: (v.outstanding_requests, v.info.engine_index))


class SplitwiseJsq:
    """Splitwise's cluster scheduler (ISCA'24, and its simulator): the shortest queues in tokens, for both
    phases at once.

    A pool that is full borrows the least loaded machine of the other one, which is mixed until it has nothing
    foreign left, and is taken before further ones; when nothing fits, one machine serves both phases.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        prompt = len(request.prompt_token_ids)
        output = self._predictor.output_tokens(request)
        prefill_pool, decode_pool = (pool_of(view, role) for role in Role)

        def takes_prompt(instance: InstanceView) -> bool:
            pending = instance.prompts.tokens
            return not pending or pending + prompt <= SPLITWISE_PENDING_TOKENS

        def takes_tokens(instance: InstanceView) -> bool:
            return instance.has_room(prompt + output)

        mixed = [v for v in decode_pool if len(v.prompts)]
        prefill = _least((prefill_pool, mixed, decode_pool), takes_prompt, _pending)
        mixed = [v for v in prefill_pool if len(v.decodes)]
        decode = _least((decode_pool, mixed, prefill_pool), takes_tokens, _memory)
        reason = "the shortest queues"
        if prefill is None or decode is None:
            prefill = decode = min((*prefill_pool, *decode_pool), key=_pending)
            reason = "nothing fits: both phases on the shortest queue"
        return _decision(prefill, decode, reason, _counted(output))


class Mooncake:
    """Mooncake's algorithm 1 (FAST'25): the prefill instance with the lowest predicted TTFT, the decode
    instance with the lowest predicted time between tokens that has room. Its rejection is the admission's."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        predictor = self._predictor
        prompt, output = len(request.prompt_token_ids), predictor.output_tokens(request)
        alone_s, work_s = predictor.prefill_s(Role.PREFILL, prompt)
        prefill_pool, decode_pool = (pool_of(view, role) for role in Role)

        deadline_s, context = now_s + request.slo.ttft_s, prompt + output // 2

        def ttft_s(instance: InstanceView) -> float:
            return instance.prompts.wait_s(deadline_s, now_s) + alone_s * instance.prefill_pace.factor

        def tbt_s(instance: InstanceView) -> float:
            return predictor.iteration_s(instance, 1, context) * instance.decode_pace.factor

        roomy = [v for v in decode_pool if v.has_room(prompt + output)] or decode_pool
        prefill = min(prefill_pool, key=lambda v: (ttft_s(v), v.info.engine_index))
        decode = min(roomy, key=lambda v: (tbt_s(v), v.info.engine_index))
        least_ttft_s, least_tbt_s = ttft_s(prefill), tbt_s(decode)
        in_time = least_tbt_s <= request.slo.tpot_s or request.max_tokens == 1
        predicted = Prediction(
            queue_s=prefill.prompts.wait_s(deadline_s, now_s),
            work_s=work_s * prefill.prefill_pace.factor,
            ttft_s=least_ttft_s,
            tpot_s=least_tbt_s,
            stage_s=least_ttft_s / prefill.prefill_pace.factor,
            iteration_s=predictor.iteration_s(decode, 1, context),
            output_tokens=output,
            chance=float(least_ttft_s <= request.slo.ttft_s and in_time),
        )
        reason = f"TTFT {predicted.ttft_s * 1e3:.0f} ms, {predicted.tpot_s * 1e3:.1f} ms between tokens"
        return _decision(prefill, decode, reason, predicted)


def _least(
    pools: Sequence[Sequence[InstanceView]],
    takes: Callable[[InstanceView], bool],
    key: Callable[[InstanceView], tuple[int, int]],
) -> InstanceView | None:
    """The least of the first pool that has one."""
    for pool in pools:
        if fitting := [instance for instance in pool if takes(instance)]:
            return min(fitting, key=key)
    return None


def _pending(instance: InstanceView) -> tuple[int, int]:
    return instance.prompts.tokens, instance.info.engine_index


def _memory(instance: InstanceView) -> tuple[int, int]:
    return instance.decodes.peak_tokens, instance.info.engine_index


def _counted(output_tokens: int) -> Prediction:
    """Of a policy that counts tokens and predicts no times."""
    return Prediction(
        queue_s=0.0,
        work_s=0.0,
        ttft_s=0.0,
        tpot_s=0.0,
        stage_s=0.0,
        iteration_s=0.0,
        output_tokens=output_tokens,
        chance=1.0,
    )


def _decision(
    prefill: InstanceView, decode: InstanceView, reason: str, predicted: Prediction | None = None
) -> Decision:
    return Decision(
        prefill=prefill.instance_id,
        decode=decode.instance_id,
        link="nixl",
        reason=f"{reason}: {prefill.instance_id}, {decode.instance_id}",
        predicted=predicted,
    )
