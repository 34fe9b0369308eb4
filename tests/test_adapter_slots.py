"""The adapters of one engine: what holds for any order of requests, and how long a slot is waited for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.adapter_slots import FULL, LOADED, ROOM, WAITING, AdapterSlots, adapter_id

names = st.sampled_from("abcdef")
events = st.lists(st.tuples(st.sampled_from(["use", "use", "done", "forget"]), names), max_size=60)


@given(st.integers(1, 3), st.integers(0, 5), events)
def test_whatever_comes(slots: int, host: int, what: list[tuple[str, str]]) -> None:
    """1: no more in slots, or on the host, than there is room for. 2: what is in a slot is on the host.
    3: what requests use is in a slot or waits for one, and waits only while others use all. 4: what is used
    and was in a slot stays there."""
    adapters = AdapterSlots(slots, host)
    for kind, name in what:
        before = {one for one in adapters.in_slots if one in adapters.users}
        was_loaded = adapters.is_loaded(name)
        if kind == "use":
            could_run, waited = adapters.can_run(name), name in adapters.waiting
            loaded = adapters.use(name)
            assert loaded == (could_run and not was_loaded)
            assert (name in adapters.in_slots) == (could_run and not waited)
        elif kind == "done":
            adapters.done(name)
        else:
            adapters.forget(name)
        assert len(adapters.in_slots) <= slots
        assert len(adapters.on_host) <= max(slots, host)
        assert set(adapters.in_slots) <= set(adapters.on_host)
        assert set(adapters.users) <= {*adapters.in_slots, *adapters.waiting}
        assert not set(adapters.waiting) & set(adapters.in_slots)
        if adapters.waiting:
            assert len([one for one in adapters.in_slots if one in adapters.users]) == slots
        assert {one for one in before if one in adapters.users} <= set(adapters.in_slots)


@given(st.integers(1, 3), st.lists(names, max_size=30))
def test_when_all_have_ended_nothing_is_held(slots: int, order: list[str]) -> None:
    adapters = AdapterSlots(slots, slots)
    holds = [adapters.hold(name) for name in order]
    for hold in holds:
        hold.release()
        hold.release()
    assert adapters.users == {}
    assert adapters.waiting == ()
    assert len(adapters.in_slots) == min(slots, len(set(order)))


def test_the_least_recently_used_one_goes_and_never_one_in_use() -> None:
    adapters = AdapterSlots(2, 3)
    adapters.use("a")
    for name in ("b", "c", "d"):
        with adapters.hold(name):
            assert "a" in adapters.in_slots
    assert adapters.in_slots == ("a", "d")
    assert adapters.on_host == ("a", "c", "d")
    assert not adapters.use("c")  # from the host's memory: nothing is loaded
    assert adapters.in_slots == ("a", "c")


def test_a_slot_goes_to_who_waits_longest() -> None:
    adapters = AdapterSlots(1, 4)
    for name in ("a", "b", "c", "b"):
        adapters.use(name)
    assert (adapters.in_slots, adapters.waiting) == (("a",), ("b", "c"))
    assert [adapters.affinity(name) for name in "abd"] == [LOADED, WAITING, FULL]
    adapters.done("a")
    assert (adapters.in_slots, adapters.waiting) == (("b",), ("c",))
    adapters.done("b")
    adapters.done("b")
    adapters.done("c")
    assert adapters.affinity("d") == ROOM
    adapters.done("never was")


def test_a_slot_is_waited_for_until_some_adapter_has_no_requests() -> None:
    adapters = AdapterSlots(2, 4)
    assert adapters.wait_answers("a") == 0.0
    for name in ("a", "a", "a", "b"):
        adapters.use(name)
    assert adapters.wait_answers("a") == 0.0
    assert adapters.wait_answers("c") == pytest.approx(1 / 2)  # b's only one is halfway through
    adapters.use("c")
    assert adapters.wait_answers("c") == pytest.approx(1 / 2)
    assert adapters.wait_answers("d") == pytest.approx(3 / 4)
    adapters.use("d")
    assert adapters.wait_answers("e") == pytest.approx(1 + 1 / 2)


def test_an_engine_without_adapters_has_none_and_lets_nobody_wait() -> None:
    adapters = AdapterSlots()
    assert not adapters.use("a")
    adapters.done("a")
    assert (adapters.in_slots, adapters.users) == ((), {})
    assert adapters.can_run("a")
    assert adapters.wait_answers("a") == 0.0


def test_an_id_follows_from_what_the_adapter_is() -> None:
    assert adapter_id("sql", "/a") == adapter_id("sql", "/a")
    assert len({adapter_id(name, path) for name in ("x", "y", "x/") for path in ("/a", "/b", "a")}) == 9
    assert 1 <= adapter_id("", "") <= 2**62
