"""The requests of the twin that get one token per iteration, advanced together.

In every iteration each of them grows by one token, so their sums need no look at each: an iteration costs the
same for two requests and for two thousand.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.sim_scheduler import Sequence


class DecodeGroup:
    """Decoding requests of one pipeline lane.

    Attributes:
        step: iterations so far.
        members: by request id, in the order in which they joined.
        context_tokens: sum of the tokens in their KV caches.
        begun: whether a step runs now; its blocks are taken.
    """

    def __init__(self, block_size: int) -> None:
        self.step = 0
        self.members: dict[str, Sequence] = {}
        self.context_tokens = 0
        self.begun = False
        # A request needs a new block once in `block_size` steps; here is how many do at each of them.
        self._needing = [0] * block_size
        self._ends: list[tuple[int, int, Sequence]] = []
        self._joins = 0

    def join(self, sequence: Sequence) -> None:
        """A request that has its first token decodes from the next step on."""
        sequence.joined_step = self.step
        self.members[sequence.request_id] = sequence
        self.context_tokens += sequence.computed
        self._needing[self._phase(sequence)] += 1
        self.end_at(sequence, sequence.limit)

    def end_at(self, sequence: Sequence, limit: int) -> None:
        """A member, whose counts are up to date, shall end with so many tokens."""
        sequence.limit = limit
        sequence.end_step = self.step + limit - sequence.generated
        self._joins += 1
        heapq.heappush(self._ends, (sequence.end_step, self._joins, sequence))

    def leave(self, sequence: Sequence) -> None:
        """A request goes, ended or not; its counts and its blocks are brought up to date."""
        del self.members[sequence.request_id]
        self._needing[self._phase(sequence)] -= 1
        self.bring_up(sequence)
        self.context_tokens -= sequence.computed
        blocks = -(-(sequence.computed + self.begun) // len(self._needing))
        sequence.table.private = blocks - len(sequence.table.shared)

    def bring_up(self, sequence: Sequence) -> None:
        """Write the steps since a member joined into its own counts."""
        steps = self.step - sequence.joined_step
        if steps:
            # The phase depends on both together, which is why both move.
            sequence.joined_step = self.step
            sequence.computed += steps
            sequence.generated += steps

    def blocks_at(self, steps_ahead: int) -> int:
        """New blocks that the step `steps_ahead` from now needs."""
        return self._needing[(self.step + steps_ahead) % len(self._needing)]

    def steps_to_next_end(self) -> int:
        """Steps until a member has all its tokens."""
        ends = self._ends
        while not self._is_current(ends[0]):
            heapq.heappop(ends)
        return ends[0][0] - self.step

    def advance(self, steps: int) -> list[Sequence]:
        """Every member got a token per step; returns those that have all theirs, taken out."""
        self.begun = False
        self.step += steps
        self.context_tokens += steps * len(self.members)
        ended = []
        ends = self._ends
        while ends and ends[0][0] <= self.step:
            entry = heapq.heappop(ends)
            if self._is_current(entry):
                self.leave(entry[2])
                ended.append(entry[2])
        return ended

    def _is_current(self, entry: tuple[int, int, Sequence]) -> bool:
        """Whether the entry's request is still here, and has not left and joined again since."""
        sequence = entry[2]
        return self.members.get(sequence.request_id) is sequence and sequence.end_step == entry[0]

    def _phase(self, sequence: Sequence) -> int:
        """The step, modulo the block size, at which a member needs its next block."""
        return (sequence.joined_step - sequence.computed) % len(self._needing)
