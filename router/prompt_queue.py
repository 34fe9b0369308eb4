"""The prompts that an instance was given and has not answered, and when a further one could begin."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Iterator
from typing import NamedTuple


class PendingPrompt(NamedTuple):
    """A prompt under way, in the order in which it is computed.

    Attributes:
        key: what it is ordered by: its deadline, or 0 where the first to come is the first to be served.
        number: ties go by arrival.
        work_s: how long it alone takes.
        deadline_s: loop time by which it shall have its token.
        bound_s: on its time to first token.
    """

    key: float
    number: int
    work_s: float
    deadline_s: float
    name: str
    tokens: int
    bound_s: float


class _Schedule(NamedTuple):
    """The prompts that can make their deadlines, in order; the others are computed last (S-EDF).

    Attributes:
        keys: of the prompts.
        ahead_s: work of each and of those before it.
        from_s, until_s: when it was made, and when the first of them will be too late.
    """

    prompts: list[PendingPrompt]
    keys: list[float]
    ahead_s: list[float]
    from_s: float
    until_s: float

    def position(self, deadline_s: float) -> int:
        """Of a new prompt with that deadline. The one that is being computed goes on to the end of its chunk
        at least; that it is the first is as good a guess as any."""
        return max(1, bisect_right(self.keys, deadline_s))


class PromptPool:
    """The prompts of all instances of a role.

    Attributes:
        bounds: prompts by their bound on the time to first token.
        work_s: their sum.
    """

    __slots__ = ("bounds", "work_s")

    def __init__(self) -> None:
        self.bounds: dict[float, int] = {}
        self.work_s = 0.0

    def add(self, prompt: PendingPrompt) -> None:
        self.bounds[prompt.bound_s] = self.bounds.get(prompt.bound_s, 0) + 1
        self.work_s += prompt.work_s

    def remove(self, prompt: PendingPrompt) -> None:
        left = self.bounds[prompt.bound_s] - 1
        if left:
            self.bounds[prompt.bound_s] = left
        else:
            del self.bounds[prompt.bound_s]
        self.work_s = self.work_s - prompt.work_s if self.bounds else 0.0


class PromptQueue:
    """What the router believes of one instance's prompts.

    Attributes:
        by_deadline: whether they are computed in the order of their deadlines.
        work_s, tokens: sums over the prompts.
    """

    __slots__ = (
        "_by_name",
        "_number",
        "_pool",
        "_prompts",
        "_schedule",
        "_since_s",
        "_told_for_s",
        "_told_free_s",
        "_told_number",
        "by_deadline",
        "tokens",
        "work_s",
    )

    def __init__(self, pool: PromptPool | None = None, *, by_deadline: bool = False) -> None:
        """
        Args:
            pool: of all instances of the role, kept up to date here.
        """
        self.by_deadline = by_deadline
        self._pool = pool
        self._prompts: list[PendingPrompt] = []
        self._by_name: dict[str, PendingPrompt] = {}
        self._number = 0
        self._since_s = 0.0
        self._schedule: _Schedule | None = None
        # What the instance has told: when a prompt with that deadline could begin, and what was there then.
        self._told_free_s = self._told_for_s = -math.inf
        self._told_number = 0
        self.work_s = 0.0
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[PendingPrompt]:
        return iter(self._prompts)

    def add(
        self,
        name: str,
        work_s: float,
        deadline_s: float,
        now_s: float,
        *,
        tokens: int = 0,
        bound_s: float = math.inf,
    ) -> None:
        """A prompt was sent there."""
        if not self._prompts:
            self._since_s = now_s
        self._number += 1
        key = deadline_s if self.by_deadline else 0.0
        prompt = PendingPrompt(key, self._number, work_s, deadline_s, name, tokens, bound_s)
        insort(self._prompts, prompt)
        self._schedule = None
        if self._pool is not None:
            self._pool.add(prompt)
        if self._told_free_s > now_s:
            self._told_free_s += work_s
        self._by_name[name] = prompt
        self.work_s += work_s
        self.tokens += tokens

    def remove(self, name: str, now_s: float, *, is_served: bool = True) -> float | None:
        """It was answered, or left. Returns how long the instance worked on it as far as can be told: since
        the last one that ended there, or since it came; None when it is not there."""
        prompt = self._by_name.pop(name, None)
        if prompt is None:
            return None
        was_first = self._prompts[0] is prompt
        self._prompts.remove(prompt)
        self._schedule = None
        if self._pool is not None:
            self._pool.remove(prompt)
        self.work_s = self.work_s - prompt.work_s if self._prompts else 0.0
        self.tokens -= prompt.tokens
        if not is_served:
            self._told_free_s -= prompt.work_s
        elif prompt.number > self._told_number:  # all that was there before it is done
            self._told_free_s = -math.inf
        took_s = now_s - self._since_s
        if is_served or was_first:  # one that leaves the queue's end takes no work with it that was done
            self._since_s = now_s
        return took_s

    def told(self, name: str, wait_s: float, now_s: float) -> None:
        """The instance refuses the prompt, which could begin after `wait_s` there: it has prompts that this
        router knows nothing of, or is slower than it believes."""
        prompt = self._by_name.get(name)
        if prompt is not None:
            # Its own work goes with it, when it leaves.
            self._told_free_s = now_s + wait_s + prompt.work_s
            self._told_for_s = prompt.deadline_s if self.by_deadline else -math.inf
            self._told_number = self._number

    def leave_pool(self) -> None:
        """The role has no such instance any more."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for prompt in self._prompts:
                pool.remove(prompt)

    def wait_s(self, deadline_s: float, now_s: float) -> float:
        """Seconds until a new prompt with that deadline could begin."""
        told_s = self._told_free_s - now_s if deadline_s >= self._told_for_s else 0.0
        if not self._prompts:
            return max(0.0, told_s)
        done_s = now_s - self._since_s
        if not self.by_deadline:
            return max(0.0, self.work_s - done_s, told_s)
        schedule = self._scheduled(now_s)
        if not schedule.prompts:
            return max(0.0, told_s)
        return max(0.0, schedule.ahead_s[schedule.position(deadline_s) - 1] - done_s, told_s)

    def behind(self, deadline_s: float, now_s: float) -> Iterator[tuple[PendingPrompt, float]]:
        """The prompts that a new one with that deadline would delay, each with the time at which it would
        have its token without it."""
        if not self.by_deadline or len(self._prompts) < 2:
            return
        schedule = self._scheduled(now_s)
        first = schedule.position(deadline_s)
        if first >= len(schedule.prompts):
            return
        # The first is not done before now.
        begun_s = max(self._since_s, now_s - schedule.ahead_s[0])
        for prompt, ahead_s in zip(schedule.prompts[first:], schedule.ahead_s[first:], strict=True):
            yield prompt, begun_s + ahead_s

    def _scheduled(self, now_s: float) -> _Schedule:
        schedule = self._schedule
        if schedule is None or not schedule.from_s <= now_s <= schedule.until_s:
            schedule = self._schedule = self._made(now_s)
        return schedule

    def _made(self, now_s: float) -> _Schedule:
        prompts: list[PendingPrompt] = []
        ahead_s: list[float] = []
        begun_s, total_s, until_s = self._since_s, 0.0, math.inf
        for prompt in self._prompts:
            latest_s = prompt.deadline_s - prompt.work_s
            if begun_s <= latest_s:
                if prompts:
                    until_s = min(until_s, latest_s)
                begun_s = now_s
                total_s += prompt.work_s
                prompts.append(prompt)
                ahead_s.append(total_s)
        return _Schedule(prompts, [prompt.key for prompt in prompts], ahead_s, now_s, until_s)
