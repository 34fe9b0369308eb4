"""Arithmetic of block lists."""

from __future__ import annotations


def blocks_for(tokens: int, block_size_tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // block_size_tokens)


def surplus_blocks(held_tokens: int, wanted_tokens: int, block_size_tokens: int) -> int:
    """Blocks at the end of a source's list that hold none of the wanted tokens."""
    return blocks_for(held_tokens, block_size_tokens) - blocks_for(wanted_tokens, block_size_tokens)
