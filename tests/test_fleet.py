"""The fleet's order against a plain sort, and what a decision costs among thousands."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.instance import InstanceLoad, InstanceState, Role
from router.fleet import Fleet, Member
from router.view import InstanceView, View
from tests.twins import info_of


@dataclass
class Link:
    """A way to an instance."""

    load: InstanceLoad = field(default_factory=InstanceLoad)


def ids(views: object) -> list[str]:
    return [view.instance_id for view in views]  # type: ignore[attr-defined]


names = st.sampled_from([f"{role}-{number}" for role in Role for number in range(5)])
states = st.sampled_from(InstanceState)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("join"), names, states),
        st.tuples(st.just("leave"), names, st.none()),
        st.tuples(st.just("update"), names, states),
        st.tuples(st.just("hold"), names, st.integers(0, 100)),
        st.tuples(st.just("free"), names, st.integers(0, 50)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(operations, st.frozensets(names))
def test_the_order_is_that_of_a_sort_at_any_time(
    asked: list[tuple[str, str, object]], out: frozenset[str]
) -> None:
    """1: `of` is in the order of the spec, `by_tokens` that of the tokens, then of the spec. 2: a snapshot
    says the same. 3: without some, or with all where none would be left."""
    fleet: Fleet[Link] = Fleet()
    members: dict[str, InstanceState] = {}
    holds: list[tuple[str, int, ExitStack]] = []
    for what, name, facts in asked:
        info = info_of(name, int(name.split("-")[1]))
        if what == "join":
            assert isinstance(facts, InstanceState)
            fleet.join(replace(info, state=facts), Link())
            members[name] = facts
        elif what == "leave":
            assert (fleet.leave(name) is not None) == (name in members)
            members.pop(name, None)
        elif what == "update":
            assert isinstance(facts, InstanceState)
            assert fleet.update(replace(info, state=facts)) == (name in members)
            if name in members:
                members[name] = facts
        elif what == "hold":
            assert isinstance(facts, int)
            stack = ExitStack()
            stack.enter_context(fleet.reservations.hold(name, facts))
            holds.append((name, facts, stack))
        elif holds:
            assert isinstance(facts, int)
            holds.pop(facts % len(holds))[2].close()
        assert fleet.size == len(members)
        for role in Role:
            for state in InstanceState:
                here = [n for n in members if n.startswith(role.value) and members[n] is state]
                assert fleet.count(role, state) == len(here)
            ready = sorted(
                n for n in members if n.startswith(role.value) and members[n] is InstanceState.READY
            )
            tokens = {n: sum(count for held, count, _ in holds if held == n) for n in ready}
            requests = {n: sum(held == n for held, _, _ in holds) for n in ready}
            by_tokens = sorted(ready, key=lambda n: (tokens[n], n))
            kept = [n for n in ready if n not in out] or ready
            snapshot, rest = fleet.snapshot(), fleet.without(out)
            for view in (fleet, snapshot):
                assert ids(view.of(role)) == ready
                assert ids(view.by_tokens(role)) == by_tokens
                assert ids(view.without(out).of(role)) == kept
            assert ids(rest.by_tokens(role)) == [n for n in by_tokens if n in kept]
            assert ids(rest.without(out).of(role)) == kept
            for view in fleet.of(role):
                assert view.outstanding_tokens == tokens[view.instance_id]
                assert view.outstanding_requests == requests[view.instance_id]


def test_who_joins_again_is_there_once() -> None:
    fleet: Fleet[Link] = Fleet()
    first, second = Link(), Link()
    fleet.join(info_of("decode-0"), first)
    fleet.join(info_of("decode-0"), second)
    assert ids(fleet.by_tokens(Role.DECODE)) == ["decode-0"]
    member = fleet.get("decode-0")
    assert member is not None
    assert member.link is second
    assert "decode-0" in fleet
    assert "decode-1" not in fleet


def test_a_snapshot_stays_as_it_was() -> None:
    fleet: Fleet[Link] = Fleet()
    fleet.join(info_of("decode-0"), Link())
    snapshot = fleet.snapshot()
    with fleet.reservations.hold("decode-0", 5):
        fleet.leave("decode-0")
    assert [(v.instance_id, v.outstanding_tokens) for v in snapshot.of(Role.DECODE)] == [("decode-0", 0)]


def test_the_least_loaded_of_thousands_is_found_by_looking_at_one() -> None:
    looks: list[str] = []

    class Watched(dict[str, Member[Link]]):
        """Members that say who was looked at."""

        def __getitem__(self, instance_id: str) -> Member[Link]:
            looks.append(instance_id)
            return super().__getitem__(instance_id)

    fleet: Fleet[Link] = Fleet()
    fleet._members = Watched()
    for number in range(2000):
        fleet.join(info_of(f"decode-{number}", number), Link())

    def least(view: View) -> InstanceView:
        return next(view.by_tokens(Role.DECODE))

    with fleet.reservations.hold("decode-0", 10):
        looks.clear()
        assert least(fleet).instance_id == "decode-1"
        assert len(looks) == 1
        looks.clear()
        assert least(fleet.without(frozenset({"decode-1", "decode-2"}))).instance_id == "decode-3"
        # Those that are left out are passed by, and nobody else is looked at.
        assert len(looks) == 3
    assert least(fleet).instance_id == "decode-0"
