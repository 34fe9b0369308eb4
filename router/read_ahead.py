"""Moves without a long pause: what a request has is read by its next engine while it decodes on this one.

The next engine is sent the request at once, with places kept for the tokens that will come until this one
ends it; so both know beforehand how long it will be. Where that is not so in the end, it moves as if nothing
had been read.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, ExitStack

from router.hop import Hop

# Seconds and tokens that pass until both engines have heard of a move; and the most tokens that one is put
# off for: what has not been read by then is waited for.
TOLD_S, LEAST, MOST = 0.03, 2, 256
# One that has so many more than it should have ended with is not going to be ended.
LATE = 8


def tokens_ahead(copy_s: float, token_s: float, left: int) -> int:
    """How many tokens a move is put off for, at least 1.

    Args:
        copy_s: what copying takes.
        token_s: between two of its tokens.
        left: tokens that may come at most, of which one is left for its next engine.
    """
    more = LEAST + (math.ceil((copy_s + TOLD_S) / token_s) if token_s > 0 else 0)
    return max(1, min(more, MOST, left - 1))


class ReadAhead:
    """The hop of one request that reads ahead, while there is one."""

    def __init__(self) -> None:
        self._reader: Hop | None = None
        self._generated = 0
        self._opened = ExitStack()

    def begin(self, reader: Hop, opening: AbstractContextManager[None], generated: int) -> None:
        """Send it; it expects the request to have so many output tokens when it goes on. Raises as
        `opening` does."""
        self._opened.enter_context(opening)
        self._reader, self._generated = reader, generated

    def take(self, generated: int, held: int, opened: ExitStack) -> Hop | None:
        """The hop, which is open until `opened` is closed; None, and it is closed, where it has failed, or
        the request was not ended with the tokens that it expects.

        Args:
            held: tokens whose KV its source keeps; one that guesses tokens may have computed more.
        """
        reader, self._reader = self._reader, None
        if reader is None or reader.has_ended or (generated, held) != (self._generated, reader.follows):
            self.close()
            return None
        opened.push(self._opened.pop_all())
        return reader

    def close(self) -> None:
        """Read no more; any number of times."""
        self._reader = None
        self._opened.close()
