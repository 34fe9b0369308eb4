"""How long iterations take, learned from those that ended: for clusters whose speed nobody has measured.

Two lines, seconds over prompt tokens and seconds over decoding requests, by least squares that forget. They
begin with a guess and leave it as soon as there is anything better.
"""

from __future__ import annotations

from cluster.latency import Batch

# So many iterations back, one counts half of the last.
HALF_LIFE = 200
# What a guess counts, beside something that was seen.
GUESS_WEIGHT = 0.01
# A guess of a model of some ten billion parameters on a GPU: base seconds, and seconds of each token or
# request, with the sizes at which it is taken for seen.
PREFILL_GUESS = (0.01, 1e-4, (64, 2048))
DECODE_GUESS = (0.01, 1e-4, (1, 64))


class Line:
    """seconds = base + count x slope, through samples of which the older count less."""

    def __init__(self) -> None:
        self._decay = 0.5 ** (1 / HALF_LIFE)
        # Weighted sums: of 1, count, count squared, seconds, count x seconds.
        self._sums = (0.0,) * 5
        self._found: tuple[float, float] | None = None
        self.samples = 0

    def learn(self, count: int, seconds: float, weight: float = 1.0) -> None:
        """It took so long for so many."""
        ones, counts, squares, times, products = self._sums
        decay = self._decay
        self._sums = (
            decay * ones + weight,
            decay * counts + weight * count,
            decay * squares + weight * count * count,
            decay * times + weight * seconds,
            decay * products + weight * count * seconds,
        )
        self._found = None
        self.samples += 1

    def seconds(self, count: int) -> float:
        """What it will take for so many; 0 before anything is known."""
        if self._found is None:
            self._found = self._solve()
        return self._found[0] + self._found[1] * count

    def _solve(self) -> tuple[float, float]:
        ones, counts, squares, times, products = self._sums
        if not counts:
            return 0.0, 0.0
        spread = ones * squares - counts * counts
        slope = (ones * products - counts * times) / spread if spread > 1e-9 * squares else -1.0
        base = (times - slope * counts) / ones
        if slope < 0 or base < 0:  # all of one size, or noise: through the origin
            return 0.0, times / counts
        return base, slope


class LearnedLatency:
    """A `LatencyModel` that is told what happened."""

    region = None

    def __init__(self) -> None:
        self._prefill, self._decode = Line(), Line()
        for line, (base_s, slope_s, counts) in ((self._prefill, PREFILL_GUESS), (self._decode, DECODE_GUESS)):
            for count in counts:
                line.learn(count, base_s + slope_s * count, weight=GUESS_WEIGHT)

    def iteration_s(self, batch: Batch) -> float:
        seconds = 0.0
        if batch.prefill_requests:
            seconds += self._prefill.seconds(batch.prefill_tokens)
        if batch.decode_requests:
            seconds += self._decode.seconds(batch.decode_requests)
        return seconds

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A prompt that waited for no other had its first token after so long."""
        self._prefill.learn(tokens, seconds)

    def decoded(self, requests: int, seconds: float) -> None:
        """An iteration with so many requests took so long."""
        self._decode.learn(requests, seconds)
