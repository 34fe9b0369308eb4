"""Which bytes go from which rank to which so that a request's KV changes engines, in the longest runs. Pure.

Both sides may differ in tensor and pipeline parallelism, block size and order of memory. What one pair of
ranks exchanges for a *unit*, the most tokens that divide both block sizes, is worked out once per pair of
engines; a request's runs are that, repeated over its blocks and joined where both sides go on without a gap
(P/D-Serve's block-free transfer, as far as the blocks themselves are in order).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy
from numpy.typing import NDArray

from kv_transfer.layout import KvLayout, LayoutError

Ints = NDArray[numpy.int64]


@dataclass(frozen=True, slots=True)
class Runs:
    """Pieces of memory to copy, in bytes: arrays of shape [n] each.

    Attributes:
        source_region, source_offset: where each begins at the source's rank.
        target_region, target_offset: where it goes at the target's.
        size: its bytes.
    """

    source_region: Ints
    source_offset: Ints
    target_region: Ints
    target_offset: Ints
    size: Ints

    def __len__(self) -> int:
        return len(self.size)

    @property
    def bytes(self) -> int:
        """Bytes in all."""
        return int(self.size.sum())

    def pick(self, which: Any) -> Runs:
        """Some of them: by a slice, a mask, or places in the order that is wanted."""
        return Runs(*(column[which] for column in self._columns()))

    def joined(self) -> Runs:
        """The same bytes in as few runs as there can be, in the target's order."""
        source_region, source_offset, target_region, target_offset, size = self.pick(
            numpy.lexsort((self.target_offset, self.target_region))
        )._columns()
        begins = numpy.ones(len(size), dtype=bool)
        begins[1:] = (
            (source_region[1:] != source_region[:-1])
            | (target_region[1:] != target_region[:-1])
            | (source_offset[1:] != source_offset[:-1] + size[:-1])
            | (target_offset[1:] != target_offset[:-1] + size[:-1])
        )
        first = numpy.flatnonzero(begins)
        sums = numpy.add.reduceat(size, first) if len(first) else size
        return Runs(
            source_region[first], source_offset[first], target_region[first], target_offset[first], sums
        )

    def _columns(self) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        return self.source_region, self.source_offset, self.target_region, self.target_offset, self.size


class TransferPlan:
    """What each pair of ranks of two engines exchanges; of `make_plan`.

    Attributes:
        unit_tokens: tokens that are moved together: a move begins at a multiple of it, and the rest of its
            last unit is moved along, as both have room for it.
        pairs: (source rank, target rank) of all that exchange anything, in order.
    """

    def __init__(self, source: KvLayout, target: KvLayout) -> None:
        if source.model_facts() != target.model_facts():
            raise LayoutError(
                "not of one model: (layers, KV heads, bytes per place, MLA) are "
                f"{source.model_facts()} at the source and {target.model_facts()} at the target"
            )
        self._source, self._target = source, target
        self.unit_tokens = math.gcd(source.block_tokens, target.block_tokens)
        self._templates: dict[tuple[int, int], Runs] = {}
        for rank in range(target.ranks):
            self._add_templates(rank)
        self.pairs = sorted(self._templates)

    def runs(
        self,
        pair: tuple[int, int],
        source_blocks: Sequence[int],
        target_blocks: Sequence[int],
        tokens: range,
    ) -> Runs:
        """The runs of one pair of ranks for these tokens of a request.

        Args:
            pair: one of `pairs`.
            source_blocks, target_blocks: ids of the request's blocks, from its first token on.
            tokens: positions in the request, without a step; it begins at a multiple of `unit_tokens`.

        Raises ValueError for tokens that a side has no blocks for.
        """
        units = self._units(tokens)
        template = self._templates[pair]
        here = _unit_offsets(self._source, pair[0], source_blocks, units, self.unit_tokens)
        there = _unit_offsets(self._target, pair[1], target_blocks, units, self.unit_tokens)
        count = len(units)
        return Runs(
            numpy.repeat(template.source_region, count),
            (template.source_offset[:, None] + here[None, :]).ravel(),
            numpy.repeat(template.target_region, count),
            (template.target_offset[:, None] + there[None, :]).ravel(),
            numpy.repeat(template.size, count),
        ).joined()

    def _units(self, tokens: range) -> Ints:
        unit = self.unit_tokens
        if tokens.step != 1 or tokens.start < 0 or tokens.start % unit:
            raise ValueError(f"tokens {tokens} must begin at a multiple of {unit} and go up by 1")
        return numpy.arange(tokens.start // unit, math.ceil(tokens.stop / unit), dtype=numpy.int64)

    def _add_templates(self, rank: int) -> None:
        """What a rank of the target reads of every rank of the source, for one unit."""
        found: dict[int, list[tuple[int, int, int, int, int]]] = {}
        source, target = self._source, self._target
        # Token by token where a token of several heads is one piece on one side only.
        for layer in target.layers_of(rank):
            for head in target.heads_of(rank):
                holders = source.holders(layer, head)
                # Ranks that hold the same share their readers.
                holder = holders[rank % len(holders)]
                from_region, from_offset = source.offset(holder, layer, head)
                to_region, to_offset = target.offset(rank, layer, head)
                found.setdefault(holder, []).extend(
                    (
                        from_region,
                        from_offset + token * source.token_bytes,
                        to_region,
                        to_offset + token * target.token_bytes,
                        target.place_bytes,
                    )
                    for token in range(self.unit_tokens)
                )
        for holder, places in found.items():
            table = numpy.array(places, dtype=numpy.int64)
            self._templates[holder, rank] = Runs(*(table[:, column] for column in range(5))).joined()


def _unit_offsets(layout: KvLayout, rank: int, blocks: Sequence[int], units: Ints, unit_tokens: int) -> Ints:
    """Where each unit begins in any region of a rank."""
    per_block = layout.block_tokens // unit_tokens
    if len(units) and int(units[-1]) // per_block >= len(blocks):
        raise ValueError(
            f"{(int(units[-1]) + 1) * unit_tokens} tokens need more than {len(blocks)} blocks of "
            f"{layout.block_tokens}"
        )
    ids = numpy.asarray(blocks, dtype=numpy.int64)[units // per_block]
    return ids * layout.block_bytes(rank) + units % per_block * unit_tokens * layout.token_bytes


@lru_cache(maxsize=256)
def make_plan(source: KvLayout, target: KvLayout) -> TransferPlan:
    """What moves between two engines of one model. Raises LayoutError when they are not."""
    return TransferPlan(source, target)
