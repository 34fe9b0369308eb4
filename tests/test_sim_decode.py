"""The decode group against requests that are walked token by token."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.sim_decode import DecodeGroup
from cluster.sim_scheduler import Sequence

BLOCK = 4


@dataclass
class Walker:
    """One request: every token by itself."""

    computed: int
    generated: int
    limit: int

    def needs_block(self) -> bool:
        return self.computed % BLOCK == 0

    def walk(self) -> None:
        self.computed += 1
        self.generated += 1

    @property
    def left(self) -> int:
        return self.limit - self.generated


class Both:
    """The group and the walkers, moved together."""

    def __init__(self) -> None:
        self.group = DecodeGroup(BLOCK)
        self.sequences: dict[str, Sequence] = {}
        self.walkers: dict[str, Walker] = {}
        self.away: list[str] = []

    def join(self, name: str, prompt: int, limit: int) -> None:
        sequence = Sequence(request_id=name, tokens=[1] * prompt, limit=limit, computed=prompt, generated=1)
        self.sequences[name] = sequence
        self.walkers[name] = Walker(prompt, 1, limit)
        self.group.join(sequence)

    def advance(self, steps: int) -> None:
        ended = self.group.advance(steps)
        for _ in range(steps):
            for walker in self.walkers.values():
                walker.walk()
        assert [one.request_id for one in ended] == [n for n, w in self.walkers.items() if not w.left]
        for sequence in ended:
            self.check_one(sequence.request_id)
            del self.walkers[sequence.request_id], self.sequences[sequence.request_id]

    def leave(self, name: str) -> None:
        self.group.leave(self.sequences[name])
        self.check_one(name)

    def check_one(self, name: str) -> None:
        sequence, walker = self.sequences[name], self.walkers[name]
        assert (sequence.computed, sequence.generated) == (walker.computed, walker.generated)
        # Nothing else holds blocks here.
        assert sequence.table.private == -(-walker.computed // BLOCK)

    def check(self) -> None:
        group, walkers = self.group, list(self.walkers.values())
        assert list(group.members) == list(self.walkers)
        assert group.context_tokens == sum(w.computed for w in walkers)
        if walkers:
            assert group.steps_to_next_end() == min(w.left for w in walkers)
        for ahead in range(2 * BLOCK):
            assert group.blocks_at(ahead) == sum((w.computed + ahead) % BLOCK == 0 for w in walkers)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(1, 20), st.integers(2, 30)),
        st.tuples(st.just("advance"), st.integers(1, 30), st.just(0)),
        st.tuples(st.just("leave"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("again"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("look"), st.integers(0, 9), st.just(0)),
    ),
    max_size=50,
)


@settings(max_examples=300, deadline=None)
@given(operations)
def test_the_group_walks_as_its_members_would(asked: list[tuple[str, int, int]]) -> None:
    both = Both()
    for number, (what, one, other) in enumerate(asked):
        names = list(both.walkers)
        if what == "join":
            both.join(f"r{number}", one, other)
        elif not names:
            continue
        elif what == "advance":
            both.advance(min(one, both.group.steps_to_next_end()))
        elif what == "leave":
            name = names[one % len(names)]
            both.leave(name)
            del both.walkers[name], both.sequences[name]
        elif what == "again":
            # As after a preemption: it leaves, is computed anew, gets a token by that, and joins.
            name = names[one % len(names)]
            walker = both.walkers[name]
            if walker.left < 2:
                continue
            both.leave(name)
            sequence = both.sequences[name]
            sequence.computed += 1
            sequence.generated += 1
            del both.walkers[name]
            both.walkers[name] = Walker(walker.computed + 1, walker.generated + 1, walker.limit)
            both.group.join(sequence)
        else:
            both.group.bring_up(both.sequences[names[one % len(names)]])
        both.check()
    for name in list(both.walkers):
        both.leave(name)
        del both.walkers[name]
    both.check()


def test_who_leaves_in_the_midst_of_a_step_gives_back_the_block_of_that_step() -> None:
    both = Both()
    both.join("a", 8, 10)
    both.group.begun = True
    both.group.leave(both.sequences["a"])
    assert both.sequences["a"].table.private == 3


def test_an_id_that_is_used_again_ends_when_the_new_one_does() -> None:
    both = Both()
    both.join("a", 3, 5)
    both.leave("a")
    both.join("a", 3, 20)
    assert both.group.steps_to_next_end() == 19
    assert both.group.advance(4) == []
