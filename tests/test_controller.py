"""Supervision without Ray: lives start, die, start again; hopeless ones do not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.errors import EnvironmentProblem, UnknownInstance
from cluster.instance import GroupRank, InstanceState, Role
from cluster.registry import Membership
from cluster.spec import ClusterSpec, DeadlineSpec, PoolSpec
from cluster.worker import Ready
from deploy import controller as controller_module
from deploy.controller import Controller
from tests.twins import FACTS

SPEC = ClusterSpec(model="m", device="cpu", engine="sim", deadlines=DeadlineSpec(startup_s=2.0, drain_s=1.0))


class FakeWorker:
    def __init__(self, launcher: FakeLauncher, instance_id: str) -> None:
        self.launcher = launcher
        self.instance_id = instance_id
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.killed = False

    async def meeting(self) -> tuple[str, int]:
        return "host-of-" + self.instance_id, 7

    async def start(self, group: GroupRank | None) -> Ready:
        self.group = group
        problem = self.launcher.problems.get(self.instance_id, [])
        if problem:
            raise problem.pop(0)
        facts = self.launcher.facts.get(self.instance_id, FACTS)
        return Ready(address="tcp://127.0.0.1:1", node="n", pid=1, facts=facts)

    async def ended(self) -> str:
        return await self.end

    async def quiet(self, deadline_s: float) -> bool:
        self.launcher.quiet.append(self.instance_id)
        return True

    async def drain(self, deadline_s: float) -> bool:
        if not self.end.done():
            self.end.set_result("drained")
        return True

    async def kill(self) -> None:
        self.killed = True


class FakeLauncher:
    def __init__(self) -> None:
        self.workers: dict[str, list[FakeWorker]] = {}
        self.problems: dict[str, list[Exception]] = {}
        self.facts: dict[str, object] = {}
        self.quiet: list[str] = []
        self.given_up: list[tuple[str, ...]] = []

    async def launch(self, instance_id: str, role: Role, *, index: int, incarnation: str) -> FakeWorker:
        worker = FakeWorker(self, instance_id)
        self.workers.setdefault(instance_id, []).append(worker)
        return worker

    def give_up(self, instance_ids: Sequence[str]) -> None:
        self.given_up.append(tuple(instance_ids))


async def watch_until(controller: Controller, condition: object) -> Membership:
    membership = await controller.watch(-1, 1.0)
    async with asyncio.timeout(5.0):
        while not condition(membership):  # type: ignore[operator]
            membership = await controller.watch(membership.version, 1.0)
    return membership


def all_ready(membership: Membership) -> bool:
    return all(i.state is InstanceState.READY for i in membership.instances)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "RESTART_S", (0.0, 0.001))


async def test_places_are_filled_and_drained() -> None:
    launcher = FakeLauncher()
    controller = Controller(SPEC, launcher)
    await controller.start()
    membership = await watch_until(controller, all_ready)
    assert [i.instance_id for i in membership.instances] == ["prefill-0", "decode-0"]
    assert await controller.stop(1.0)
    assert all(worker.killed for workers in launcher.workers.values() for worker in workers)


async def test_one_instance_is_drained_and_replaced() -> None:
    launcher = FakeLauncher()
    controller = Controller(SPEC, launcher)
    await controller.start()
    first = await watch_until(controller, all_ready)
    draining = asyncio.create_task(
        watch_until(controller, lambda m: m.instances[1].state is InstanceState.DRAINING)
    )
    await asyncio.sleep(0)
    assert await controller.drain("decode-0", 1.0)
    await draining
    again = await watch_until(
        controller, lambda m: all_ready(m) and m.instances[1].incarnation != first.instances[1].incarnation
    )
    assert again.instances[0] == first.instances[0]
    with pytest.raises(UnknownInstance, match=r"'decode-7' is no instance.*prefill-0, decode-0"):
        await controller.drain("decode-7", 1.0)
    await controller.stop(1.0)


async def test_a_life_that_dies_is_followed_by_another_incarnation() -> None:
    launcher = FakeLauncher()
    controller = Controller(SPEC, launcher)
    await controller.start()
    first = await watch_until(controller, all_ready)
    launcher.workers["decode-0"][0].end.set_result("its process died")
    second = await watch_until(controller, lambda m: all_ready(m) and m.version > first.version + 1)
    assert second.instances[1].incarnation != first.instances[1].incarnation
    assert launcher.workers["decode-0"][0].killed
    await controller.stop(1.0)


async def test_a_failed_start_is_tried_again_and_a_hopeless_one_is_not() -> None:
    launcher = FakeLauncher()
    launcher.problems["prefill-0"] = [TimeoutError(), RuntimeError("out of memory")]
    launcher.problems["decode-0"] = [EnvironmentProblem(problem="no GPU", remedy="add one")]
    controller = Controller(SPEC, launcher)
    await controller.start()
    membership = await watch_until(
        controller,
        lambda m: m.instances[0].state is InstanceState.READY and m.instances[1].state is InstanceState.GONE,
    )
    assert membership.instances[1].detail == "no GPU; add one"
    assert membership.instances[1].hopeless == "environment"
    assert len(launcher.workers["prefill-0"]) == 3
    assert len(launcher.workers["decode-0"]) == 1
    await controller.stop(1.0)


async def test_an_engine_that_does_not_fit_is_refused_at_registration() -> None:
    launcher = FakeLauncher()
    launcher.facts["decode-0"] = replace(FACTS, fingerprint=replace(FACTS.fingerprint, block_size_tokens=128))
    controller = Controller(SPEC, launcher)
    await controller.start()
    membership = await watch_until(
        controller, lambda m: {i.state for i in m.instances} == {InstanceState.READY, InstanceState.GONE}
    )
    gone = next(i for i in membership.instances if i.state is InstanceState.GONE)
    assert "block_size_tokens=16" in gone.detail
    assert "block_size_tokens=128" in gone.detail
    await controller.stop(1.0)


async def test_watching_returns_at_the_deadline_when_nothing_changes() -> None:
    controller = Controller(SPEC, FakeLauncher())
    membership = await controller.watch(controller._registry.snapshot().version, 0.01)
    assert membership.instances[0].state is InstanceState.STARTING


def group_spec() -> ClusterSpec:
    return SPEC.model_copy(update={"decode": PoolSpec(count=4, data_parallel_size=2)})


async def test_a_group_starts_at_its_first_instance() -> None:
    launcher = FakeLauncher()
    controller = Controller(group_spec(), launcher)
    await controller.start()
    await watch_until(controller, all_ready)
    assert launcher.workers["prefill-0"][0].group is None
    for number in range(4):
        first = f"host-of-decode-{number // 2 * 2}"
        assert launcher.workers[f"decode-{number}"][0].group == GroupRank(
            rank=number % 2, size=2, host=first, port=7
        )
    await controller.stop(1.0)


async def test_a_group_ends_with_any_of_its_instances() -> None:
    launcher = FakeLauncher()
    controller = Controller(group_spec(), launcher)
    await controller.start()
    first = await watch_until(controller, all_ready)
    launcher.workers["decode-3"][0].end.set_result("its process died")
    again = await watch_until(
        controller, lambda m: all_ready(m) and m.instances[4].incarnation != first.instances[4].incarnation
    )
    assert [i.instance_id for i in again.instances if i not in first.instances] == ["decode-2", "decode-3"]
    assert launcher.workers["decode-2"][0].killed
    await controller.stop(1.0)


async def test_one_that_does_not_start_ends_its_group() -> None:
    launcher = FakeLauncher()
    launcher.problems["decode-1"] = [EnvironmentProblem(problem="no GPU", remedy="add one")]
    controller = Controller(group_spec(), launcher)
    await controller.start()
    membership = await watch_until(
        controller, lambda m: all(m.instances[n].state is InstanceState.READY for n in (0, 3, 4))
    )
    assert [i.hopeless for i in membership.instances[1:3]] == [EnvironmentProblem.reason] * 2
    assert membership.instances[1].detail.startswith("decode-1: no GPU")
    assert launcher.given_up == [("decode-0", "decode-1")]
    await controller.stop(1.0)


async def test_a_group_is_drained_when_none_of_it_computes() -> None:
    launcher = FakeLauncher()
    controller = Controller(group_spec(), launcher)
    await controller.start()
    await watch_until(controller, all_ready)
    assert await controller.drain("decode-1", 1.0)
    assert launcher.quiet == ["decode-0", "decode-1"]
    await controller.stop(1.0)
