"""What of a prompt's KV can be read while the rest of it is still computed. Pure: it moves nothing.

A block is read once it is full, from a source whose request still holds it. Whether it held it until the
read had ended, the source's last word tells: with each preemption a request begins another life there, and
what was read of an earlier one may have been anybody's. Nothing of it is used before that word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

# Block ids, a list for each group of layers.
Blocks = Sequence[Sequence[int]]


class Progress(msgspec.Struct, array_like=True, frozen=True):
    """How far a prompt is computed, as its source tells a reader.

    Attributes:
        follower: the reader's request.
        source: the request at the source.
        life: how often it lost its blocks and began anew.
        blocks: its full blocks, from the prompt's first on; none in a group that frees blocks on the way.
        engine_id, host, port, tp_size, pp_size: how to reach the source's KV, by vLLM's names.
    """

    follower: str
    source: str
    life: int
    blocks: list[list[int]]
    engine_id: str
    host: str
    port: int
    tp_size: int
    pp_size: int = 1


class Piece(NamedTuple):
    """Blocks to read, group by group as many here as there."""

    local: list[list[int]]
    remote: list[list[int]]


class EarlyRead:
    """One request's early reads: one under way at a time, each of all that is there to be read.

    Both sides' lists end with the same token's block, and this one lacks what was in the reader's cache. Of
    each group the last block stays for the end: an empty list would be taken for all of it.
    """

    def __init__(self, local: Blocks, prompt_blocks: int) -> None:
        """
        Args:
            local: blocks to be filled.
            prompt_blocks: of the whole prompt, in a group that keeps them all.
        """
        self._local = [list(group) for group in local]
        self._skipped = [prompt_blocks - len(group) for group in self._local]
        self._life = 0
        self._there: list[list[int]] = [[] for _ in self._local]
        self._read = [0] * len(self._local)
        self._asked: list[int] | None = None
        self._asked_life = 0
        self._failed = False

    @property
    def is_reading(self) -> bool:
        """Whether a piece is under way."""
        return self._asked is not None

    def heard(self, life: int, blocks: Blocks) -> None:
        """The source tells how far it is."""
        if life < self._life or len(blocks) != len(self._local):
            return
        if life > self._life:
            self._begin(life)
        self._there = [list(group) for group in blocks]

    def next(self) -> Piece | None:
        """What to read now; None for nothing. What it returns is under way until `ended`."""
        if self._asked is not None or self._failed:
            return None
        until = [
            max(done, min(len(there) - skipped, len(mine) - 1))
            for done, there, skipped, mine in zip(
                self._read, self._there, self._skipped, self._local, strict=True
            )
        ]
        if until == self._read:
            return None
        self._asked, self._asked_life = until, self._life
        piece = Piece([], [])
        for group, (begin, end) in enumerate(zip(self._read, until, strict=True)):
            skipped = self._skipped[group]
            piece.local.append(self._local[group][begin:end])
            piece.remote.append(self._there[group][skipped + begin : skipped + end])
        return piece

    def ended(self, *, is_good: bool) -> None:
        """The piece under way is here, or failed; then nothing more is read before the end."""
        assert self._asked is not None
        if not is_good:
            self._failed = True
        elif self._asked_life == self._life:
            self._read = self._asked
        self._asked = None

    def left(self, life: int) -> list[list[int]]:
        """What is to be read at the end, of a source that ended in that life; not while a piece is under
        way."""
        assert self._asked is None
        if life != self._life:
            self._begin(life)
        return [mine[done:] for mine, done in zip(self._local, self._read, strict=True)]

    def _begin(self, life: int) -> None:
        self._life = life
        self._there = [[] for _ in self._local]
        self._read = [0] * len(self._local)
