"""The ways that KV takes from one instance to another, and what a hand-over takes on each."""

from __future__ import annotations

from cluster.learned_latency import HALF_LIFE, Line
from router.view import InstanceView

# Decision.link: both phases on one instance, on two of a node (NVLink, shared memory), or between nodes.
NONE, NODE, NETWORK = "", "node", "network"
_OTHER = {NODE: NETWORK, NETWORK: NODE}
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
        # Hand-overs on the other way since the last one on this.
        self._since = {NODE: 0, NETWORK: 0}

    def came(self, link: str, tokens: int, seconds: float) -> None:
        """One took so long."""
        line = self._lines[link]
        if line.samples:
            seconds = min(seconds, MOST_ERROR * line.seconds(tokens))
        line.learn(tokens, seconds)
        self._since[link] = 0
        self._since[_OTHER[link]] += 1

    def seconds(self, link: str, tokens: int) -> float:
        """What one will take; 0 before anything is known, and on one instance. Of a way that was never seen
        it is what it takes on the other; and one that nobody takes any more, as it was slower, comes to be
        believed as good as that: what has crowded it may be gone."""
        if link == NONE:
            return 0.0
        line, other = self._lines[link], self._lines[_OTHER[link]]
        if not line.samples or not other.samples:
            return (line if line.samples else other).seconds(tokens)
        seconds, usual_s = line.seconds(tokens), other.seconds(tokens)
        if seconds <= usual_s:
            return seconds
        forgotten: float = 0.5 ** (self._since[link] / HALF_LIFE)
        return usual_s + (seconds - usual_s) * forgotten

    def more_s(self, link: str, tokens: int) -> float:
        """What it takes more than within a node."""
        return max(0.0, self.seconds(link, tokens) - self.seconds(NODE, tokens))
