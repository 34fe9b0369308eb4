"""A claim: what an attempt of a request has reserved, and its part in what the router believes of instances.

Made with the decision, so that the next decision sees it; given back in parts, on every exit.
"""

from __future__ import annotations

from typing import Any

from cluster.adapter_slots import AdapterHold
from cluster.instance import Role
from cluster.request import ServeRequest
from router.fleet import Fleet, L
from router.policy import Decision
from router.predictor import Predictor
from router.view import Hold


class Claim:
    """Room on the instances of a decision."""

    __slots__ = (
        "_adapters",
        "_batch",
        "_coming",
        "_decision",
        "_decode",
        "_fleet",
        "_holds",
        "_name",
        "_predictor",
        "_prefill",
        "_request",
        "_since_s",
        "_tokens",
    )

    def __init__(
        self,
        fleet: Fleet[L],
        request: ServeRequest,
        decision: Decision,
        *,
        lone: str | None,
        tokens: int,
        now_s: float,
        predictor: Predictor | None = None,
    ) -> None:
        """
        Args:
            lone: the instance that serves both phases, where one does.
            tokens: prompt of the attempt.
            predictor: told how long things took.
        """
        self._fleet: Fleet[Any] = fleet
        places = (decision.prefill, decision.decode) if lone is None else (lone,)
        self._holds = [fleet.reservations.hold(instance_id, tokens) for instance_id in places]
        self._coming: list[Hold | AdapterHold] = []
        self._adapters: list[AdapterHold | None] = []
        if request.adapter:
            views = map(fleet.view_of, places)
            self._adapters = [view.adapters.hold(request.adapter) if view else None for view in views]
        self._decision = decision
        self._name = request.request_id
        self._request = request
        self._since_s = now_s
        self._tokens = tokens
        self._predictor = predictor
        self._batch = 0
        self._prefill = self._decode = None
        predicted = decision.predicted
        if predicted is None:
            return
        self._prefill, self._decode = fleet.view_of(places[0]), fleet.view_of(places[-1])
        if self._prefill is not None:
            self._prefill.prompts.add(
                self._name,
                predicted.work_s * self._prefill.prefill_pace.factor,
                now_s + request.slo.ttft_s,
                now_s,
                tokens=tokens - predicted.cached_tokens,
                bound_s=request.slo.ttft_s,
            )
        if self._decode is not None:
            self._decode.decodes.add(self._name, tokens, predicted.output_tokens, request.slo.tpot_s)
            self._batch = len(self._decode.decodes)

    def prefilled(self, now_s: float) -> None:
        """The prompt has its token."""
        if len(self._holds) > 1:
            self._holds[0].release()
            if self._adapters and (adapter := self._adapters[0]) is not None:
                adapter.release()
        self._leave_queue(now_s, is_served=True)

    def decoded(self, tokens: int, seconds: float) -> None:
        """So many tokens after the first of the decode instance came in so many seconds."""
        predicted = self._decision.predicted
        if self._decode is None or predicted is None or tokens <= 0:
            return
        self._decode.decode_pace.learn(predicted.iteration_s, seconds / tokens)
        if self._predictor is not None:
            # Others came and went while it decoded: halfway between its first and its last batch.
            requests = (self._batch + len(self._decode.decodes) + 1) // 2
            self._predictor.decoded(self._decode.info.role, requests, seconds / tokens)

    def moving(self, instance_id: str, tokens: int) -> None:
        """It will decode at another instance, where it has room for so many tokens, and its adapter a place,
        from now on."""
        self.stays()
        self._coming = [self._fleet.reservations.hold(instance_id, tokens)]
        view = self._fleet.view_of(instance_id)
        if self._adapters and view is not None:
            self._coming.append(view.adapters.hold(self._request.adapter))

    def moved(self, instance_id: str, tokens: int, generated: int) -> None:
        """It decodes at another instance from now on, with so many tokens, `generated` of them by itself."""
        self._holds[-1].release()
        self.stays()
        self._holds[-1] = self._fleet.reservations.hold(instance_id, tokens)
        view = self._fleet.view_of(instance_id)
        if self._adapters:
            if (adapter := self._adapters[-1]) is not None:
                adapter.release()
            self._adapters[-1] = view.adapters.hold(self._request.adapter) if view else None
        if self._decode is not None:
            self._decode.decodes.remove(self._name)
        predicted = self._decision.predicted
        self._decode = view if predicted is not None else None
        if self._decode is not None and predicted is not None:
            left = max(1, predicted.output_tokens - generated)
            self._decode.decodes.add(self._name, tokens, left, self._request.slo.tpot_s)
            self._batch = len(self._decode.decodes)

    def close(self, now_s: float) -> None:
        """Give back what is left; any number of times."""
        self.stays()
        for hold in self._holds:
            hold.release()
        for adapter in self._adapters:
            if adapter is not None:
                adapter.release()
        self._leave_queue(now_s, is_served=False)
        if self._decode is not None:
            self._decode.decodes.remove(self._name)
            self._decode = None

    def stays(self) -> None:
        """It moves nowhere, or is there."""
        for hold in self._coming:
            hold.release()
        self._coming = []

    def _leave_queue(self, now_s: float, *, is_served: bool) -> None:
        instance, self._prefill = self._prefill, None
        predicted = self._decision.predicted
        if instance is None or predicted is None:
            return
        took_s = instance.prompts.remove(self._name, now_s, is_served=is_served)
        if not is_served or instance.instance_id != self._decision.prefill:
            return
        pace, stage_s = instance.prefill_pace, now_s - self._since_s
        if predicted.load_s:
            # It loaded an adapter, which says how long that takes and nothing of the instance.
            if self._predictor is not None and not predicted.queue_s:
                self._predictor.loaded(stage_s - (predicted.ttft_s - predicted.load_s))
            return
        tokens = self._tokens - predicted.cached_tokens
        done: tuple[int, float] | None = None
        if predicted.queue_s:
            pace.came(predicted.ttft_s, stage_s)
        elif not instance.prompts:
            # Nobody was before it, and nobody came while it was there.
            done = tokens, stage_s
        if instance.info.role is Role.PREFILL and took_s is not None:
            done = pace.worked(predicted.work_s, took_s, tokens) or done
        if done is not None and self._predictor is not None:
            self._predictor.prefilled(instance.info.role, *done)
