"""How many requests of batches are under way at once: more while nobody refuses them, half as many when
somebody does (additive increase, multiplicative decrease, as TCP; RFC 5681)."""

from __future__ import annotations

import asyncio
from collections import deque

# Where it begins, and what it never falls below: one that asks whether there is room again.
FIRST, LEAST = 4.0, 1.0
# After a refusal nothing is sent for so long; twice as long after each further one with none served since.
FIRST_PAUSE_S, MOST_PAUSE_S = 0.5, 8.0
# Without a refusal for so long it doubles again, with every turn of its requests, instead of growing by one.
CALM_S = 30.0


class Window:
    """Places for requests.

    Attributes:
        size: places there are now.
        inside: requests that have one.
    """

    def __init__(self, most: int) -> None:
        """
        Args:
            most: places at most.
        """
        self._most = float(most)
        self.size = min(FIRST, self._most)
        self.inside = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._pause_s = FIRST_PAUSE_S
        self._opens_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._refused_s: float | None = None

    async def enter(self) -> float:
        """Wait for a place, first come first served; returns the loop's time, for `refused`. Whoever has one
        must `leave`."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()
            raise
        return loop.time()

    def leave(self) -> None:
        """Give a place back."""
        self.inside -= 1
        self._let_in()

    def served(self) -> None:
        """A request was answered: there is room."""
        self._pause_s = FIRST_PAUSE_S
        now_s = asyncio.get_running_loop().time()
        is_calm = self._refused_s is None or now_s - self._refused_s > CALM_S
        self.size = min(self._most, self.size + (1.0 if is_calm else 1.0 / self.size))
        self._let_in()

    def refused(self, entered_s: float) -> None:
        """A request that entered then was refused. Those that were under way already when it became smaller
        say nothing new."""
        if self._refused_s is not None and entered_s <= self._refused_s:
            return
        now_s = asyncio.get_running_loop().time()
        self._refused_s = now_s
        self.size = max(LEAST, self.size / 2)
        self._opens_s = now_s + self._pause_s
        self._pause_s = min(MOST_PAUSE_S, 2 * self._pause_s)

    def close(self) -> None:
        """Stop its clock; nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _let_in(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting and self.inside < int(self.size):
            if loop.time() < self._opens_s:
                if self._timer is None:
                    self._timer = loop.call_at(self._opens_s, self._open)
                return
            turn = self._waiting.popleft()
            if not turn.done():  # else it was cancelled
                self.inside += 1
                turn.set_result(None)

    def _open(self) -> None:
        self._timer = None
        self._let_in()
