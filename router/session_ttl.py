"""How long the KV of a session is worth keeping between two of its turns: Continuum's time to live.

An agent's next turn comes when its tool has answered, with all that was said before it in its prompt. Who
keeps the KV for tau seconds has it for the next turn with the chance P(gap <= tau), and saves what computing
it again would take, and the queue before that. So much is it worth, in seconds:

    tau* = argmax over tau in {0, the gaps there were} of P(gap <= tau) x benefit - tau x share

The share is that of the instance's memory: Continuum's formula has none, as if what is kept stopped the whole
engine. A gap begins when the instance that computed the prompt is done with it. P counts turns that had no
next one, too. Continuum's eta (what the number of turns so far says of those to come) is not used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from cluster.instance import Role
from cluster.length_window import LengthWindow
from cluster.request import ServeRequest
from router.prompt_queue import PromptPool
from router.view import InstanceView, View

# With fewer gaps they say nothing yet (Continuum's K); its default then is 1 to 2 s.
LEAST_GAPS = 100
DEFAULT_S = 1.5
MOST_GAPS = 1000
MOST_SESSIONS = 100_000
# The best times are found anew after so many gaps.
_GAPS_AN_ANSWER = 20
# Turns are counted for so long; then the older half weighs half.
_MOST_TURNS = 4096
# A queue's mean counts the last so many decisions.
_QUEUES = 100


class Turn(NamedTuple):
    """What is left of a session's last turn.

    Attributes:
        instance_id: where its prompt was computed.
        tokens: of the prompt.
        since_s: when that was done.
        until_s: how long it is kept there.
    """

    instance_id: str
    tokens: int
    since_s: float
    until_s: float


class SessionTtl:
    """Learns the gaps of all sessions, and knows where the KV of each is kept."""

    def __init__(self, most_sessions: int = MOST_SESSIONS) -> None:
        self._most_sessions = most_sessions
        self._gaps = LengthWindow(MOST_GAPS)
        self._gaps_seen = 0
        # Turns, and those of them after which another came.
        self._turns = self._returns = 0
        self._queue_s = 0.0
        # The oldest first.
        self._last: dict[str, Turn] = {}
        # Sessions whose next turn has not come.
        self._open: set[str] = set()
        # Times that are best for some benefit, with the least benefit for which each is.
        self._times: list[tuple[float, float]] = []

    def __len__(self) -> int:
        """Sessions remembered."""
        return len(self._last)

    def came(self, session_id: str, now_s: float) -> None:
        """A turn has come: it ends the gap after the one before."""
        if session_id not in self._open:
            return
        self._open.remove(session_id)
        self._gaps.add(now_s - self._last[session_id].since_s)
        self._gaps_seen += 1
        self._returns += 1
        if self._gaps_seen % _GAPS_AN_ANSWER == 0:
            self._times = best_times(self._gaps.lengths, min(1.0, self._returns / self._turns))

    def waited(self, queue_s: float) -> None:
        """A prompt had so long a queue before it."""
        self._queue_s += (queue_s - self._queue_s) / _QUEUES

    def keep_s(self, reload_s: float, share: float = 1.0) -> float:
        """How long to keep what takes `reload_s` to compute again; 0 for not at all.

        Args:
            share: of the instance's memory, that it takes.
        """
        if self._gaps_seen < LEAST_GAPS:
            return DEFAULT_S
        at = bisect_left(self._times, ((reload_s + self._queue_s) / share,))
        return self._times[at - 1][1] if at else 0.0

    def computed(self, session_id: str, turn: Turn) -> None:
        """A turn's prompt was computed."""
        self._last.pop(session_id, None)
        self._last[session_id] = turn
        self._open.add(session_id)
        self._turns += 1
        if self._turns > _MOST_TURNS:
            self._turns //= 2
            self._returns //= 2
        if len(self._last) > self._most_sessions:
            oldest = next(iter(self._last))
            del self._last[oldest]
            self._open.discard(oldest)

    def kept(self, request: ServeRequest, now_s: float) -> Mapping[str, int]:
        """Leading tokens of a prompt that are kept for its session, by the instance that has them."""
        turn = self._last.get(request.session_id)
        if turn is None or now_s > turn.until_s or turn.tokens >= len(request.prompt_token_ids):
            return {}
        return {turn.instance_id: turn.tokens}


def best_times(gaps: Sequence[float], share: float) -> list[tuple[float, float]]:
    """(benefit, tau): tau* for any benefit is that of the last entry with less; before the first it is 0.

    Args:
        gaps: in order, seconds.
        share: of the turns, that had a next one at all; above 0.
    """
    # What is best for some benefit is a corner of the convex hull over the distribution.
    corners = [(0.0, 0.0)]
    for number, gap in enumerate(gaps, 1):
        chance = share * number / len(gaps)
        while len(corners) > 1:
            (gap_a, chance_a), (gap_b, chance_b) = corners[-2:]
            if (gap_b - gap_a) * (chance - chance_a) < (chance_b - chance_a) * (gap - gap_a):
                break
            corners.pop()
        corners.append((gap, chance))
    return [
        ((gap - gap_a) / (chance - chance_a), gap) for (gap_a, chance_a), (gap, chance) in pairwise(corners)
    ]


class WithSession:
    """A view that knows what is kept for a session, where nothing else of its prompt is known."""

    def __init__(self, view: View, kept: Mapping[str, int]) -> None:
        self._view = view
        self._kept = kept

    def of(self, role: Role) -> tuple[InstanceView, ...]:
        return self._view.of(role)

    def by_tokens(self, role: Role) -> Iterator[InstanceView]:
        return self._view.by_tokens(role)

    def beside(self, instance: InstanceView, role: Role) -> Sequence[InstanceView]:
        return self._view.beside(instance, role)

    def bounds(self, role: Role) -> Mapping[float, int]:
        return self._view.bounds(role)

    def pending(self, role: Role) -> PromptPool:
        return self._view.pending(role)

    def cached(self, request: ServeRequest) -> Mapping[str, int]:
        return self._view.cached(request) or self._kept

    def without(self, instance_ids: frozenset[str]) -> View:
        return WithSession(self._view.without(instance_ids), self._kept)
