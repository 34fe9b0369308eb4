"""From an engine's own names of KV blocks to those of `prefix_hash`, and which of them it has now.

Engines hash blocks as they like; what they tell beside, a block's tokens and the one before it, is enough to
name it anew. A block whose KV follows from more than its tokens (adapter, image, salt) is not named at all,
and neither is what follows it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from cluster.prefix_hash import chain
from cluster.wire import Blocks


class BlockNames:
    """The blocks of one engine that can be found by tokens, by the engine's names."""

    def __init__(self) -> None:
        self._names: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._names)

    def stored(
        self, keys: Sequence[Hashable], before: Hashable | None, tokens: Sequence[int], block_size: int
    ) -> Iterable[int]:
        """Consecutive blocks were stored; yields their names, those that were there already left out.

        Args:
            keys: the engine's names.
            before: its name of the block before the first; None begins a prompt.
            tokens: of all blocks, `block_size` each.
        """
        name = 0
        if before is not None:
            known = self._names.get(before)
            if known is None:
                return
            name = known
        for position, key in enumerate(keys):
            name = chain(name, tuple(tokens[position * block_size : (position + 1) * block_size]))
            if key not in self._names:
                self._names[key] = name
                yield name

    def removed(self, keys: Iterable[Hashable]) -> Iterable[int]:
        """Blocks were evicted; yields the names of those that had one."""
        for key in keys:
            name = self._names.pop(key, None)
            if name is not None:
                yield name

    def clear(self) -> None:
        """Nothing is left."""
        self._names.clear()


class BlockChanges:
    """Changes of a prefix cache that nobody was told of yet: of each block only the last one counts."""

    __slots__ = ("_cleared", "_stored")

    def __init__(self) -> None:
        self._stored: dict[int, bool] = {}
        self._cleared = False

    def __bool__(self) -> bool:
        return self._cleared or bool(self._stored)

    def stored(self, names: Iterable[int]) -> None:
        self._stored.update(dict.fromkeys(names, True))

    def removed(self, names: Iterable[int]) -> None:
        self._stored.update(dict.fromkeys(names, False))

    def clear(self) -> None:
        self._stored.clear()
        self._cleared = True

    def take(self) -> Blocks:
        """What there is to tell; after that, nothing."""
        changes, self._stored = self._stored, {}
        cleared, self._cleared = self._cleared, False
        return Blocks(
            stored=[name for name, is_there in changes.items() if is_there],
            removed=[name for name, is_there in changes.items() if not is_there],
            cleared=cleared,
        )
