"""How many times as long as predicted things really take, learned from each that ends: robust and bounded.

In logarithms, since twice and half as long are the same error. A single outlier moves it by one small step
(Huber), so an instance that stalls once is not avoided for ever; and it is bounded, so that no history makes
an instance look free or dead.
"""

from __future__ import annotations

import math

# The first few are averaged; from then on each moves the estimate by this part of its error.
GAIN = 0.05
# Of a logarithm, the most that counts of an error: 1.65 times.
MOST_ERROR = 0.5
# Before anything is known, and never less: predictions of single requests are off by a tenth.
LEAST_SPREAD, FIRST_SPREAD, MOST_SPREAD = 0.05, 0.15, 0.6


class Pace:
    """A factor on predictions, and how far they spread around it.

    Attributes:
        factor: what to multiply a prediction with.
        spread: usual error that is left, relative.
    """

    __slots__ = ("_error", "_log", "_most", "_seen", "factor", "spread")

    def __init__(self, most: float = 2.0) -> None:
        """
        Args:
            most: bound of the factor, and of its inverse.
        """
        self._most = math.log(most)
        self._log = 0.0
        self._error = FIRST_SPREAD
        self._seen = 0
        self.factor = 1.0
        self.spread = FIRST_SPREAD

    def learn(self, predicted_s: float, actual_s: float) -> None:
        """Something took `actual_s` where `predicted_s`, without the factor, was expected. Times of nothing
        tell nothing."""
        if predicted_s <= 0 or actual_s <= 0:
            return
        self._seen += 1
        error = math.log(actual_s / predicted_s) - self._log
        if self._seen > 1:
            error = max(-MOST_ERROR, min(MOST_ERROR, error))
            self._error += max(GAIN, 1 / self._seen) * (abs(error) - self._error)
        self._log += max(GAIN, 1 / self._seen) * error
        self._log = max(-self._most, min(self._most, self._log))
        self.factor = math.exp(self._log)
        self.spread = max(LEAST_SPREAD, min(MOST_SPREAD, self._error))


def chance(bound_s: float, expected_s: float, spread: float) -> float:
    """Probability (0 to 1) that what shall take `expected_s`, with errors of `spread`, keeps a bound.

    Logistic in the logarithm of their ratio, within 1 % of the normal distribution.
    """
    if bound_s == math.inf:
        return 1.0
    if bound_s <= 0:
        return 0.0
    if expected_s <= 0:
        return 1.0
    margin = 1.702 * math.log(bound_s / expected_s) / spread
    if margin > 30:
        return 1.0
    return 0.0 if margin < -30 else 1 / (1 + math.exp(-margin))
