"""What was decided for the last requests, why, and what came of it: kept for a while, to be asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from cluster.request import ServeRequest, Timeline
from router.links import NETWORK, NODE
from router.policy import Decision

# Some hundred bytes each. A busy ingress is asked about what happened minutes ago, not yesterday.
MOST_REQUESTS = 20_000


class Choice(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One decision; times in seconds, chances from 0 to 1.

    Attributes:
        after_s: since the request came.
        link: the way that its KV takes: `node`, `network`, or empty for both phases on one instance.
        scores: what the policy weighed, by instance.
    """

    after_s: float
    prefill: str
    decode: str
    link: str
    reason: str
    scores: dict[str, float] = {}
    queue_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    chance: float | None = None
    cached_tokens: int = 0
    output_tokens: int | None = None


class Moved(msgspec.Struct, kw_only=True):
    """It was told to go on at another decode instance; seconds since it came, and why."""

    after_s: float
    source: str
    target: str
    cause: str


class Outcome(msgspec.Struct, kw_only=True):
    """How a request ended.

    Attributes:
        ended: `ok`, `cancelled`, or the reason of its error.
        kept: whether it kept its SLO; None for one without bounds, or that its client ended.
    """

    ended: str
    output_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    total_s: float
    kept: bool | None


class Explanation(msgspec.Struct, kw_only=True):
    """All that is known of a request; a second choice is one after a failure.

    Attributes:
        request: id in the router.
        external: the id that its client knows.
        ttft_bound_s, tpot_bound_s: its SLO; None for no bound.
    """

    request: str
    external: str | None
    prompt_tokens: int
    max_tokens: int
    slo_class: str
    tenant: str
    ttft_bound_s: float | None
    tpot_bound_s: float | None
    choices: list[Choice]
    moves: list[Moved] = []
    outcome: Outcome | None = None


class Decisions:
    """The explanations of the last requests."""

    def __init__(
        self,
        external_id: Callable[[str], str | None] = lambda request_id: None,
        most: int = MOST_REQUESTS,
    ) -> None:
        """
        Args:
            external_id: the id under which clients know a request.
            most: the oldest are forgotten beyond so many.
        """
        self._external_id = external_id
        self._most = most
        self._known: dict[str, tuple[Explanation, float]] = {}
        self._by_external: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._known)

    def decided(self, request: ServeRequest, decision: Decision, now_s: float) -> None:
        """A decision was made."""
        known = self._known.get(request.request_id)
        if known is None:
            known = self._begin(request), now_s
            self._known[request.request_id] = known
            if len(self._known) > self._most:
                self._forget_oldest()
        explanation, since_s = known
        explanation.choices.append(_choice(decision, now_s - since_s))

    def moved(self, request_id: str, source: str, target: str, cause: str, now_s: float) -> None:
        """A running request shall go on elsewhere."""
        if (known := self._known.get(request_id)) is not None:
            explanation, since_s = known
            explanation.moves.append(
                Moved(after_s=now_s - since_s, source=source, target=target, cause=cause)
            )

    def ended(self, request: ServeRequest, timeline: Timeline, output_tokens: int, ended: str) -> None:
        """A request is over, when its timeline says; one of which nothing was decided is not known."""
        known = self._known.get(request.request_id)
        if known is None:
            return
        ttft_s, tpot_s = timeline.ttft_s(), timeline.tpot_s(output_tokens)
        slo = request.slo
        kept: bool | None = None
        if min(slo.ttft_s, slo.tpot_s) < math.inf and ended != "cancelled":
            kept = ended == "ok" and slo.is_kept(ttft_s, tpot_s)
        known[0].outcome = Outcome(
            ended=ended,
            output_tokens=output_tokens,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            total_s=(timeline.done_s or timeline.arrived_s) - timeline.arrived_s,
            kept=kept,
        )

    def find(self, name: str) -> Explanation | None:
        """By the router's id, by the one that the API answered with, or by the client's `x-request-id`."""
        name = self._by_external.get(name, name)
        known = self._known.get(name)
        return known[0] if known is not None else None

    def _begin(self, request: ServeRequest) -> Explanation:
        external = self._external_id(request.request_id)
        for name in _names(external):
            self._by_external[name] = request.request_id
        slo = request.slo
        return Explanation(
            request=request.request_id,
            external=external,
            prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.max_tokens,
            slo_class=request.slo_class,
            tenant=request.tenant,
            ttft_bound_s=_bound(slo.ttft_s),
            tpot_bound_s=_bound(slo.tpot_s),
            choices=[],
        )

    def _forget_oldest(self) -> None:
        request_id = next(iter(self._known))
        explanation, _ = self._known.pop(request_id)
        for name in _names(explanation.external):
            if self._by_external.get(name) == request_id:
                del self._by_external[name]


