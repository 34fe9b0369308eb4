"""From an engine's own names of KV blocks to those of `prefix_hash`, and which of them it has now.

Engines hash blocks as they like; what they tell beside, a block's tokens and the one before it, is enough to
name it anew. Names are of spans, several small blocks together; a span is there as long as its last block is.
A block whose KV follows from more than its tokens (adapter, image, salt) is not named at all, and neither is
what follows it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from cluster.prefix_hash import chain, span_tokens
from cluster.wire import Blocks


class _Block(NamedTuple):
    """Where a block stands: at the end of the span `name`, or with `rest` tokens of the one after it."""

    name: int
    rest: tuple[int, ...]

    @property
    def ends_span(self) -> bool:
        return not self.rest


class BlockNames:
    """The blocks of one engine that can be found by tokens, by the engine's names."""

    def __init__(self) -> None:
        self._blocks: dict[Hashable, _Block] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def stored(
        self, keys: Sequence[Hashable], before: Hashable | None, tokens: Sequence[int], block_size: int
    ) -> Iterable[int]:
        """Consecutive blocks were stored; yields the names of the spans that are there now and were not.

        Args:
            keys: the engine's names.
            before: its name of the block before the first; None begins a prompt.
            tokens: of all blocks, `block_size` each.
        """
        last = _Block(0, ()) if before is None else self._blocks.get(before)
        if last is None:
            return
        whole = span_tokens(block_size)
        name, rest = last
        for position, key in enumerate(keys):
            rest = (*rest, *tokens[position * block_size : (position + 1) * block_size])
            if len(rest) == whole:
                name, rest = chain(name, rest), ()
            if key not in self._blocks:
                self._blocks[key] = _Block(name, rest)
                if not rest:
                    yield name

    def removed(self, keys: Iterable[Hashable]) -> Iterable[int]:
        """Blocks were evicted; yields the names of the spans that are not there any more."""
        for key in keys:
            block = self._blocks.pop(key, None)
            if block is not None and block.ends_span:
                yield block.name

    def clear(self) -> None:
        """Nothing is left."""
        self._blocks.clear()


class BlockChanges:
    """Changes of a prefix cache that nobody was told of yet: of each span only the last one counts."""

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
