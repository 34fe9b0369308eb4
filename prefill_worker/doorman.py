"""Who may join an instance's queue: a prompt that would wait there for too long hears so at once, and its
router offers it elsewhere (on-demand forwarding, P/D-Serve, arXiv 2408.08147).

A router knows what it has sent itself, and estimates. The instance knows all that is there, from every
router, and its own speed. Pure: it is told what happens and never asks the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from cluster.wire import Offer

# So many stretches back, one counts half of the last: a few seconds under load.
HALF_LIFE = 4
# Stretches without which nobody is refused.
LEAST_STRETCHES = 2


class _Prompt(NamedTuple):
    """A prompt that was taken and has no token yet.

    Attributes:
        due_s: time by which it shall have it; infinite for none.
        came_s: when it was taken.
    """

    tokens: int
    due_s: float
    came_s: float


class LearningDoorman:
    """A `cluster.engine.Doorman` that has learned how fast its instance is under load.

    Only stretches of at least an iteration's tokens teach it that something takes long: a few short prompts
    alone take as long as many of them together. So what it predicts is the least that it will take.

    Attributes:
        tokens: of the prompts that were taken and have no token yet.
    """

    def __init__(self, longest_s: float, *, batch_tokens: int, by_deadline: bool = False) -> None:
        """
        Args:
            longest_s: no prompt may take longer, however late it is due.
            batch_tokens: prompt tokens that an iteration may compute.
            by_deadline: whether prompts are computed in the order of their deadlines.
        """
        self._longest_s = longest_s
        self._batch_tokens = batch_tokens
        self._by_deadline = by_deadline
        self._prompts: dict[str, _Prompt] = {}
        # Of each: the tokens of those that go before it, and its own.
        self._up_to: dict[str, int] = {}
        self.tokens = 0
        # Weighted sums over stretches.
        self._learned_s = self._learned_tokens = 0.0
        self._stretches = 0
        # The stretch under way: since when, and the tokens that it has.
        self._began_s = 0.0
        self._done = 0
        # When a prompt had its token last, or the first of them came; and the former alone.
        self._since_s = 0.0
        self._answered_s = 0.0

    def __len__(self) -> int:
        return len(self._prompts)

    def asked(self, offer: Offer, now_s: float) -> float | None:
        """Take a prompt (None), or refuse it: then the seconds until it could begin."""
        due_s = math.inf if offer.due_in_s is None else now_s + offer.due_in_s
        if self._prompts and self._stretches >= LEAST_STRETCHES and not offer.must_take:
            ahead = self._ahead(due_s, now_s)
            wait_s = self._wait_s(ahead, now_s)
            # To be taken elsewhere costs a round trip, to be late costs all: there is no tolerance.
            if self._wait_s(ahead + offer.tokens, now_s) > min(due_s - now_s, self._longest_s):
                return wait_s
        if not self._prompts:
            self._restart(now_s)
        self._take(offer.request_id, _Prompt(offer.tokens, due_s, now_s))
        return None

    def answered(self, request_ids: Iterable[str], now_s: float) -> None:
        """An iteration has ended with tokens of these requests; those that had one before are no news."""
        done = 0
        for request_id in request_ids:
            if (prompt := self._prompts.pop(request_id, None)) is None:
                continue
            del self._up_to[request_id]
            done += prompt.tokens
        if not done:
            return
        self.tokens -= done
        self._done += done
        self._since_s = self._answered_s = now_s
        # What an iteration leaves half done counts to the next stretch; of two iterations it is little.
        if self._done >= 2 * self._batch_tokens or not self._prompts:
            self._learn(self._done, now_s - self._began_s)
            self._began_s, self._done = now_s, 0

    def left(self, request_ids: Iterable[str], now_s: float) -> None:
        """These requests are gone; those that had a token, or are not known, are no news."""
        for request_id in request_ids:
            if request_id not in self._prompts:
                continue
            was_first = next(iter(self._prompts)) == request_id
            prompt = self._prompts.pop(request_id)
            self.tokens -= prompt.tokens
            self._learn_least(prompt, self._up_to.pop(request_id), now_s)
            if was_first:  # how long it was worked on is not known
                self._restart(now_s)

    def _take(self, request_id: str, prompt: _Prompt) -> None:
        before = self.tokens
        if self._by_deadline:
            before = sum(other.tokens for other in self._prompts.values() if other.due_s <= prompt.due_s)
            for other_id, other in self._prompts.items():
                if prompt.due_s < other.due_s:
                    self._up_to[other_id] += prompt.tokens
        self._prompts[request_id] = prompt
        self._up_to[request_id] = before + prompt.tokens
        self.tokens += prompt.tokens

    def _restart(self, now_s: float) -> None:
        self._since_s = self._began_s = now_s
        self._done = 0

    def _ahead(self, due_s: float, now_s: float) -> int:
        """Tokens that are computed before a prompt with that deadline."""
        if not self._by_deadline:
            return self.tokens
        sooner = sum(prompt.tokens for prompt in self._prompts.values() if now_s <= prompt.due_s <= due_s)
        # Whoever is computed goes on to the end of the iteration.
        return max(sooner, min(self.tokens, self._batch_tokens))

    def _wait_s(self, ahead: int, now_s: float) -> float:
        """Seconds until so many tokens are computed, where there is a prompt."""
        since_s, usual_s = now_s - self._since_s, self._seconds(ahead)
        # The first has its token within the time of its own tokens, or of a whole iteration. Where it has
        # not, the instance is so much slower than it was; or it stands still, and may for as long again.
        first_s = self._seconds(max(next(iter(self._prompts.values())).tokens, self._batch_tokens))
        if not 0 < first_s < since_s:
            return max(0.0, usual_s - since_s)
        return max(0.0, min(usual_s * since_s / first_s - since_s, usual_s - first_s + since_s))

    def _seconds(self, tokens: int) -> float:
        """Under load; 0 before anything was learned."""
        return tokens * self._learned_s / self._learned_tokens if self._learned_tokens else 0.0

    def _learn_least(self, prompt: _Prompt, up_to: int, now_s: float) -> None:
        """It has left without a token: so in its time fewer tokens were computed than those ahead of it and
        its own. Where everybody leaves before the end, nothing else teaches how slow it is."""
        until_s = now_s
        if self._by_deadline:
            # While nobody had a token, not even an iteration was done, whoever is in it.
            longest = max((other.tokens for other in self._prompts.values()), default=0)
            self._learn_slow(max(up_to, longest), now_s - max(prompt.came_s, self._answered_s))
            # Who can't make it any more lets all others go first.
            until_s = min(now_s, prompt.due_s - self._seconds(prompt.tokens))
        self._learn_slow(up_to, until_s - prompt.came_s)

    def _learn_slow(self, tokens: int, seconds: float) -> None:
        """So many, or those of an iteration, took longer than that."""
        tokens = max(tokens, self._batch_tokens)
        if seconds > self._seconds(tokens):
            self._learn(tokens, seconds)

    def _learn(self, tokens: int, seconds: float) -> None:
        # In small parts no token is cheaper: who is faster there than believed has become faster. So one that
        # was slow, and now refuses whatever would fill an iteration, is found out.
        if tokens < self._batch_tokens and seconds >= self._seconds(tokens):
            return
        decay = 0.5 ** (1 / HALF_LIFE)
        self._learned_s = decay * self._learned_s + seconds
        self._learned_tokens = decay * self._learned_tokens + tokens
        self._stretches += 1