def _names(external: str | None) -> list[str]:
    """What a client may call a request that vLLM's API names `cmpl-<x-request-id>-<number of the prompt>`."""
    if external is None:
        return []
    names = [external]
    for kind in ("cmpl-", "chatcmpl-", "resp_"):
        if external.startswith(kind):
            bare = external.removeprefix(kind)
            names += [bare]
            if kind == "cmpl-":
                names += [external.rpartition("-")[0], bare.rpartition("-")[0]]
    return [name for name in names if name]


def _choice(decision: Decision, after_s: float) -> Choice:
    predicted = decision.predicted
    choice = Choice(
        after_s=after_s,
        prefill=decision.prefill,
        decode=decision.decode,
        link=decision.link,
        reason=decision.reason,
        scores=dict(decision.candidates),
    )
    if predicted is not None:
        choice.cached_tokens = predicted.cached_tokens
        choice.output_tokens = predicted.output_tokens
        if predicted.ttft_s:  # a policy that counts tokens says nothing of times
            choice.queue_s, choice.chance = predicted.queue_s, predicted.chance
            choice.ttft_s, choice.tpot_s = predicted.ttft_s, predicted.tpot_s
    return choice


def _bound(seconds: float) -> float | None:
    return None if seconds == math.inf else seconds


_WAYS = {NODE: " on its node", NETWORK: " over the network"}


def explanation_text(found: dict[str, Any]) -> str:
    """An explanation, as JSON has it, in a few lines for people."""
    bounds = [
        f"{what} {found[key] * 1e3:g} ms"
        for what, key in (("TTFT", "ttft_bound_s"), ("TPOT", "tpot_bound_s"))
        if found[key] is not None
    ]
    lines = [
        f"request {found['external'] or found['request']}: {found['prompt_tokens']} prompt tokens, "
        f"at most {found['max_tokens']} of output; SLO {', '.join(bounds) or 'none'}"
        + (f" (class {found['slo_class']})" if found["slo_class"] else "")
    ]
    for number, choice in enumerate(found["choices"], 1):
        again = f"attempt {number}, after {choice['after_s']:.2f} s: " if number > 1 else ""
        same = choice["prefill"] == choice["decode"]
        where = f"{choice['prefill']} for both phases" if same else f"{choice['prefill']}, {choice['decode']}"
        where += _WAYS.get(choice["link"], "")
        lines.append(f"  {again}{where}: {choice['reason']}")
        if choice.get("cached_tokens"):
            lines.append(f"  {choice['cached_tokens']} tokens of its prompt were cached there")
        if choice.get("scores"):
            scores = ", ".join(f"{name} {score:.4g}" for name, score in choice["scores"].items())
            lines.append(f"  weighed: {scores}")
    for move in found.get("moves", ()):
        where = f"from {move['source']} to {move['target']}"
        lines.append(f"  after {move['after_s']:.2f} s: goes on {where} ({move['cause']})")
    lines.append(f"  {_outcome_text(found)}")
    return "\n".join(lines)


def _outcome_text(found: dict[str, Any]) -> str:
    outcome = found["outcome"]
    if outcome is None:
        return "under way"
    parts = [f"ended {outcome['ended']} after {outcome['total_s']:.3f} s, {outcome['output_tokens']} tokens"]
    expected = found["choices"][-1]
    for what, key, scale in (("TTFT", "ttft_s", 1e3), ("TPOT", "tpot_s", 1e3)):
        if outcome[key] is not None:
            predicted = expected.get(key)
            beside = "" if predicted is None else f" ({predicted * scale:.1f} predicted)"
            parts.append(f"{what} {outcome[key] * scale:.1f} ms{beside}")
    if outcome["kept"] is not None:
        parts.append("SLO kept" if outcome["kept"] else "SLO missed")
    return "; ".join(parts)
