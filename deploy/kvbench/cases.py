"""What is measured: transfers by size, by number of pieces, several at once, and of a model's layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy

from cluster.model_shape import ModelShape
from kv_transfer.layout import KvLayout
from kv_transfer.plan import Ints, Runs, make_plan

KIB, MIB = 1 << 10, 1 << 20
SIZES = (64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
PIECES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB)
PIECES_IN_ALL = 16 * MIB
AT_ONCE = (2, 4, 8)
# Of a cache twice as large as what is moved, so that blocks lie as in one in use.
ROOM = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to measure.

    Attributes:
        what: for the report.
        transfers: what is read; each is posted when the one before is done, or all at once.
        at_once: whether all are posted before the first is waited for.
    """

    what: str
    transfers: tuple[Runs, ...] = field(repr=False)
    at_once: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of all transfers."""
        return sum(runs.bytes for runs in self.transfers)

    @property
    def runs(self) -> int:
        """Pieces of all transfers."""
        return sum(map(len, self.transfers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Cases on one pair of memories: bytes of the source's and the target's regions."""

    name: str
    source_regions: tuple[int, ...]
    target_regions: tuple[int, ...]
    cases: tuple[Case, ...]


def flat_bench(seed: int = 0) -> Bench:
    """One region on each side; no model's."""
    size, rng = SIZES[-1], Random(seed)
    cases = [Case(what="one piece", transfers=(_scattered(1, each, size, rng),)) for each in SIZES]
    for piece in PIECES:
        runs = _scattered(PIECES_IN_ALL // piece, piece, size, rng)
        cases.append(Case(what="scattered pieces", transfers=(runs,)))
    for count in AT_ONCE:
        # Of different places: one of a cache's lines is not read twice.
        whole = _scattered(count, PIECES_IN_ALL, size, rng)
        each = tuple(whole.pick(slice(i, i + 1)) for i in range(count))
        cases.append(Case(what=f"{count} at once", transfers=each, at_once=True))
    return Bench(name="memory", source_regions=(size,), target_regions=(size,), cases=tuple(cases))


def layout_bench(name: str, source: KvLayout, target: KvLayout, tokens: int, seed: int = 0) -> Bench:
    """A request between the first ranks of two engines that exchange anything, its blocks in no order as in a
    cache that has been in use, and in order as in one that was empty."""
    plan, rng = make_plan(source, target), Random(seed)
    pair = plan.pairs[0]
    count = -(-tokens // source.block_tokens), -(-tokens // target.block_tokens)
    mixed = rng.sample(range(source.blocks), count[0]), rng.sample(range(target.blocks), count[1])
    in_order = list(range(count[0])), list(range(count[1]))
    step = max(source.block_tokens, target.block_tokens)
    parts = [range(at, min(at + step, tokens)) for at in range(0, tokens, step)]

    def apart(blocks: tuple[list[int], list[int]]) -> list[Runs]:
        return [plan.runs(pair, *blocks, part) for part in parts]

    cases = (
        Case(what="scattered blocks, a transfer for each", transfers=tuple(apart(mixed))),
        Case(what="scattered blocks, one transfer", transfers=(plan.runs(pair, *mixed, range(tokens)),)),
        Case(what="blocks in order, a transfer for each", transfers=tuple(apart(in_order))),
        Case(what="blocks in order, not joined", transfers=(_all_of(apart(in_order)),)),
        Case(what="blocks in order, joined", transfers=(plan.runs(pair, *in_order, range(tokens)),)),
    )
    return Bench(
        name=name,
        source_regions=_regions(source, pair[0]),
        target_regions=_regions(target, pair[1]),
        cases=cases,
    )


def layout_of(shape: ModelShape, *, block_tokens: int, tokens: int, ranks: tuple[int, int]) -> KvLayout:
    """A model's cache with room for `ROOM` times as many tokens.

    Args:
        ranks: tensor-parallel and pipeline-parallel.

    Raises LayoutError for what can't be.
    """
    heads = 1 if shape.latent else shape.kv_heads
    return KvLayout(
        layers=shape.layers,
        kv_heads=heads,
        place_bytes=max(1, shape.kv_bytes_per_token // shape.layers // heads),
        block_tokens=block_tokens,
        blocks=ROOM * -(-tokens // block_tokens),
        tensor_parallel=ranks[0],
        pipeline_parallel=ranks[1],
        is_mla=shape.latent is not None,
    )


def _regions(layout: KvLayout, rank: int) -> tuple[int, ...]:
    return (layout.region_bytes(rank),) * layout.regions_of(rank)


def _scattered(count: int, size: int, of: int, rng: Random) -> Runs:
    """So many pieces of one region, in different places of both sides."""
    places = of // size
    sides = [numpy.array(rng.sample(range(places), count), dtype=numpy.int64) * size for _ in range(2)]
    zeros: Ints = numpy.zeros(count, dtype=numpy.int64)
    return Runs(zeros, sides[0], zeros, sides[1], numpy.full(count, size, dtype=numpy.int64))


def _all_of(parts: Sequence[Runs]) -> Runs:
    return Runs(
        numpy.concatenate([part.source_region for part in parts]),
        numpy.concatenate([part.source_offset for part in parts]),
        numpy.concatenate([part.target_region for part in parts]),
        numpy.concatenate([part.target_offset for part in parts]),
        numpy.concatenate([part.size for part in parts]),
    )
