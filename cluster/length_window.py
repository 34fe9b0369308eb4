"""The last lengths of something, in order of length: for quantiles of what happened lately."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque


class LengthWindow:
    """So many of the last lengths.

    Attributes:
        lengths: in order of length.
    """

    __slots__ = ("_by_age", "_most", "lengths")

    def __init__(self, most: int) -> None:
        self._most = most
        self._by_age: deque[float] = deque()
        self.lengths: list[float] = []

    def add(self, length: float) -> None:
        """A further one; the oldest goes when there are too many."""
        if len(self._by_age) == self._most:
            oldest = self._by_age.popleft()
            del self.lengths[bisect_right(self.lengths, oldest) - 1]
        self._by_age.append(length)
        insort(self.lengths, length)
