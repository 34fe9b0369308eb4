"""The ways that KV takes from one instance to another, and what a hand-over takes on each."""

from __future__ import annotations

from cluster.learned_latency import Line
from router.view import InstanceView

# Decision.link: both phases on one instance, on two of a node (NVLink, shared memory), or between nodes.
NONE, NODE, NETWORK = "", "node", "network"
# One that stalled is no rule: none counts for more than so many times what was expected.
MOST_ERROR = 5.0


def link_between(source: InstanceView, target: InstanceView) -> str:
    """The way from one instance to the other."""
    if source is target or source.instance_id == target.instance_id:
        return NONE
    return NODE if source.info.node == target.info.node else NETWORK


class HandOvers:
    """Seconds from the token of a prefill instance to the first one of the decode instance, by the tokens
    that move, learned from those that ended. On a crowded link they take longer, which is learned too."""

    def __init__(self) -> None:
        self._lines = {NODE: Line(), NETWORK: Line()}

    def came(self, link: str, tokens: int, seconds: float) -> None:
        """One took so long."""
        line = self._lines[link]
        if line.samples:
            seconds = min(seconds, MOST_ERROR * line.seconds(tokens))
        line.learn(tokens, seconds)

    def seconds(self, link: str, tokens: int) -> float:
        """What one will take; of a way that was never seen, what it takes on the other; 0 before anything is
        known, and on one instance."""
        line = self._lines.get(link)
        if line is None:
            return 0.0
        if not line.samples:
            line = self._lines[NETWORK if link == NODE else NODE]
        return line.seconds(tokens)

    def more_s(self, link: str, tokens: int) -> float:
        """What it takes more than within a node."""
        return max(0.0, self.seconds(link, tokens) - self.seconds(NODE, tokens))
