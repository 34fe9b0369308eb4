"""The virtual token counters: shares by weight, and nobody saves up."""

from __future__ import annotations

import pytest

from router.tenants import ACTIVE_S, MOST_TENANTS, SLACK_TOKENS, Tenants


def test_alone_nobody_is_ahead() -> None:
    tenants = Tenants()
    tenants.came("a", 0.0)
    tenants.served("a", 10**9, 0)
    assert not tenants.is_ahead("a", 1.0)


def test_output_counts_twice_and_weights_divide() -> None:
    tenants = Tenants({"heavy": 4.0})
    for name in ("light", "heavy", "other"):
        tenants.came(name, 0.0)
    tenants.served("light", SLACK_TOKENS, 1)
    tenants.served("heavy", 2 * SLACK_TOKENS, SLACK_TOKENS)  # four times as much, and a quarter of the slack
    assert tenants.is_ahead("light", 1.0)
    assert tenants.is_ahead("heavy", 1.0)
    tenants.served("heavy", -4 * SLACK_TOKENS + SLACK_TOKENS, 0)  # they were not computed after all
    assert not tenants.is_ahead("heavy", 2.0)
    assert not tenants.is_ahead("other", 2.0)


def test_who_comes_back_begins_with_the_least_served() -> None:
    tenants = Tenants()
    tenants.came("old", 0.0)
    for number in range(100):
        tenants.came("busy", float(number))
        tenants.served("busy", SLACK_TOKENS, 0)
    tenants.came("old", 100.0)
    tenants.served("old", 1, 0)
    assert not tenants.is_ahead("old", 101.0)
    assert not tenants.is_ahead("busy", 101.0)
    tenants.served("busy", SLACK_TOKENS + 2, 0)
    assert tenants.is_ahead("busy", 102.0)
    tenants.came("busy", 100.0 + ACTIVE_S)  # the other has gone again
    assert not tenants.is_ahead("busy", 100.0 + ACTIVE_S)


def test_those_that_went_are_forgotten() -> None:
    tenants = Tenants()
    for number in range(MOST_TENANTS + 50):
        tenants.came(f"t{number}", 0.0)
    tenants.came("new", ACTIVE_S + 1.0)
    assert len(tenants._known) == MOST_TENANTS + 1


@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75)])
def test_two_that_always_ask_get_their_shares(weight: float, share: float) -> None:
    tenants = Tenants({"a": weight})
    got = {"a": 0, "b": 0}
    now_s = 0.0
    for _ in range(4000):
        now_s += 0.2
        for name in got:
            tenants.came(name, now_s)
        # Room for one request: who is not ahead takes it.
        name = "b" if tenants.is_ahead("a", now_s) else "a"
        tenants.served(name, 1000, 0)
        got[name] += 1
    assert got["a"] / 4000 == pytest.approx(share, abs=0.05)
