"""In which order the requests of a batch are run: those with a common beginning together.

BatchLLM (arXiv 2412.03594): a prefix tree over the whole batch is folded to one level, bottom up, by letting
those of a node that have more in common leave it for a group of their own where that saves more prompt tokens
(`MaximizeReuse`); a group is run together, its cache is then free for the next; and groups go by output over
input, the highest first, so that later prompts are computed beside many decodes. Sorted by their names of
blocks (`batch_file.block_names`), requests are in the depth-first order of that tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from router.batch_file import NAME_BYTES, Line


@dataclass(slots=True, eq=False)
class _Node:
    """The requests `first` to `last` (exclusive) of the sorted ones, which have their first `depth` blocks in
    common.

    Attributes:
        leaving: nodes below it that are groups of their own; its other requests are one group.
        saved: blocks that need not be computed twice.
    """

    depth: int
    first: int
    last: int = 0
    children: list[_Node] = field(default_factory=list)
    leaving: list[_Node] = field(default_factory=list)
    saved: int = 0

    def close(self, last: int) -> None:
        """No further request belongs to it."""
        self.last = last
        # In a group, each but the first is saved what all have in common.
        leaving: list[_Node] = []
        for child in self.children:
            if child.saved <= self.depth * child.count:
                continue  # it stays, all of it
            if child.staying * self.depth > (child.staying - 1) * child.depth:
                leaving += child.leaving  # the others of it stay
            else:
                leaving.append(child)
        self._choose(leaving)
        if self.count == sum(child.count for child in self.children):
            chosen = self.leaving, self.saved
            self._choose(self.children)
            if self.saved <= chosen[1]:
                self.leaving, self.saved = chosen

    @property
    def count(self) -> int:
        """Its requests."""
        return self.last - self.first

    @property
    def staying(self) -> int:
        """Those that are one group."""
        return self.count - sum(node.count for node in self.leaving)

    def _choose(self, leaving: list[_Node]) -> None:
        self.leaving = leaving
        self.saved = sum(node.saved for node in leaving) + self.depth * max(0, self.staying - 1)


def in_order(lines: Sequence[Line]) -> list[Line]:
    """The lines in the order in which to run them."""
    ordered = sorted(lines, key=lambda line: (line.blocks, line.number))
    groups = [[ordered[at] for at in group] for group in _groups(_tree(ordered))]
    # A sort keeps the order of equals: neighbours in the tree stay neighbours.
    groups.sort(key=_output_share, reverse=True)
    return [line for group in groups for line in group]


def _output_share(group: Sequence[Line]) -> float:
    return sum(line.output_tokens for line in group) / sum(line.input_tokens for line in group)


def _groups(root: _Node) -> list[list[int]]:
    """The groups, each as positions of the sorted lines, in their order."""
    groups: list[list[int]] = []
    todo = [root]
    while todo:
        node = todo.pop()
        todo += node.leaving
        staying: list[int] = []
        at = node.first
        for child in node.leaving:
            staying += range(at, child.first)
            at = child.last
        staying += range(at, node.last)
        if node.depth and staying:
            groups.append(staying)
        else:  # nothing in common
            groups += [[at] for at in staying]
    return sorted(groups)


def _tree(ordered: Sequence[Line]) -> _Node:
    """The prefix tree of sorted lines: its inner nodes, the root with no block in common."""
    open_nodes = [_Node(0, 0)]
    for at in range(1, len(ordered)):
        shared = _shared(ordered[at - 1].blocks, ordered[at].blocks)
        first = at - 1
        while shared < open_nodes[-1].depth:
            node = open_nodes.pop()
            node.close(at)
            first = node.first
            if open_nodes[-1].depth < shared:
                open_nodes.append(_Node(shared, first))
            open_nodes[-1].children.append(node)
        if open_nodes[-1].depth < shared:
            open_nodes.append(_Node(shared, first))
    while len(open_nodes) > 1:
        node = open_nodes.pop()
        node.close(len(ordered))
        open_nodes[-1].children.append(node)
    open_nodes[0].close(len(ordered))
    return open_nodes[0]


def _shared(one: bytes, other: bytes) -> int:
    """Blocks that two have in common at the beginning."""
    most = min(len(one), len(other)) // NAME_BYTES
    low, high = 0, most  # the first `low` are the same, for sure
    while low < high:
        middle = (low + high + 1) // 2
        if one[: middle * NAME_BYTES] == other[: middle * NAME_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low
