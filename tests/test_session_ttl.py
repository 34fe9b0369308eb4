"""How long a session's KV is kept, and what the router makes of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.request import ServeRequest
from router.session_ttl import DEFAULT_S, LEAST_GAPS, SessionTtl, Turn, WithSession, best_times
from router.view import ClusterView
from tests.twins import TwinCluster

TRACE = Path(__file__).resolve().parents[2] / "shared/traces/agentic/lmcache_agentic_sample.jsonl.gz"


def turns_of(sessions: SessionTtl, gaps: list[float], *, last_ones: int = 0) -> None:
    """Sessions of two turns, and some of one."""
    for number in range(last_ones):
        sessions.computed(f"last-{number}", Turn("prefill-0", 10, 0.0, 0.0))
    for number, gap in enumerate(gaps):
        sessions.came(f"s{number}", 0.0)
        sessions.computed(f"s{number}", Turn("prefill-0", 10, 1.0, 1.0))
        sessions.came(f"s{number}", 1.0 + gap)


def test_with_few_gaps_the_default() -> None:
    sessions = SessionTtl()
    turns_of(sessions, [0.1] * (LEAST_GAPS - 1))
    assert sessions.keep_s(0.001) == DEFAULT_S
    sessions.came("s0", 50.0)  # no turn is open: no gap
    assert sessions.keep_s(0.001) == DEFAULT_S


def test_a_gap_that_is_shorter_than_what_is_saved_is_waited_for() -> None:
    sessions = SessionTtl()
    turns_of(sessions, [0.5] * 60 + [20.0] * 40)
    assert sessions.keep_s(0.8) == 0.0  # 0.6 x 0.8 - 0.5 < 0
    assert sessions.keep_s(1.0) == pytest.approx(0.5)
    assert sessions.keep_s(45.0) == pytest.approx(0.5)  # 0.4 x 45 < 19.5
    assert sessions.keep_s(50.0) == pytest.approx(20.0)
    # A tenth of the memory costs a tenth.
    assert sessions.keep_s(0.1, share=0.1) == pytest.approx(0.5)
    assert sessions.keep_s(0.08, share=0.1) == 0.0
    for _ in range(1000):
        sessions.waited(0.5)
    assert sessions.keep_s(0.8) == pytest.approx(0.5)  # with the queue that it need not stand in


def test_turns_that_were_the_last_count() -> None:
    sessions = SessionTtl()
    turns_of(sessions, [0.5] * 100, last_ones=100)
    assert sessions.keep_s(0.9) == 0.0
    assert sessions.keep_s(1.1) == pytest.approx(0.5)


@given(
    st.lists(st.floats(0, 30), min_size=1, max_size=60),
    st.floats(0.001, 1),
    st.floats(0, 100),
)
def test_nothing_is_better_than_what_is_chosen(gaps: list[float], share: float, benefit: float) -> None:
    gaps.sort()
    times = best_times(gaps, share)

    def worth(tau: float) -> float:
        return share * sum(gap <= tau for gap in gaps) / len(gaps) * benefit - tau

    assert times == sorted(times)
    chosen = max((tau for least, tau in times if least < benefit), default=0.0)
    assert worth(chosen) >= max([0.0, *map(worth, gaps)]) - 1e-6


def asking(session_id: str, tokens: int) -> ServeRequest:
    return ServeRequest(
        request_id="r", prompt_token_ids=[1] * tokens, max_tokens=2, session_id=session_id, plain_prompt=False
    )


def test_what_is_kept_for_a_session_counts_as_cached_until_its_time_is_over() -> None:
    sessions = SessionTtl()
    sessions.computed("a", Turn("prefill-1", 40, 5.0, 7.0))
    assert sessions.kept(asking("a", 60), 6.0) == {"prefill-1": 40}
    assert sessions.kept(asking("a", 60), 7.5) == {}
    assert sessions.kept(asking("a", 40), 6.0) == {}  # another prompt than that one and more
    assert sessions.kept(asking("b", 60), 6.0) == {}
    view = WithSession(ClusterView(prefill=(), decode=()), sessions.kept(asking("a", 60), 6.0))
    assert view.cached(asking("a", 60)) == {"prefill-1": 40}
    assert view.without(frozenset()).cached(asking("a", 60)) == {"prefill-1": 40}


def test_memory_is_bounded() -> None:
    sessions = SessionTtl(most_sessions=10)
    for number in range(100):
        sessions.computed(f"s{number}", Turn("prefill-0", 40, 5.0, 7.0))
    assert len(sessions) == 10
    assert not sessions.kept(asking("s0", 60), 6.0)
    assert sessions.kept(asking("s99", 60), 6.0)
    sessions.came("s0", 9.0)


async def test_prompts_of_sessions_are_kept_where_prompts_are_computed() -> None:
    cluster = TwinCluster("prefill-0", "decode-0", keeps_sessions=True)
    for name, session_id in (("a", "s"), ("b", "")):
        cluster.router.submit(
            ServeRequest(request_id=name, prompt_token_ids=[1] * 20, max_tokens=4, session_id=session_id)
        )
    await cluster.settle()
    kept = {hop.hop_id: hop.keep_s for one in cluster.instances.values() for hop in one.sent}
    assert kept == {"a~1": DEFAULT_S, "a~2": 0.0, "b~1": 0.0, "b~2": 0.0}
    cluster.assert_nothing_held()


async def test_without_the_switch_nothing_is_kept() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.router.submit(
        ServeRequest(request_id="a", prompt_token_ids=[1] * 20, max_tokens=4, session_id="s")
    )
    await cluster.settle()
    assert not any(hop.keep_s for one in cluster.instances.values() for hop in one.sent)


@pytest.mark.skipif(not TRACE.is_file(), reason="the shared traces are not beside the checkout")
def test_real_gaps_of_tools_are_waited_for_where_it_pays() -> None:
    gaps = []
    with gzip.open(TRACE, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["pre_gap_s"] > 0:
                gaps.append(row["pre_gap_s"])
    gaps = gaps[::5]  # of all agents, no more than are remembered
    sessions = SessionTtl()
    turns_of(sessions, gaps)
    reloads = [0.01, 0.5, 1.0, 2.0, 5.0, 20.0]
    kept = [sessions.keep_s(reload_s) for reload_s in reloads]
    assert kept == sorted(kept)
    assert all(keep_s < reload_s for keep_s, reload_s in zip(kept, reloads, strict=True))
    assert kept[0] == 0.0
    assert sum(gap <= kept[2] for gap in gaps) > 0.25 * len(gaps)
    assert sum(gap <= kept[4] for gap in gaps) > 0.6 * len(gaps)
