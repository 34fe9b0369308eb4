"""Policies of others that follow prefixes, each as its source describes it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

from cluster.instance import Role
from cluster.request import ServeRequest
from router.policy import Decision, farness, pair, pool_of
from router.predictor import Prediction, Predictor
from router.view import InstanceView, View

# AIBrix's prefix-cache policy: beyond this difference in requests it balances; otherwise an instance may have
# so many standard deviations more than the mean.
UNBALANCED_REQUESTS, MOST_DEVIATIONS = 16, 2.0


class PrefixAffinity:
    """AIBrix's `prefix-cache` (github.com/vllm-project/aibrix): the longest match that is not overloaded, or
    the fewest requests where they are out of balance. Decode: the fewest requests. A request for an adapter
    goes where it is loaded, if that is anywhere: AIBrix registers an adapter with some pods and routes to
    those."""

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        prefill_pool, decode_pool = (_with_adapter(pool_of(view, role), request) for role in Role)
        cached = view.cached(request)
        running = [instance.outstanding_requests for instance in prefill_pool]
        if max(running) - min(running) > UNBALANCED_REQUESTS:
            prefill = min(prefill_pool, key=_by_requests)
        else:
            most = fmean(running) + MOST_DEVIATIONS * pstdev(running)
            able = [instance for instance in prefill_pool if instance.outstanding_requests <= most]
            prefill = min(able, key=lambda v: (-cached.get(v.instance_id, 0), *_by_requests(v)))
        reason = f"{cached.get(prefill.instance_id, 0)} tokens cached there"
        return pair(prefill, min(decode_pool, key=_by_requests), reason)


class DynamoKv:
    """NVIDIA Dynamo's KV router (docs.nvidia.com/dynamo, router design): least prefill blocks, those that are
    cached left out, plus active decode blocks; in a split cluster the first counts for prefill, and the
    second, without the overlap, for decode. Temperature 0; of equals the one where the adapter is."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        prefill_pool, decode_pool = (pool_of(view, role) for role in Role)
        found = view.cached(request)
        prompt = len(request.prompt_token_ids)

        def to_prefill(instance: InstanceView) -> int:
            return instance.prompts.tokens + prompt - found.get(instance.instance_id, 0)

        prefill = min(prefill_pool, key=lambda v: (to_prefill(v), farness(v, request), v.info.engine_index))
        decode = min(decode_pool, key=lambda v: _by_context(v, request))
        cached = found.get(prefill.instance_id, 0)
        counted = Prediction.counted(self._predictor.output_tokens(request), cached)
        return pair(prefill, decode, f"{to_prefill(prefill)} tokens to prefill there", counted)


def _by_context(instance: InstanceView, request: ServeRequest) -> tuple[int, float, int]:
    return instance.decodes.context_tokens, farness(instance, request), instance.info.engine_index


def _with_adapter(pool: Sequence[InstanceView], request: ServeRequest) -> Sequence[InstanceView]:
    if not request.adapter:
        return pool
    return [instance for instance in pool if instance.adapters.is_loaded(request.adapter)] or pool


def _by_requests(instance: InstanceView) -> tuple[int, int]:
    return instance.outstanding_requests, instance.info.engine_index
