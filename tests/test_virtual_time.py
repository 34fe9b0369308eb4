from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

import deploy.virtual_time
from deploy.virtual_time import SimulationDeadlock, SimulationLivelock, VirtualTimeLoop, run_virtual

ROOT = Path(__file__).resolve().parent.parent


def test_a_year_passes_at_once_and_exactly() -> None:
    async def sleeper() -> float:
        await asyncio.sleep(365 * 86400.0)
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    assert run_virtual(sleeper())[0] == 365 * 86400.0
    assert time.monotonic() - began < 5


def test_timers_run_in_the_order_of_their_time_then_of_their_making() -> None:
    seen: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for name, at_s in (("late", 2.0), ("first", 1.0), ("second", 1.0), ("third", 1.0)):
            loop.call_at(at_s, seen.append, name)
        await asyncio.sleep(3)

    run_virtual(main())
    assert seen == ["first", "second", "third", "late"]


def test_a_timer_in_the_past_runs_now_and_time_never_goes_back() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(5)
        times: list[float] = []
        loop.call_at(1.0, lambda: times.append(loop.time()))
        await asyncio.sleep(1)
        return [*times, loop.time()]

    assert run_virtual(main())[0] == [5.0, 6.0]


def test_deadlines_work_and_leave_no_timer() -> None:
    async def main() -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        for _ in range(5000):
            async with asyncio.timeout(60):
                await asyncio.sleep(0.001)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(7):
                await asyncio.Event().wait()
        return loop.time(), len(loop._timers)

    now_s, timers = run_virtual(main())[0]
    assert now_s == pytest.approx(12.0)
    assert timers < 2500


def test_a_blocked_world_names_who_waits() -> None:
    async def waits_for_nobody() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        await asyncio.sleep(3)
        await asyncio.create_task(waits_for_nobody(), name="the-one")

    with pytest.raises(SimulationDeadlock) as caught:
        run_virtual(main())
    assert caught.value.now_s == 3.0
    assert [line.split(" in ")[0] for line in caught.value.waiting] == ["main", "the-one"]
    assert "Event.wait" in str(caught.value)


def test_a_world_that_spins_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.virtual_time, "MAX_CALLBACKS_AT_ONE_TIME", 1000)

    async def main() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(SimulationLivelock, match="no time passed"):
        run_virtual(main())


def test_an_error_of_the_world_comes_out_and_its_tasks_end() -> None:
    ended: list[str] = []

    async def background() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            ended.append("background")

    async def main() -> None:
        task = asyncio.create_task(background())
        await asyncio.sleep(1)
        assert not task.done()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run_virtual(main())
    assert ended == ["background"]


def test_threads_are_refused() -> None:
    async def main() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(RuntimeError, match="thread"):
        run_virtual(main())


def test_two_processes_tell_the_same_story() -> None:
    story = """
import asyncio
from random import Random
from deploy.virtual_time import run_virtual
async def walker(name, rng, log):
    for _ in range(50):
        await asyncio.sleep(rng.choice([0, 0.5, rng.random()]))
        log.append(f"{name} {asyncio.get_running_loop().time()!r}")
async def main():
    log, rng = [], Random(7)
    await asyncio.gather(*(walker(f"w{n}", rng, log) for n in range(20)))
    print("\\n".join(log))
run_virtual(main())
"""
    told = [
        subprocess.run(
            [sys.executable, "-c", story], cwd=ROOT, capture_output=True, check=True, timeout=60
        ).stdout
        for _ in range(2)
    ]
    assert told[0] == told[1]
    assert len(told[0].splitlines()) == 1000
