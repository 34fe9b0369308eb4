"""The log of decisions: what a line says, when it is on disk, what it may cost."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from random import Random

import pytest

from cluster.errors import SpecError
from cluster.instance import Role
from cluster.request import ServeRequest
from cluster.spec import IngressSpec
from router import decision_log
from router.decision_log import DecisionLog, log_path, read_decisions
from router.policy import Decision, LeastTokens
from router.view import ClusterView, InstanceView
from tests.twins import TwinCluster

FULL = Path("/dev/full")
REQUEST = ServeRequest(request_id="r-1", prompt_token_ids=[1, 2, 3], max_tokens=8)
DECISION = Decision(
    prefill="prefill-0",
    decode="decode-0",
    link="network",
    reason="why",
    candidates=(("prefill-0", 1.0), ("decode-0", 2.0)),
)


def twins() -> TwinCluster:
    return TwinCluster("prefill-0", "prefill-1", "decode-0", "decode-1")


def log_of(path: Path) -> DecisionLog:
    return DecisionLog(path, twins().router.fleet)


async def test_each_decision_of_a_router_is_a_line_with_what_it_saw(tmp_path: Path) -> None:
    cluster = twins()
    log = DecisionLog(tmp_path / "d.jsonl", cluster.router.fleet, lambda name: f"cmpl-{name}")
    log.open()
    cluster.router.on_decision = log.add
    for number in range(3):
        cluster.submit(f"r{number}", [1] * (10 + number), 4)
    await cluster.settle()
    await log.close()
    lines = read_decisions(tmp_path / "d.jsonl")
    assert [(line.request, line.external, line.prompt_tokens, line.max_tokens) for line in lines] == [
        (f"r{number}", f"cmpl-r{number}", 10 + number, 4) for number in range(3)
    ]
    first, second, third = lines
    assert first.outstanding == {"prefill-0": 0, "prefill-1": 0, "decode-0": 0, "decode-1": 0}
    assert (first.prefill, second.prefill, third.prefill) == ("prefill-0", "prefill-1", "prefill-0")
    # Room is reserved at both at once, where it decodes too.
    assert second.outstanding["prefill-0"] == second.outstanding["decode-0"] == 10
    assert third.scores == {"prefill-0": 10.0, "decode-0": 10.0}
    assert 0 <= first.now_s <= second.now_s < 1


async def test_a_logged_decision_replays_to_the_same_decision(tmp_path: Path) -> None:
    cluster = twins()
    log = DecisionLog(tmp_path / "d.jsonl", cluster.router.fleet)
    log.open()
    cluster.router.on_decision = log.add
    rng = Random(1)
    for number in range(60):
        cluster.submit(f"r{number}", [1] * rng.randrange(1, 200), rng.randrange(1, 20))
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
    await cluster.settle()
    await log.close()
    infos = {name: twin.info for name, twin in cluster.instances.items()}
    for line in read_decisions(tmp_path / "d.jsonl"):
        views = [
            InstanceView(info=infos[name], outstanding_tokens=tokens)
            for name, tokens in line.outstanding.items()
        ]
        view = ClusterView(
            prefill=tuple(v for v in views if v.info.role is Role.PREFILL),
            decode=tuple(v for v in views if v.info.role is Role.DECODE),
        )
        again = LeastTokens().decide(REQUEST, view, 0.0)
        assert (again.prefill, again.decode, again.reason) == (line.prefill, line.decode, line.reason)


async def test_lines_are_on_disk_after_a_second_without_a_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_log, "FLUSH_S", 0.01)
    path = tmp_path / "d.jsonl"
    log = log_of(path)
    log.open()
    for expected in (1, 2):
        log.add(REQUEST, DECISION, 0.0)
        assert path.read_bytes().count(b"\n") == expected - 1
        async with asyncio.timeout(5):
            while path.read_bytes().count(b"\n") < expected:
                await asyncio.sleep(0.001)
    await log.close()
    assert len(read_decisions(path)) == 2


async def test_a_decision_made_while_lines_are_written_is_written_next(tmp_path: Path) -> None:
    log = log_of(tmp_path / "d.jsonl")
    log.open()
    log.add(REQUEST, DECISION, 0.0)
    assert log._timer is not None
    log._timer.cancel()
    log._start_writing()
    await asyncio.sleep(0)
    log.add(REQUEST, DECISION, 1.0)
    await log.close()
    assert len(read_decisions(tmp_path / "d.jsonl")) == 2


async def test_a_disk_that_is_too_slow_costs_lines_and_not_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decision_log, "MOST_WAITING_LINES", 2)
    log = log_of(tmp_path / "d.jsonl")
    log.open()
    for _ in range(5):
        log.add(REQUEST, DECISION, 0.0)
    await log.close()
    assert len(read_decisions(tmp_path / "d.jsonl")) == 2
    assert "lost 3 decisions" in caplog.text


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
async def test_a_disk_that_is_full_is_said_once_and_ends_no_request(caplog: pytest.LogCaptureFixture) -> None:
    log = log_of(FULL)
    log.open()
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            log.add(REQUEST, DECISION, 0.0)
            await log._write()
    await log.close()
    assert caplog.text.count("No space left") == 1


async def test_a_file_that_can_not_be_written_is_a_bad_spec(tmp_path: Path) -> None:
    log = log_of(tmp_path / "none" / "d.jsonl")
    with pytest.raises(SpecError, match=r"ingress\.decision_log.*No such file"):
        log.open()
    await log.close()


async def test_opening_again_keeps_what_is_there(tmp_path: Path) -> None:
    for _ in range(2):
        log = log_of(tmp_path / "d.jsonl")
        log.open()
        log.add(REQUEST, DECISION, 0.0)
        await log.close()
    assert len(read_decisions(tmp_path / "d.jsonl")) == 2


def test_each_of_several_replicas_has_a_file_of_its_own() -> None:
    assert log_path(IngressSpec(), "ingress-1") is None
    assert log_path(IngressSpec(decision_log="logs/d.jsonl"), "ingress-1") == Path("logs/d.jsonl")
    several = IngressSpec(decision_log="logs/d.jsonl", replicas=2)
    assert log_path(several, "ingress-1") == Path("logs/d.ingress-1.jsonl")


def test_a_line_that_is_no_decision_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"now_s": 1}\n')
    with pytest.raises(ValueError, match="request"):
        read_decisions(tmp_path / "d.jsonl")
