"""KV memory of the twin: blocks, counted and shared as vLLM's block pool does.

A block is in use, or free and still known by the hash of the tokens up to its end (the prefix cache), or
plain free. Only numbers and hashes: there is no memory behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass(slots=True)
class BlockTable:
    """The blocks of one request.

    Attributes:
        hashes: of the prompt's full blocks, each over all tokens up to its end; then names of the full blocks
            of output that it lost.
        shared: hashes of the blocks it holds that others can find.
        private: other blocks it holds.
        committed: leading blocks of `hashes` that are filled and findable, or were found.
    """

    hashes: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    private: int = 0
    committed: int = 0

    @property
    def count(self) -> int:
        """Blocks held."""
        return len(self.shared) + self.private


class BlockPool:
    """The blocks of one engine."""

    def __init__(self, blocks: int, block_size: int, *, caching: bool) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._caching = caching
        self._plain = blocks
        # By hash: how many use the block, or, for one that nobody uses, minus the number of the release that
        # made it so.
        self._known: dict[int, int] = {}
        self._idle = 0
        self._joint_uses = 0
        # What each release left in the cache, the oldest first; blocks used again since are stale in it.
        self._released: deque[tuple[int, list[int]]] = deque()
        self._releases = 0
        self._named = 0

    @property
    def free(self) -> int:
        """Blocks that can be taken; cached ones that nobody uses among them."""
        return self._plain + self._idle

    @property
    def used(self) -> int:
        return self.blocks - self._plain - self._idle

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens fill, the last one perhaps in part."""
        return -(-tokens // self.block_size)

    def hashes(self, tokens: Sequence[int], known: Sequence[int] = ()) -> list[int]:
        """Chain hash of every full block: equal hash, equal tokens up to its end. None without caching.

        Args:
            known: hashes of leading blocks, where somebody has them already.
        """
        if not self._caching:
            return []
        rest = tokens[len(known) * self.block_size :] if known else tokens
        blocks = zip(*[iter(rest)] * self.block_size, strict=False)
        return [*known[:-1], *accumulate(blocks, _chain, initial=known[-1] if known else 0)][not known :]

    def find(self, table: BlockTable, limit_tokens: int) -> int:
        """Leading blocks of the prompt that the cache holds, within `limit_tokens`; changes nothing."""
        known = self._known
        found = 0
        for block in table.hashes[: limit_tokens // self.block_size]:
            if block not in known:
                break
            found += 1
        return found

    def available(self, table: BlockTable, found: int) -> int:
        """Blocks that could be taken beside the `found` cached ones."""
        idle = sum(self._known[block] < 0 for block in table.hashes[:found]) if found else 0
        return self.free - idle

    def share(self, table: BlockTable, found: int) -> None:
        """Let a request use the leading `found` blocks that `find` counted."""
        known = self._known
        for block in table.hashes[:found]:
            users = known[block]
            if users < 0:
                self._idle -= 1
                known[block] = 1
            else:
                self._joint_uses += 1
                known[block] = users + 1
        table.shared = table.hashes[:found]
        table.committed = found

    def take(self, count: int) -> bool:
        """Take plain blocks, evicting the least recently used cached ones; False when there are too few."""
        missing = count - self._plain
        if missing > 0:
            if missing > self._idle:
                return False
            self._evict(missing)
        self._plain -= count
        return True

    def commit(self, table: BlockTable, computed_tokens: int) -> None:
        """Make the prompt blocks that are now filled findable. One that is findable already has a copy then:
        it stays as long as any other, as in vLLM, but only vLLM finds it when the first one is evicted."""
        filled = computed_tokens // self.block_size
        fresh = table.hashes[table.committed : filled]
        if not fresh:
            return
        table.committed += len(fresh)
        known = self._known
        if not known.keys().isdisjoint(fresh):
            fresh = [self._name() if block in known else block for block in fresh]
        known.update(dict.fromkeys(fresh, 1))
        table.shared = table.shared + fresh
        table.private -= len(fresh)

    def release(self, table: BlockTable, filled_tokens: int = 0) -> None:
        """Give back all blocks of a request; findable ones stay until they are evicted, last blocks first.

        Args:
            filled_tokens: tokens in them; full blocks of output stay too, as in vLLM, for itself only.
        """
        output_blocks = filled_tokens // self.block_size - len(table.hashes)
        if output_blocks > 0 and self._caching:
            # No prompt has their tokens: any name will do.
            names = [self._name() for _ in range(output_blocks)]
            table.hashes = table.hashes + names
            table.shared = table.shared + names
            table.private -= output_blocks
            self._known.update(dict.fromkeys(names, 1))
        left = table.shared
        self._plain += table.private
        table.shared = []
        table.private = 0
        table.committed = 0
        if self._joint_uses:
            left = self._last_users(left)
        if not left:
            return
        self._releases += 1
        self._known.update(dict.fromkeys(left, -self._releases))
        self._released.append((self._releases, left))
        self._idle += len(left)

    def _name(self) -> int:
        """A hash that nobody has."""
        self._named += 1
        return -self._named

    def _last_users(self, blocks: list[int]) -> list[int]:
        """Those that nobody else uses; of the others one use less."""
        known = self._known
        last = []
        for block in blocks:
            if known[block] == 1:
                last.append(block)
            else:
                known[block] -= 1
                self._joint_uses -= 1
        return last

    def _evict(self, count: int) -> None:
        known, released = self._known, self._released
        self._idle -= count
        self._plain += count
        while count:
            release, blocks = released[0]
            last = blocks[-count:]
            del blocks[-count:]
            gone = [block for block in last if known.get(block) == -release]
            for block in gone:
                del known[block]
            count -= len(gone)
            if not blocks:
                released.popleft()


def _chain(before: int, block: tuple[int, ...]) -> int:
    # Hashes of ints and of tuples of them do not change from process to process.
    return hash((before, block))
