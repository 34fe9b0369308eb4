"""Requests that every instance has refused, and that may still be served in time: they wait here, where they
can go anywhere, and not in a queue that was estimated wrong (P/D-Serve, arXiv 2408.08147)."""

from __future__ import annotations

import asyncio
from bisect import insort
from dataclasses import dataclass, field

# Who would be further behind has no chance: it is told at once.
MOST_WAITING = 1000
# Between two turns: a decision costs some hundred microseconds, and the answer to the last should be in.
TURN_S = 0.01


@dataclass(order=True, slots=True)
class _Waiter:
    give_up_s: float
    number: int
    until_s: float = field(compare=False)
    turn: asyncio.Future[bool] = field(compare=False)

    def resolve(self, has_turn: bool) -> None:
        if not self.turn.done():
            self.turn.set_result(has_turn)


class WaitingLine:
    """Gives one request after the other a turn, those first whose time is up first.

    Only the first has a timer for its turn: that of a thousand does not come at once.
    """

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._most = most
        self._waiting: list[_Waiter] = []
        self._number = 0
        self._last_turn_s = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    async def turn(self, until_s: float, give_up_s: float) -> bool:
        """Wait until it is worth to ask again; False when it never will be: the line is full, or the time is
        up first.

        Args:
            until_s: loop time at which an instance may have room; sooner if there is news.
            give_up_s: loop time at which it is too late.
        """
        loop = asyncio.get_running_loop()
        if until_s >= give_up_s or len(self._waiting) >= self._most:
            return False
        self._number += 1
        waiter = _Waiter(give_up_s, self._number, until_s, loop.create_future())
        insort(self._waiting, waiter)
        up = loop.call_at(give_up_s, waiter.resolve, False)
        self._set_timer()
        try:
            return await waiter.turn
        finally:
            up.cancel()
            self._waiting.remove(waiter)
            self._set_timer()

    def news(self) -> None:
        """A prompt has ended somewhere, or an instance has come: the first may have its turn."""
        if self._waiting:
            self._waiting[0].until_s = asyncio.get_running_loop().time()
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            at_s = max(self._waiting[0].until_s, self._last_turn_s + TURN_S)
            self._timer = asyncio.get_running_loop().call_at(at_s, self._give_turn)

    def _give_turn(self) -> None:
        self._timer = None
        self._last_turn_s = asyncio.get_running_loop().time()
        if self._waiting:
            self._waiting[0].resolve(True)
