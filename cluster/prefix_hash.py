"""Names of KV blocks by what is in them: equal name, equal tokens up to the block's end.

One function for all who speak of blocks (router, workers, twins), so that what one has stored another finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# Fewer tokens under one name would cost a look-up each, and say little more.
SPAN_TOKENS = 128


def span_tokens(block_size: int) -> int:
    """Tokens under one name that is told of, of an engine with such blocks: whole blocks, at least one."""
    return block_size * max(1, SPAN_TOKENS // block_size)


def chain(before: int, block: Sequence[int]) -> int:
    """The name of a block that follows the one named `before`; 0 begins a prompt.

    Hashes of ints and of tuples of them are the same in every process of one Python version.
    """
    return hash((before, tuple(block)))


def chain_hashes(tokens: Sequence[int], block_size: int, before: int = 0) -> Iterator[int]:
    """The names of the full blocks of `tokens`, one after the other and no sooner than asked for.

    Args:
        before: name of the block that they follow.
    """
    name = before
    # As `chain`, of which a prompt has hundreds: one iterator in so many places gives a block a time.
    for block in zip(*[iter(tokens)] * block_size, strict=False):
        name = hash((name, block))
        yield name
