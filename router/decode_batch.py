"""The requests that an instance decodes or will decode, and what one more would do to them."""

from __future__ import annotations

from typing import NamedTuple

from router.pace import chance


class DecodingRequest(NamedTuple):
    """A request of a batch.

    Attributes:
        context_tokens: in its KV cache, halfway through its answer.
        peak_tokens: at its end.
        tpot_s: its bound.
    """

    context_tokens: int
    peak_tokens: int
    tpot_s: float


class DecodeBatch:
    """What the router believes of one instance's decodes.

    Attributes:
        context_tokens: sum over the requests, each halfway through its answer.
        peak_tokens: sum over the requests, each at its end: more than there will be at any time.
        bounds: requests by their TPOT bound.
        iteration_s: of the batch as it is, where somebody has computed it; None after every change.
    """

    __slots__ = (
        "_chances",
        "_chances_at",
        "_pool",
        "_requests",
        "bounds",
        "context_tokens",
        "iteration_s",
        "peak_tokens",
    )

    def __init__(self, pool: dict[float, int] | None = None) -> None:
        """
        Args:
            pool: `bounds` of all instances of a pool, kept up to date here.
        """
        self._pool = pool
        self._requests: dict[str, DecodingRequest] = {}
        self.iteration_s: float | None = None
        self._chances: dict[float, float] = {}
        self._chances_at: tuple[float, float] = (0.0, 0.0)
        self.context_tokens = 0
        self.peak_tokens = 0
        self.bounds: dict[float, int] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def usual_output(self, output_tokens: int) -> float:
        """Mean length of its answers and of one more, in tokens; at least 1."""
        total = 2 * (self.peak_tokens - self.context_tokens) + output_tokens
        return max(1.0, total / (len(self._requests) + 1))

    def add(self, name: str, prompt_tokens: int, output_tokens: int, tpot_s: float) -> None:
        """A request will decode there.

        Args:
            output_tokens: how long its answer is expected to be.
        """
        request = DecodingRequest(prompt_tokens + output_tokens // 2, prompt_tokens + output_tokens, tpot_s)
        self._requests[name] = request
        self.context_tokens += request.context_tokens
        self.peak_tokens += request.peak_tokens
        self._count(tpot_s, 1)

    def remove(self, name: str) -> None:
        """It has ended, or left."""
        request = self._requests.pop(name, None)
        if request is None:
            return
        self.context_tokens -= request.context_tokens
        self.peak_tokens -= request.peak_tokens
        self._count(request.tpot_s, -1)

    def chance(self, bound_s: float, expected_s: float, spread: float) -> float:
        """As `pace.chance`; kept, as between two changes of the batch everybody asks for the same."""
        at = expected_s, spread
        if at != self._chances_at:
            self._chances_at = at
            self._chances.clear()
        found = self._chances.get(bound_s)
        if found is None:
            found = self._chances[bound_s] = chance(bound_s, expected_s, spread)
        return found

    def leave_pool(self) -> None:
        """The pool has no such instance any more."""
        pool, self._pool = self._pool, None
        for tpot_s, count in self.bounds.items():
            _add(pool, tpot_s, -count)

    def _count(self, tpot_s: float, count: int) -> None:
        self.iteration_s = None
        _add(self.bounds, tpot_s, count)
        _add(self._pool, tpot_s, count)


def _add(bounds: dict[float, int] | None, tpot_s: float, count: int) -> None:
    if bounds is None:
        return
    total = bounds.get(tpot_s, 0) + count
    if total:
        bounds[tpot_s] = total
    else:
        del bounds[tpot_s]
