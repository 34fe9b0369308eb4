"""Other systems' rules behind the same protocol, as they are published: to compare with, and to use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from cluster.instance import Role
from cluster.request import ServeRequest
from router.policy import Decision, farness, pair, pool_of
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
        return pair(prefill[turn % len(prefill)], decode[turn % len(decode)], f"turn {turn}")


class PowerOfTwo:
    """Of two instances drawn at random, the one with fewer requests: Ray Serve's choice, for each role.

    The draw depends on the request's id alone, so a decision can be had again.
    """

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        rng = Random(request.request_id)
        prefill, decode = (self._of_two(pool_of(view, role), request, rng) for role in Role)
        requests = f"{prefill.outstanding_requests} and {decode.outstanding_requests} requests"
        return pair(prefill, decode, f"fewer of two: {requests}")

    @staticmethod
    def _of_two(pool: Sequence[InstanceView], request: ServeRequest, rng: Random) -> InstanceView:
        drawn = rng.sample(pool, min(2, len(pool)))
        return min(drawn, key=lambda v: (v.outstanding_requests, farness(v, request), v.info.engine_index))


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
        return pair(prefill, decode, reason, Prediction.counted(output))


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
