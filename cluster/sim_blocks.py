"""KV memory of the twin: blocks, counted and shared as vLLM's block pool does.

A block is in use, or free and still known by the hash of the tokens up to its end (the prefix cache), or
plain free. Only numbers and hashes: there is no memory behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.block_names import BlockChanges
from cluster.prefix_hash import chain_hashes, span_tokens


class _Use:
    """What blocks that were taken, or left, together have in common.

    Attributes:
        released: 0 while somebody uses them; then the number of the release that left them in the cache.
    """

    __slots__ = ("released",)

    def __init__(self) -> None:
        self.released = 0


@dataclass(slots=True)
class BlockTable:
    """The blocks of one request.

    Attributes:
        hashes: of the prompt's full blocks, each over all tokens up to its end; then names of the full blocks
            of output that it lost.
        spans: names of the prompt's full spans, where somebody wants to be told of them.
        shared: hashes of the blocks it holds that others can find.
        private: other blocks it holds.
        committed: leading blocks of `hashes` that are filled and findable, or were found.
        uses: of the blocks that it was the first to use.
        is_first: whether it was that of all it holds.
    """

    hashes: list[int] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    private: int = 0
    committed: int = 0
    uses: list[_Use] = field(default_factory=list)
    is_first: bool = True

    @property
    def count(self) -> int:
        """Blocks held."""
        return len(self.shared) + self.private


class BlockPool:
    """The blocks of one engine.

    Attributes:
        changes: of the prefix cache, where somebody wants to be told of them.
        span_blocks: blocks that are told of together.
        now_s: time, as far as it has been told.
    """

    def __init__(self, blocks: int, block_size: int, *, caching: bool) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._caching = caching
        self._plain = blocks
        # By hash. Most prompts are shared by nobody, so what happens to all blocks of one at once is written
        # once, into their common use, and not into each.
        self._known: dict[int, _Use] = {}
        self._idle = 0
        # By hash: how many use it beside the first.
        self._joint: dict[int, int] = {}
        # What each release left in the cache, the oldest first; blocks used again since are stale in it.
        self._released: deque[tuple[int, list[int]]] = deque()
        self._releases = 0
        # The same of what is kept for longer, with the time until when.
        self._kept: list[tuple[float, int, list[int]]] = []
        self.now_s = 0.0
        self._named = 0
        self._has_copies = False
        self.changes: BlockChanges | None = None
        self.span_blocks = span_tokens(block_size) // block_size
        # By its last block's hash.
        self._spans: dict[int, int] = {}

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

    def hashes(self, tokens: Sequence[int], known: Sequence[int] = (), before: int = 0) -> list[int]:
        """Chain hash of every full block: equal hash, equal tokens up to its end. None without caching.

        Args:
            known: hashes of leading blocks, where somebody has them already.
            before: other than 0 where their KV follows from more than tokens, and from what.
        """
        if not self._caching:
            return []
        rest = tokens[len(known) * self.block_size :] if known else tokens
        return [*known, *chain_hashes(rest, self.block_size, known[-1] if known else before)]

    def spans(self, tokens: Sequence[int]) -> list[int]:
        """Names of the full spans, by which others speak of them; none where nobody asks."""
        if self.changes is None or not self._caching:
            return []
        return list(chain_hashes(tokens, self.span_blocks * self.block_size))

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
        idle = sum(self._known[block].released > 0 for block in table.hashes[:found]) if found else 0
        return self.free - idle

    def share(self, table: BlockTable, found: int) -> None:
        """Let a request use the leading `found` blocks that `find` counted."""
        known, joint = self._known, self._joint
        idle = []
        for block in table.hashes[:found]:
            if known[block].released:
                idle.append(block)
            else:
                joint[block] = joint.get(block, 0) + 1
                table.is_first = False
        if idle:
            self._idle -= len(idle)
            self._begin_use(table, idle)
        table.shared = table.hashes[:found]
        table.committed = found

    def take(self, count: int) -> bool:
        """Take plain blocks, evicting the least recently used cached ones, and those that are kept last;
        False when there are too few."""
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
        if table.spans:
            self._store_spans(table, filled)
        table.committed += len(fresh)
        known = self._known
        # The end of a prompt is evicted before its beginning: unless there are copies, who does not know a
        # block does not know those after it.
        if (self._has_copies or fresh[0] in known) and not known.keys().isdisjoint(fresh):
            fresh = [self._name() if block in known else block for block in fresh]
            self._has_copies = True
        self._begin_use(table, fresh)
        table.shared = table.shared + fresh
        table.private -= len(fresh)

    def release(self, table: BlockTable, filled_tokens: int = 0, keep_s: float = 0.0) -> None:
        """Give back all blocks of a request; findable ones stay until they are evicted, last blocks first.

        Args:
            keep_s: for how long they shall not be, unless there are no others.
            filled_tokens: tokens in them; full blocks of output stay too, as in vLLM, for itself only.
        """
        output_blocks = filled_tokens // self.block_size - len(table.hashes)
        if output_blocks > 0 and self._caching:
            # No prompt has their tokens: any name will do.
            names = [self._name() for _ in range(output_blocks)]
            table.hashes = table.hashes + names
            table.shared = table.shared + names
            table.private -= output_blocks
            self._begin_use(table, names)
        left, uses = table.shared, table.uses
        if self._joint or not table.is_first:
            left = self._last_used(left)
            uses = [_Use()]
            self._known.update(dict.fromkeys(left, uses[0]))
        self._plain += table.private
        table.shared = []
        table.private = 0
        table.committed = 0
        table.uses = []
        table.is_first = True
        if not left:
            return
        self._releases += 1
        for use in uses:
            use.released = self._releases
        if keep_s > 0:
            self._kept.append((self.now_s + keep_s, self._releases, left))
        else:
            self._released.append((self._releases, left))
        self._idle += len(left)

    def _begin_use(self, table: BlockTable, blocks: list[int]) -> None:
        use = _Use()
        table.uses.append(use)
        self._known.update(dict.fromkeys(blocks, use))

    def _name(self) -> int:
        """A hash that nobody has."""
        self._named += 1
        return -self._named

    def _store_spans(self, table: BlockTable, filled: int) -> None:
        """The blocks up to `filled` are there now."""
        assert self.changes is not None
        size = self.span_blocks
        first, last = table.committed // size, min(filled // size, len(table.spans))
        self.changes.stored(table.spans[first:last])
        for number in range(first, last):
            self._spans[table.hashes[(number + 1) * size - 1]] = table.spans[number]

    def _last_used(self, blocks: list[int]) -> list[int]:
        """Those that nobody else uses; of the others one use less."""
        joint = self._joint
        last = []
        for block in blocks:
            users = joint.get(block)
            if users is None:
                last.append(block)
            elif users == 1:
                del joint[block]
            else:
                joint[block] = users - 1
        return last

    def _let_go(self) -> None:
        """What has been kept for long enough may be evicted as if it were left now."""
        now_s = self.now_s
        self._released.extend(entry[1:] for entry in self._kept if entry[0] <= now_s)
        self._kept = [entry for entry in self._kept if entry[0] > now_s]

    def _evict(self, count: int) -> None:
        known, released = self._known, self._released
        self._idle -= count
        self._plain += count
        evicted: list[int] = []
        if self._kept:
            self._let_go()
        while count:
            if not released:
                # Of those that are kept the last one goes first: who has come far goes on.
                released.append(self._kept.pop()[1:])
            release, blocks = released[0]
            last = blocks[-count:]
            del blocks[-count:]
            for block in last:
                use = known.get(block)
                if use is not None and use.released == release:
                    del known[block]
                    evicted.append(block)
                    count -= 1
            if not blocks:
                released.popleft()
        if self._spans and self.changes is not None:
            ends = (self._spans.pop(block, None) for block in evicted)
            self.changes.removed(span for span in ends if span is not None)
