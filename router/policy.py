"""Policies: which prefill instance, which decode instance, which link. A new policy is one class, one line
in `POLICIES`, one test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from cluster.errors import NoInstance
from cluster.instance import Role
from cluster.request import ServeRequest
from router.links import NONE, link_between
from router.predictor import Prediction
from router.view import InstanceView, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where a request goes.

    Attributes:
        prefill, decode: instance ids; equal when one instance serves both phases.
        link: the way that its KV takes (`router.links`): empty, `node` or `network`.
        reason: one line for people.
        candidates: what was weighed, best first, as (instance id, score).
        predicted: what is expected of it, by policies that predict.
    """

    prefill: str
    decode: str
    link: str
    reason: str
    candidates: tuple[tuple[str, float], ...] = ()
    predicted: Prediction | None = None


class Policy(Protocol):
    """Decides; never acts, never asks the time."""

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        """Choose instances for a request. Raises NoInstance when a role has none."""
        ...


class LeastTokens:
    """For each role the instance with the fewest outstanding tokens; of equals the one where the request's
    adapter is, then by the order of the spec."""

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        prefill = _least(view, Role.PREFILL, request)
        decode = _least(view, Role.DECODE, request)
        return Decision(
            prefill=prefill.instance_id,
            decode=decode.instance_id,
            link=link_between(prefill, decode),
            reason=f"fewest outstanding tokens: {prefill.outstanding_tokens} on {prefill.instance_id}, "
            f"{decode.outstanding_tokens} on {decode.instance_id}",
            candidates=tuple((v.instance_id, float(v.outstanding_tokens)) for v in (prefill, decode)),
        )


class Unsplit:
    """Both phases on one instance of any role: the baseline that the split is compared with."""

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        first = [best for role in Role if (best := _first(view, role, request)) is not None]
        if not first:
            raise NoInstance(role=Role.PREFILL.value)
        best = min(first, key=lambda v: (v.outstanding_tokens, farness(v, request), v.info.engine_index))
        return Decision(
            prefill=best.instance_id,
            decode=best.instance_id,
            link=NONE,
            reason=f"fewest outstanding tokens: {best.outstanding_tokens} on {best.instance_id}",
            candidates=((best.instance_id, float(best.outstanding_tokens)),),
        )


def pool_of(view: View, role: Role) -> Sequence[InstanceView]:
    """All instances of a role. Raises NoInstance when there is none."""
    pool = view.of(role)
    if not pool:
        raise NoInstance(role=role.value)
    return pool


def pair(
    prefill: InstanceView, decode: InstanceView, reason: str, predicted: Prediction | None = None
) -> Decision:
    """The decision for two instances."""
    return Decision(
        prefill=prefill.instance_id,
        decode=decode.instance_id,
        link=link_between(prefill, decode),
        reason=f"{reason}: {prefill.instance_id}, {decode.instance_id}",
        predicted=predicted,
    )


def farness(instance: InstanceView, request: ServeRequest) -> float:
    """How far the request's adapter is from running there: the lower the nearer; 0 for all without one."""
    return -instance.adapters.affinity(request.adapter) if request.adapter else 0.0


def _first(view: View, role: Role, request: ServeRequest) -> InstanceView | None:
    """Of those with the fewest tokens the nearest to its adapter."""
    order = view.by_tokens(role)
    first = next(order, None)
    if first is None or not request.adapter:
        return first
    equals = takewhile(lambda v: v.outstanding_tokens == first.outstanding_tokens, order)
    return min([first, *equals], key=lambda v: farness(v, request))


def _least(view: View, role: Role, request: ServeRequest) -> InstanceView:
    instance = _first(view, role, request)
    if instance is None:
        raise NoInstance(role=role.value)
    return instance
