"""Running requests that go on at another instance, on twins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import cast

import pytest

from cluster.errors import ServingError
from cluster.instance import InstanceState
from cluster.request import Handoff
from router import read_ahead
from router.hop import Hop, HopKind
from router.read_ahead import ReadAhead, tokens_ahead
from tests.twins import TwinCluster, expected_tokens, until

PROMPT = list(range(200, 240))
Make = Callable[..., TwinCluster]
PLACES = ("prefill-0", "decode-0", "decode-1")


@pytest.fixture(params=["read at the end", "read ahead"])
def cluster_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Where the next engine hears nothing before this one's end, and where it does."""
    monkeypatch.setattr(read_ahead, "TOLD_S", 0.0)  # these engines hear at once
    chunk = 1000 if request.param == "read ahead" else 0
    return partial(TwinCluster, chunk=chunk)


def count(cluster: TwinCluster, cause: str) -> float:
    return float(cluster.metrics.migrations.labels(cause=cause)._value.get())


async def running(cluster: TwinCluster, name: str, tokens: int, at_least: int = 3) -> str:
    """A request that has some tokens; returns where it decodes."""
    cluster.submit(name, PROMPT, tokens)
    await until(lambda: len(cluster.tokens.get(name, [])) >= at_least)
    return cluster.router._runs[name].decodes_at


async def test_a_stream_goes_on_elsewhere_without_a_gap_in_its_tokens(cluster_of: Make) -> None:
    cluster = cluster_of(*PLACES)
    here = await running(cluster, "a", 50)
    there = "decode-1" if here == "decode-0" else "decode-0"
    assert cluster.router.migrations.begin("a", there)
    run = cluster.router._runs["a"]
    assert run.moves_to == there
    await until(lambda: run.decodes_at == there)
    assert not run.moves_to
    # Its room is where it is now.
    assert cluster.router.reservations.tokens(here) == 0
    assert cluster.router.reservations.tokens(there) > len(PROMPT)
    await cluster.settle()
    assert cluster.tokens["a"] == expected_tokens(PROMPT, 50)
    assert "a" in cluster.finished
    assert not cluster.errors
    assert count(cluster, "asked") == 1
    samples = cluster.metrics.migration_stall_seconds.collect()[0].samples
    (stalls,) = [sample.value for sample in samples if sample.name.endswith("_count")]
    assert stalls == 1
    kinds = [hop.kind for twin in cluster.instances.values() for hop in twin.sent]
    assert sorted(kinds) == [HopKind.DECODE, HopKind.DECODE, HopKind.PREFILL]
    cluster.assert_nothing_held()


@pytest.mark.parametrize("seed", range(8))
async def test_any_number_of_moves_at_any_time(cluster_of: Make, seed: int) -> None:
    random = Random(seed)
    cluster = cluster_of(*PLACES, "decode-2")
    names = [f"r{n}" for n in range(12)]
    lengths = {name: random.randint(1, 200) for name in names}
    for name in names:
        cluster.submit(name, PROMPT, lengths[name])
    while cluster.router.pending:
        name = random.choice(names)
        cluster.router.migrations.begin(name, f"decode-{random.randrange(3)}")
        if random.random() < 0.02:
            cluster.router.abort([name])
            lengths.pop(name, None)
        await asyncio.sleep(0)
    assert count(cluster, "asked") > 12
    for name, length in lengths.items():
        assert cluster.tokens[name] == expected_tokens(PROMPT, length), name
    assert not cluster.errors
    cluster.assert_nothing_held()


async def test_an_unsplit_request_moves_too(cluster_of: Make) -> None:
    cluster = cluster_of(*PLACES)
    cluster.submit("a", PROMPT[:1], 40)
    await until(lambda: len(cluster.tokens.get("a", [])) >= 3)
    here = cluster.router._runs["a"].decodes_at
    cluster.router.migrations.begin("a", "decode-1" if here != "decode-1" else "decode-0")
    await cluster.settle()
    assert cluster.tokens["a"] == expected_tokens(PROMPT[:1], 40)
    cluster.assert_nothing_held()


async def test_who_can_not_move_stays(cluster_of: Make) -> None:
    cluster = cluster_of(*PLACES)
    migrations = cluster.router.migrations
    cluster.submit("state", PROMPT, 30, handoff=Handoff.KV_ONLY)
    here = await running(cluster, "a", 30)
    await until(lambda: len(cluster.tokens.get("state", [])) >= 3)
    assert not migrations.begin("state", "decode-0")
    assert not migrations.begin("state", "decode-1")
    assert not migrations.begin("a", here)
    assert not migrations.begin("a", "decode-7")
    assert not migrations.begin("nobody", "decode-0")
    assert migrations.begin("a", "decode-1" if here == "decode-0" else "decode-0")
    assert not migrations.begin("a", "decode-0"), "it is moving"
    await cluster.settle()
    assert cluster.tokens["state"] == expected_tokens(PROMPT, 30)
    cluster.assert_nothing_held()


