"""Which instance has the KV of which leading blocks, as far as engines have said what they store and evict.

One dictionary for all instances, since a prompt is looked up in all of them at once: a look-up costs its
matching blocks, however many instances there are. A block that one instance has, which most are, is a
reference to that life of the instance; several share one set per combination. What a dead life had is not
searched for: it is passed over, and swept away a little with every later change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from cluster.instance import InstanceInfo
from cluster.prefix_hash import chain_hashes, span_tokens
from cluster.wire import Blocks

# Entries looked at by the sweep for each block that is stored or removed.
SWEEP = 4


class Life:
    """One life of an instance, as a holder of blocks.

    Attributes:
        blocks: how many it holds.
        alive: whether they can be read.
    """

    __slots__ = ("alive", "blocks", "instance_id")

    def __init__(self, instance_id: str) -> None:
        self.instance_id = instance_id
        self.blocks = 0
        self.alive = True


_Holders = Life | frozenset[Life]


class PrefixIndex:
    """Blocks by name.

    Attributes:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int, most_blocks: int = 10_000_000) -> None:
        """
        Args:
            most_blocks: beyond that, further ones are not learned until others are evicted.
        """
        self.block_size = block_size
        self._most_blocks = most_blocks
        self._holders: dict[int, _Holders] = {}
        self._lives: dict[str, Life] = {}
        self._combinations: dict[frozenset[Life], frozenset[Life]] = {}
        self._swept: Iterator[int] | None = None

    def __len__(self) -> int:
        """Blocks known, those of dead lives that were not swept away yet among them."""
        return len(self._holders)

    def stored(self, instance_id: str, names: Iterable[int]) -> None:
        """An instance has these blocks now."""
        life = self._lives.get(instance_id)
        if life is None:
            life = self._lives[instance_id] = Life(instance_id)
        holders = self._holders
        count = 0
        for name in names:
            count += 1
            known = holders.get(name)
            if known is None:
                if len(holders) >= self._most_blocks:
                    continue
                holders[name] = life
            elif known is life or (isinstance(known, frozenset) and life in known):
                continue
            else:
                holders[name] = self._with(known, life)
            life.blocks += 1
        self._sweep(count)

    def removed(self, instance_id: str, names: Iterable[int]) -> None:
        """An instance has evicted these blocks."""
        life = self._lives.get(instance_id)
        if life is None:
            return
        holders = self._holders
        count = 0
        for name in names:
            count += 1
            known = holders.get(name)
            if known is life:
                del holders[name]
            elif isinstance(known, frozenset) and life in known:
                holders[name] = self._combined(known - {life})
            else:
                continue
            life.blocks -= 1
        self._sweep(count)

    def forget(self, instance_id: str) -> None:
        """An instance is gone, or has cleared its cache, with all it had."""
        life = self._lives.pop(instance_id, None)
        if life is not None and life.blocks:
            life.alive = False
            self._swept = iter(list(self._holders))

    def match(self, tokens: Sequence[int]) -> dict[str, int]:
        """Leading tokens of a prompt that each instance has, in whole blocks; of those that have any."""
        holders = self._holders
        here: _Holders | None = None
        active: frozenset[Life] = frozenset()
        blocks = 0
        ended: dict[Life, int] = {}
        for name in chain_hashes(tokens, self.block_size):
            known = holders.get(name)
            if known is not here:
                if known is None:
                    break
                now = frozenset((known,)) if isinstance(known, Life) else known
                left = active & now if blocks else now
                for life in active - left:
                    ended[life] = blocks
                active, here = left, known
                if not active:
                    break
            blocks += 1
        for life in active:
            ended[life] = blocks
        return {life.instance_id: count * self.block_size for life, count in ended.items() if life.alive}

    def blocks_of(self, instance_id: str) -> int:
        """Blocks that an instance is known to hold."""
        life = self._lives.get(instance_id)
        return life.blocks if life is not None else 0

    def _with(self, known: _Holders, life: Life) -> _Holders:
        before = (known,) if isinstance(known, Life) else known
        return self._combined(frozenset(one for one in (*before, life) if one.alive))

    def _combined(self, lives: frozenset[Life]) -> _Holders:
        if len(lives) == 1:
            return next(iter(lives))
        return self._combinations.setdefault(lives, lives)

    def _sweep(self, changes: int) -> None:
        """Drop some of what only dead lives had."""
        if self._swept is None or not changes:
            return
        holders = self._holders
        names = list(islice(self._swept, SWEEP * changes))
        if not names:
            self._swept = None
            alive = {lives: lives for lives in self._combinations if all(life.alive for life in lives)}
            self._combinations = alive
        for name in names:
            known = holders.get(name)
            if known is None:
                continue
            if isinstance(known, Life):
                if not known.alive:
                    del holders[name]
            elif not all(life.alive for life in known):
                left = frozenset(life for life in known if life.alive)
                if left:
                    holders[name] = self._combined(left)
                else:
                    del holders[name]


class Prefixes:
    """The prefix caches of a fleet: one index for each size of spans that its engines speak of."""

    def __init__(self) -> None:
        self._indexes: dict[int, PrefixIndex] = {}

    def changed(self, info: InstanceInfo, changes: Blocks) -> None:
        """An instance has told how its cache has changed."""
        if info.facts is None:
            return
        size = span_tokens(info.facts.fingerprint.block_size_tokens)
        index = self._indexes.get(size)
        if index is None:
            index = self._indexes[size] = PrefixIndex(size)
        if changes.cleared:
            index.forget(info.instance_id)
        index.removed(info.instance_id, changes.removed)
        index.stored(info.instance_id, changes.stored)

    def forget(self, instance_id: str) -> None:
        """An instance is gone, and its cache with it."""
        for index in self._indexes.values():
            index.forget(instance_id)

    def match(self, tokens: Sequence[int]) -> dict[str, int]:
        """Leading tokens of a prompt that each instance need not compute; of those that have any.

        The last token is always computed, since the first of the answer follows from it.
        """
        found: dict[str, int] = {}
        for size, index in self._indexes.items():
            most = (len(tokens) - 1) // size * size
            for instance_id, cached in index.match(tokens).items():
                if most:
                    found[instance_id] = min(cached, most)
        return found

    def __len__(self) -> int:
        """Blocks known."""
        return sum(map(len, self._indexes.values()))
