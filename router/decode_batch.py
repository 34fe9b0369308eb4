"""The requests that an instance decodes or will decode, and what one more would do to them."""

from __future__ import annotations

from typing import NamedTuple


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
    """

    __slots__ = ("_requests", "bounds", "context_tokens", "peak_tokens")

    def __init__(self) -> None:
        self._requests: dict[str, DecodingRequest] = {}
        self.context_tokens = 0
        self.peak_tokens = 0
        self.bounds: dict[float, int] = {}

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def usual_output(self) -> float:
        """Mean length of its answers, in tokens; at least 1."""
        return max(1.0, 2 * (self.peak_tokens - self.context_tokens) / max(1, len(self._requests)))

    def add(self, name: str, prompt_tokens: int, output_tokens: int, tpot_s: float) -> None:
        """A request will decode there.

        Args:
            output_tokens: how long its answer is expected to be.
        """
        request = DecodingRequest(prompt_tokens + output_tokens // 2, prompt_tokens + output_tokens, tpot_s)
        self._requests[name] = request
        self.context_tokens += request.context_tokens
        self.peak_tokens += request.peak_tokens
        self.bounds[tpot_s] = self.bounds.get(tpot_s, 0) + 1

    def remove(self, name: str) -> None:
        """It has ended, or left."""
        request = self._requests.pop(name, None)
        if request is None:
            return
        self.context_tokens -= request.context_tokens
        self.peak_tokens -= request.peak_tokens
        if self.bounds[request.tpot_s] == 1:
            del self.bounds[request.tpot_s]
        else:
            self.bounds[request.tpot_s] -= 1