async def test_an_engine_that_does_not_hand_over_ends_the_request_itself(
    cluster_of: Make,
) -> None:
    """It waits there, say, preempted; or it ended meanwhile."""
    cluster = cluster_of(*PLACES)
    here = await running(cluster, "a", 20)
    cluster.instances[here].deaf = True
    assert cluster.router.migrations.begin("a", "decode-1" if here == "decode-0" else "decode-0")
    await cluster.settle()
    assert cluster.tokens["a"] == expected_tokens(PROMPT, 20)
    cluster.assert_nothing_held()


@pytest.mark.parametrize("dies", ["source", "target"])
async def test_a_death_in_between_costs_a_recomputation(cluster_of: Make, dies: str) -> None:
    cluster = cluster_of(*PLACES, "decode-2")
    here = await running(cluster, "a", 40)
    there = next(name for name in ("decode-0", "decode-1") if name != here)
    cluster.instances[there].stalls_at = 0  # it has the request and gives nothing
    cluster.router.migrations.begin("a", there)
    await until(lambda: any(hop.kind is HopKind.DECODE for hop in cluster.instances[there].sent))
    cluster.instances[there].stalls_at = 1 << 30
    cluster.instances[here if dies == "source" else there].kill()
    await cluster.settle()
    assert cluster.tokens["a"] == expected_tokens(PROMPT, 40)
    assert not cluster.errors
    cluster.assert_nothing_held()


async def test_a_target_that_left_before_costs_one_too(cluster_of: Make) -> None:
    cluster = cluster_of(*PLACES)
    here = await running(cluster, "a", 40)
    there = next(name for name in ("decode-0", "decode-1") if name != here)
    cluster.router.migrations.begin("a", there)
    cluster.instances[there].kill()
    await cluster.settle()
    assert cluster.tokens["a"] == expected_tokens(PROMPT, 40)
    cluster.assert_nothing_held()


async def test_a_client_that_leaves_in_between_leaves_nothing(cluster_of: Make) -> None:
    cluster = cluster_of(*PLACES)
    here = await running(cluster, "a", 40)
    there = next(name for name in ("decode-0", "decode-1") if name != here)
    cluster.instances[there].stalls_at = 0
    cluster.router.migrations.begin("a", there)
    await until(lambda: bool(cluster.instances[here].kept))
    cluster.router.abort(["a"])
    await cluster.settle()
    cluster.assert_nothing_held()


async def test_what_runs_on_an_instance_that_drains_goes_on_elsewhere(cluster_of: Make) -> None:
    cluster = cluster_of(*PLACES)
    for name in "abcd":
        await running(cluster, name, 60)
    cluster.router.update(replace(cluster.instances["decode-0"].info, state=InstanceState.DRAINING))
    await until(lambda: not any(run.decodes_at == "decode-0" for run in cluster.router._runs.values()))
    assert all(len(cluster.tokens[name]) < 60 for name in "abcd"), "they did not just end"
    assert count(cluster, "drain") == 2
    await cluster.settle()
    for name in "abcd":
        assert cluster.tokens[name] == expected_tokens(PROMPT, 60)
    assert not cluster.errors
    cluster.assert_nothing_held()


async def test_what_is_on_its_way_to_an_instance_that_drains_goes_on_elsewhere_too(
    cluster_of: Make,
) -> None:
    cluster = cluster_of(*PLACES)
    cluster.submit("a", PROMPT, 1_000_000)
    cluster.router.update(replace(cluster.instances["decode-0"].info, state=InstanceState.DRAINING))
    assert count(cluster, "drain") == 0
    await until(lambda: "decode-0" not in (run := cluster.router._runs["a"]).decodes_at and run.decodes_at)
    assert count(cluster, "drain") == 1
    # Another life in its place is as any other.
    cluster.router.leave("decode-0", why="drained")
    cluster.add("decode-0")
    cluster.submit("b", PROMPT, 200)
    await until(lambda: "b" not in cluster.router._runs)
    assert count(cluster, "drain") == 1
    cluster.router.abort(["a"])
    await cluster.settle()
    cluster.assert_nothing_held()


async def test_an_unknown_error_of_the_target_is_its_own(cluster_of: Make) -> None:
    """A target that refuses the request fails it there; it is computed anew elsewhere."""
    cluster = cluster_of(*PLACES, "decode-2")
    here = await running(cluster, "a", 40)
    there = next(name for name in ("decode-0", "decode-1") if name != here)
    cluster.instances[there].stalls_at = 0
    cluster.router.migrations.begin("a", there)
    await until(lambda: bool(cluster.instances[there].tasks))
    (hop_id,) = cluster.instances[there].tasks
    cluster.router.fail_hop(hop_id, there, "it can't be read")
    cluster.instances[there].abort([hop_id])
    await cluster.settle()
    assert cluster.tokens["a"] == expected_tokens(PROMPT, 40)
    assert not [error for error in cluster.errors.values() if isinstance(error, ServingError)]
    cluster.assert_nothing_held()


