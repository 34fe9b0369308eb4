"""Which request shall go on at another decode instance (Llumnix, OSDI'24): where one instance misses bounds
that another could keep, or runs out of memory.

A look costs little where nothing is to be done: an instance is looked into only when its iteration is longer
than the tightest bound there, or its memory nearly full. At most one request goes from an instance, and to
one, at a time; the next look sees what came of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.instance import Role
from router.pace import chance
from router.predictor import Predictor
from router.view import InstanceView, View

# Between two looks.
EVERY_S = 0.2
# Expected SLOs that a move must win. A stream stands still for a moment, and predictions err.
LEAST_GAIN = 0.5
# An answer that is expected to end by now goes on for so many tokens more.
LEAST_LEFT = 16
# Shares of memory in use: from where on it is nearly full, and where there is room for others.
NEARLY_FULL, ROOMY = 0.9, 0.8
# Requests of an instance that are weighed, and instances to which they could go.
MOST_WEIGHED, MOST_TARGETS = 6, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Of a request that decodes.

    Attributes:
        context_tokens: in its KV cache.
        tpot_bound_s: infinite for none.
        spent_s: since its first token.
        tokens: after the first so far.
        left: expected from now on.
    """

    request_id: str
    context_tokens: int
    tpot_bound_s: float
    spent_s: float
    tokens: int
    left: int

    def tpot_s(self, iteration_s: float) -> float:
        """At its end, if each token takes so long from now on."""
        return (self.spent_s + self.left * iteration_s) / max(1, self.tokens + self.left)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A request, from where and to where; `cause` is `tpot` or `memory`."""

    request_id: str
    source: str
    target: str
    cause: str


def overloaded(view: View, predictor: Predictor, *, for_tpot: bool = True) -> list[InstanceView]:
    """Decode instances that may have somebody to give away, the slowest first; only for their memory, or
    for their bounds as well."""
    instances = view.of(Role.DECODE)
    if len(instances) < 2:
        return []
    found = [
        one
        for one in instances
        if one.load.kv_usage > NEARLY_FULL
        or (for_tpot and min(one.decodes.bounds, default=math.inf) < iteration_s(one, predictor))
    ]
    return sorted(found, key=lambda one: (-iteration_s(one, predictor), one.info.engine_index))


def iteration_s(instance: InstanceView, predictor: Predictor) -> float:
    """Of its batch as it is."""
    return predictor.batch_s(instance) * instance.decode_pace.factor


def best_move(
    source: InstanceView,
    running: Sequence[Progress],
    view: View,
    predictor: Predictor,
    busy: Iterable[str] = (),
) -> Move | None:
    """The move from an instance that wins most; None where none wins enough.

    Args:
        running: those that decode there and can move.
        busy: instances from or to which one goes already.
    """
    taken = {source.instance_id, *busy}
    others = [one for one in view.of(Role.DECODE) if one.instance_id not in taken]
    others.sort(key=lambda one: (iteration_s(one, predictor), one.info.engine_index))
    targets = others[:MOST_TARGETS]
    if not running or not targets:
        return None
    if source.load.kv_usage > NEARLY_FULL:
        return _for_memory(source, running, targets)
    best: tuple[float, Progress, InstanceView] | None = None
    for one in _weighed(source, running, predictor):
        for target in targets:
            if not target.has_room(one.context_tokens + one.left, ROOMY):
                continue
            gain = _gain(source, target, one, running, predictor)
            if gain >= LEAST_GAIN and (best is None or gain > best[0]):
                best = gain, one, target
    if best is None:
        return None
    _, one, target = best
    return Move(request_id=one.request_id, source=source.instance_id, target=target.instance_id, cause="tpot")


def _for_memory(
    source: InstanceView, running: Sequence[Progress], targets: Sequence[InstanceView]
) -> Move | None:
    """The one that will still take most for what there is to move."""
    for one in sorted(running, key=lambda one: (one.context_tokens / one.left, one.request_id)):
        for target in targets:
            if target.load.kv_usage < ROOMY and target.has_room(one.context_tokens + one.left, ROOMY):
                return Move(
                    request_id=one.request_id,
                    source=source.instance_id,
                    target=target.instance_id,
                    cause="memory",
                )
    return None


def _weighed(source: InstanceView, running: Sequence[Progress], predictor: Predictor) -> list[Progress]:
    """Those that are likely to miss as it is and have most to gain, and those whose leaving helps most."""
    here_s, spread = iteration_s(source, predictor), source.decode_pace.spread
    late = sorted(
        (one for one in running if chance(one.tpot_bound_s, one.tpot_s(here_s), spread) < 0.5),
        key=lambda one: (-one.left, one.request_id),
    )
    large = sorted(running, key=lambda one: (-one.context_tokens, one.request_id))
    half = MOST_WEIGHED // 2
    return list(dict.fromkeys([*late[:half], *large[:half]]))


def _gain(
    source: InstanceView,
    target: InstanceView,
    moved: Progress,
    running: Sequence[Progress],
    predictor: Predictor,
) -> float:
    """SLOs that are expected to be kept more, if it moves."""
    pace, spread = source.decode_pace.factor, source.decode_pace.spread
    before_s = iteration_s(source, predictor)
    after_s = predictor.iteration_s(source, -1, -moved.context_tokens) * pace
    there_s = predictor.iteration_s(target, 1, moved.context_tokens) * target.decode_pace.factor
    if there_s >= before_s:
        return 0.0  # or the next look would send it back
    gain = -chance(moved.tpot_bound_s, moved.tpot_s(before_s), spread)
    gain += chance(moved.tpot_bound_s, moved.tpot_s(there_s), target.decode_pace.spread)
    for one in running:
        if one is not moved and one.tpot_bound_s < math.inf:
            gain += chance(one.tpot_bound_s, one.tpot_s(after_s), spread)
            gain -= chance(one.tpot_bound_s, one.tpot_s(before_s), spread)
    # Of those there the past is not known: what holds for their bounds if they were all at their beginning.
    was_s = iteration_s(target, predictor)
    for bound_s, count in target.decodes.bounds.items():
        lost = chance(bound_s, was_s, target.decode_pace.spread)
        lost -= chance(bound_s, there_s, target.decode_pace.spread)
        gain -= count * max(0.0, lost)
    return gain
