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
# A logarithm's last digits are of what came last: instances are as fast as each other within such a step.
STEP = 0.02


class Pace:
    """A factor on predictions, and how far they spread around it.

    Attributes:
        factor: what to multiply a prediction with.
        rounded: the same in whole steps, to compare instances by.
        spread: usual error that is left, relative.
        seen: how many it has learned from.
    """

    __slots__ = ("_error", "_log", "_most", "factor", "rounded", "seen", "spread")

    def __init__(self, most: float = 2.0) -> None:
        """
        Args:
            most: bound of the factor, and of its inverse.
        """
        self._most = math.log(most)
        self._log = 0.0
        self._error = FIRST_SPREAD
        self.seen = 0
        self.factor = self.rounded = 1.0
        self.spread = FIRST_SPREAD

    def learn(self, predicted_s: float, actual_s: float) -> None:
        """Something took `actual_s` where `predicted_s`, without the factor, was expected. Times of nothing
        tell nothing."""
        if predicted_s <= 0 or actual_s <= 0:
            return
        self.seen += 1
        error = math.log(actual_s / predicted_s) - self._log
        if self.seen > 1:
            error = max(-MOST_ERROR, min(MOST_ERROR, error))
            self._error += max(GAIN, 1 / self.seen) * (abs(error) - self._error)
        self._log += max(GAIN, 1 / self.seen) * error
        self._log = max(-self._most, min(self._most, self._log))
        self.factor = math.exp(self._log)
        self.rounded = math.exp(round(self._log / STEP) * STEP)
        self.spread = max(LEAST_SPREAD, min(MOST_SPREAD, self._error))


# An instance's speed is told from so many seconds of work: a prompt alone may wait for an iteration's end, or
# end with others in one.
WINDOW_S = 0.5
# The first few behind a queue are averaged, then each moves the estimate by this part of its error, and none
# by more than so many usual errors.
LATE_GAIN, MOST_LATE = 0.02, 3.0


class PromptPace:
    """Of an instance's prompts: how much longer their work takes, and what comes on top behind a queue.

    A queue is work that adds up, to a factor. Whoever waited in it also shares an iteration with those behind
    it, and waits for its end: that is of one length, however long the queue was. So is the error that is
    left.

    Attributes:
        late_s: what comes on top.
    """

    __slots__ = ("_error_s", "_pace", "_seen", "_tokens", "_took_s", "_work_s", "late_s")

    def __init__(self) -> None:
        self._pace = Pace()
        self._work_s = self._took_s = 0.0
        self._tokens = 0
        self._seen = 0
        self._error_s = 0.0
        self.late_s = 0.0

    @property
    def factor(self) -> float:
        """What to multiply predicted work with."""
        return self._pace.factor

    @property
    def seen(self) -> int:
        """From how many stretches of work that was learned."""
        return self._pace.seen

    def spread(self, expected_s: float, queue_s: float) -> float:
        """Usual error, relative, of a prompt that shall have its token after so long, of which it waits
        `queue_s`."""
        if queue_s <= 0 or expected_s <= 0:
            return self._pace.spread
        return min(MOST_SPREAD, max(self._pace.spread, self._error_s / expected_s))

    def worked(self, work_s: float, took_s: float, tokens: int = 0) -> tuple[int, float] | None:
        """It worked for so long on so many tokens, which was predicted, without the factor, to take `work_s`.
        Returns (tokens, seconds) of a while that is complete, and from which it has learned."""
        done: tuple[int, float] | None = None
        # Those that end with the first of an iteration seem to take nothing: they belong to it.
        if took_s > 0 and max(self._work_s, self._took_s) >= WINDOW_S:
            self._pace.learn(self._work_s, self._took_s)
            done = self._tokens, self._took_s
            self._work_s = self._took_s = 0.0
            self._tokens = 0
        self._work_s += work_s
        self._took_s += took_s
        self._tokens += tokens
        return done

    def came(self, predicted_s: float, actual_s: float) -> None:
        """A prompt that waited in a queue had its token after so long."""
        self._seen += 1
        error_s = actual_s - predicted_s
        if self._seen > 1:
            most_s = MOST_LATE * self._error_s
            error_s = max(-most_s, min(most_s, error_s)) if most_s else error_s
        gain = max(LATE_GAIN, 1 / self._seen)
        self.late_s += gain * error_s
        # No history makes an instance look dead, or done before it began.
        self.late_s = max(-predicted_s / 2, min(predicted_s, self.late_s))
        self._error_s += gain * (abs(error_s) - self._error_s)


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