@pytest.mark.parametrize("late", [0, 1])
async def test_its_next_engine_is_sent_it_before_and_goes_on_with_what_came_meanwhile(late: int) -> None:
    """Unless its engine gave more tokens than were agreed on: then it moves as if nothing had been read."""
    cluster = TwinCluster(*PLACES, chunk=1000)
    here = await running(cluster, "a", 400)
    there = next(name for name in ("decode-0", "decode-1") if name != here)
    source, reader = cluster.instances[here], cluster.instances[there]
    assert cluster.router.migrations.begin("a", there)
    assert cluster.router.reservations.tokens(there) >= len(PROMPT), "its room is kept for it"
    (hop_id,) = reader.following
    hop = reader.sent[-1]
    known = len(PROMPT) + len(cluster.tokens["a"])
    assert hop.prompt_token_ids == PROMPT + cluster.tokens["a"] + [0] * hop.unknown
    assert hop.follows == known + hop.unknown
    (source_id,) = source.handing_over
    source.handing_over[source_id] += late
    await until(lambda: cluster.router._runs["a"].decodes_at == there)
    assert not reader.following
    if late:
        assert [hop.hop_id for hop in reader.sent] == [hop_id, hop_id.replace("~3", "~4")]
        assert not reader.gone_on
    else:
        (message,) = reader.gone_on
        assert len(message.token_ids) == message.replaces + 1
        assert hop.prompt_token_ids == (PROMPT + expected_tokens(PROMPT, 400))[: len(hop.prompt_token_ids)]
        assert len(hop.prompt_token_ids) == known + message.replaces + 1
    await cluster.settle()
    assert cluster.tokens["a"] == expected_tokens(PROMPT, 400)
    assert not cluster.errors
    cluster.assert_nothing_held()


@pytest.mark.parametrize(
    ("copy_s", "token_s", "left", "expected"),
    [(0.0, 0.03, 100, 3), (0.3, 0.03, 100, 13), (0.3, 0.03, 8, 7), (0.3, 0.0, 8, 2), (9.0, 0.01, 999, 256)],
)
def test_a_move_is_put_off_for_as_long_as_copying_takes(
    copy_s: float, token_s: float, left: int, expected: int
) -> None:
    assert tokens_ahead(copy_s, token_s, left) == expected


async def test_nobody_moves_to_an_instance_that_drains() -> None:
    cluster = TwinCluster(*PLACES)
    here = await running(cluster, "a", 30)
    there = next(name for name in ("decode-0", "decode-1") if name != here)
    cluster.router.update(replace(cluster.instances[there].info, state=InstanceState.DRAINING))
    assert not cluster.router.migrations.begin("a", there)
    await cluster.settle()


async def test_a_move_that_its_engine_does_not_hear_of_holds_nothing_and_may_be_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.migrations.EVERY_S", 0.0)
    cluster = TwinCluster(*PLACES, chunk=1000)
    here = await running(cluster, "a", 3000)
    there = next(name for name in ("decode-0", "decode-1") if name != here)
    run, migrations = cluster.router._runs["a"], cluster.router.migrations
    cluster.instances[here].deaf = True
    assert migrations.begin("a", there)
    assert run.moves_to == there
    assert not migrations.begin("a", there), "it is moving"
    await until(lambda: not run.moves_to)
    assert not cluster.instances[there].following
    assert cluster.router.reservations.tokens(there) == 0
    cluster.instances[here].deaf = False
    assert migrations.begin("a", there)
    await until(lambda: run.decodes_at == there)
    await cluster.settle()
    assert cluster.tokens["a"] == expected_tokens(PROMPT, 3000)
    assert not cluster.errors
    cluster.assert_nothing_held()


async def test_a_target_that_is_lost_while_it_reads_ahead_costs_no_recomputation() -> None:
    cluster = TwinCluster(*PLACES, "decode-2", chunk=1000)
    here = await running(cluster, "a", 2000)
    there, other = (name for name in ("decode-0", "decode-1", "decode-2") if name != here)
    assert cluster.router.migrations.begin("a", there)
    cluster.instances[there].kill()
    run = cluster.router._runs["a"]
    await until(lambda: run.decodes_at == other)
    await cluster.settle()
    assert cluster.tokens["a"] == expected_tokens(PROMPT, 2000)
    assert [hop.kind for twin in cluster.instances.values() for hop in twin.sent].count(HopKind.PREFILL) == 1
    assert not cluster.errors
    cluster.assert_nothing_held()


@pytest.mark.parametrize(
    ("generated", "held", "has_ended"), [(7, 20, False), (8, 20, False), (7, 21, False), (7, 20, True)]
)
def test_who_has_read_ahead_goes_on_only_with_what_was_expected(
    generated: int, held: int, has_ended: bool
) -> None:
    """As many tokens, and KV of as many: an engine that guesses tokens may have computed more."""
    ahead, closed, reader = ReadAhead(), [], SimpleNamespace(follows=20, has_ended=has_ended)

    @contextmanager
    def opening() -> Iterator[None]:
        yield
        closed.append(1)

    ahead.begin(cast(Hop, reader), opening(), 7)
    with ExitStack() as opened:
        fits = (generated, held, has_ended) == (7, 20, False)
        assert ahead.take(generated, held, opened) is (reader if fits else None)
        assert closed == ([] if fits else [1])
    assert closed == [1]
