"""Instances weighed for one phase of a request, and the search for the best: not all have to be looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from router.view import InstanceView

# Differences of expected requests that mean nothing: then the one that is done soonest is taken.
INDIFFERENT = 0.005
# What others lose is not known better than that.
HARM_ERROR = 0.1
# Instances that are looked at for that; with twice as many, twice the difference is enough to stop.
PATIENCE = 4
# Who has less than that where it is best is not looked for a better place: it will be rejected.
HOPELESS = 0.05


class Choice(NamedTuple):
    """An instance for one phase.

    Attributes:
        own: this request's chance to keep its bound there.
        harm: others' expected loss, in requests.
        seconds: predicted TTFT, or TPOT.
        raw_s: TPOT without the instance's factor.
        queue_s: until its prompt is begun.
        work_s: what it adds to the queue, without the instance's factor.
        cached: tokens of it that need no computing.
        fits: whether its KV has room there.
        common: of the harm, what every instance of that load would have, by bound.
        load_s: of `seconds`, for loading its adapter.
    """

    instance: InstanceView
    own: float
    harm: float
    seconds: float
    raw_s: float
    queue_s: float = 0.0
    work_s: float = 0.0
    cached: int = 0
    fits: bool = True
    common: tuple[float, ...] = ()
    load_s: float = 0.0

    def kept(self, weight: float) -> float:
        """Expected requests that keep their SLO more than without it, for a request that keeps the other
        bound with the chance `weight`."""
        return self.own * weight - self.harm


def search_near(
    adapter: str, ordered: Sequence[InstanceView], weigh: Callable[[InstanceView], Choice], weight: float
) -> Choice:
    """As `search`, among instances that are as near to the adapter: of those the load alone is the order."""
    if not adapter:
        return search(ordered, weigh, weight)
    near: dict[tuple[float, bool], list[InstanceView]] = {}
    for instance in ordered:
        adapters = instance.adapters
        near.setdefault((adapters.affinity(adapter), adapters.is_loaded(adapter)), []).append(instance)
    return best_of([search(group, weigh, weight) for group in near.values()], weight)


def search(ordered: Sequence[InstanceView], weigh: Callable[[InstanceView], Choice], weight: float) -> Choice:
    """The best of instances in the order of their load, without a look at those that can't be better.

    This request's chance falls with the load. What it costs the usual ones of a bound rises with the load and
    falls again, so of those between two instances it is no less than at the one or the other. Both bound what
    is left, as it is looked for from both ends.
    """
    low, high = 0, len(ordered)
    choices: list[Choice] = []
    lightest = heaviest = None
    most = -math.inf
    while low < high:
        if len(choices) % 2:
            high -= 1
            heaviest = choice = weigh(ordered[high])
        else:
            lightest = choice = weigh(ordered[low])
            low += 1
        choices.append(choice)
        if choice.fits and (kept := choice.own * weight - choice.harm) > most:
            most = kept
        if most == -math.inf:
            continue  # nobody with room yet, however little of its chance is left
        assert lightest is not None
        bound = lightest.own * weight
        if bound < HOPELESS and lightest.fits:
            break
        if heaviest is not None:
            bound -= sum(map(min, lightest.common, heaviest.common))
        # The longer it is looked for, the less a better one is worth the search.
        seen = len(choices)
        slack = INDIFFERENT * (seen / PATIENCE if seen > PATIENCE else 1.0)
        if most < weight:
            slack += HARM_ERROR * (weight - most)
        if most >= bound - slack:
            break
    return best_of(choices, weight)


def best_of(choices: Sequence[Choice], weight: float) -> Choice:
    """The one with most expected requests kept; of those that are as good, the soonest."""
    fitting = [choice for choice in choices if choice.fits] or choices
    most = max(choice.kept(weight) for choice in fitting)
    good = [choice for choice in fitting if choice.kept(weight) >= most - INDIFFERENT]
    return min(good, key=lambda c: (c.seconds, c.instance.info.engine_index))


def best_pair(
    far: tuple[Choice, Choice],
    nearest: Choice,
    nodes: Iterable[tuple[InstanceView, Sequence[InstanceView]]],
    weigh_prefill: Callable[[InstanceView], Choice],
    weigh_decode: Callable[[InstanceView], Choice],
    output: int,
) -> tuple[Choice, Choice]:
    """The best pair, with what the way between its two instances takes.

    Args:
        far: the best of each phase, which are on different nodes, with what that takes.
        nearest: the latter as if it were near: no pair has a better one.
        nodes: prefill instances, the soonest first, each with the decode instances of its node.
        weigh_decode: of a near one.
        output: expected tokens of the answer.
    """
    pairs = [far]
    reached = kept_by(*far)
    for seen, (instance, beside) in enumerate(nodes):
        first = weigh_prefill(instance)
        if seen:
            # Of the soonest first, a later one's chance is no better; and as `search`, with less patience, as
            # each step weighs all decode instances of a node.
            slack = INDIFFERENT * 2 ** (seen / PATIENCE) + HARM_ERROR * max(0.0, first.own - reached)
            if reached >= first.own * nearest.own - nearest.harm - slack:
                break
        if beside:
            second = best_of([weigh_decode(one) for one in beside], first.own)
            pairs.append((first, second))
            reached = max(reached, kept_by(first, second))
    if len(pairs) == 1:  # nobody is near: what all have to take says nothing of the choice
        return far[0], nearest
    fitting = [one for one in pairs if one[1].fits] or pairs
    most = max(kept_by(*one) for one in fitting)
    good = [one for one in fitting if kept_by(*one) >= most - INDIFFERENT]
    return min(good, key=lambda one: (one[0].seconds + output * one[1].seconds, *_indices(one)))


def kept_by(prefill: Choice, decode: Choice) -> float:
    """Expected requests that keep both bounds more than without it."""
    return prefill.own * decode.own - prefill.harm - decode.harm


def _indices(pair: tuple[Choice, Choice]) -> tuple[int, int]:
    prefill, decode = pair
    return prefill.instance.info.engine_index, decode.instance.info.engine_index
