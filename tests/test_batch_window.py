"""How many requests are under way at once, on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from deploy.virtual_time import run_virtual
from router.batch_window import FIRST, FIRST_PAUSE_S, MOST_PAUSE_S, Window


def run(main: Coroutine[Any, Any, None]) -> None:
    run_virtual(main)


async def serve(window: Window, seconds: float, capacity: int, under_way: list[int]) -> None:
    """A request that is refused beyond a capacity, and asks again."""
    while True:
        entered_s = await window.enter()
        try:
            if under_way[0] >= capacity:
                window.refused(entered_s)
                continue
            under_way[0] += 1
            under_way[1] = max(under_way)
            await asyncio.sleep(seconds)
            under_way[0] -= 1
            window.served()
            return
        finally:
            window.leave()


def test_it_grows_to_what_there_is_and_all_are_served() -> None:
    async def scenario() -> None:
        window, under_way = Window(64), [0, 0]
        async with asyncio.TaskGroup() as group:
            for _ in range(2000):
                group.create_task(serve(window, 1.0, 20, under_way))
        assert under_way == [0, 20]
        assert window.inside == 0
        # 2,000 seconds of work for 20 at once: between a half and all of them were busy.
        assert 100 <= asyncio.get_running_loop().time() < 200
        window.close()

    run(scenario())


def test_without_a_refusal_it_doubles_up_to_its_bound() -> None:
    async def scenario() -> None:
        window, under_way = Window(64), [0, 0]
        async with asyncio.TaskGroup() as group:
            for _ in range(400):
                group.create_task(serve(window, 1.0, 1000, under_way))
        assert window.size == 64
        assert under_way[1] == 64
        # 4, 8, 16, 32 and 64 at once, and 64 from then on.
        assert asyncio.get_running_loop().time() == pytest.approx(10.0)

    run(scenario())


def test_one_wave_of_refusals_halves_it_once_and_waits_longer_each_time() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        window = Window(64)
        entered = [await window.enter() for _ in range(int(FIRST))]
        await asyncio.sleep(1.0)
        for one in entered:
            window.refused(one)
            window.leave()
        assert window.size == FIRST / 2
        pause_s = FIRST_PAUSE_S
        for _ in range(8):
            since_s = loop.time()
            entered_s = await window.enter()
            assert entered_s - since_s == pytest.approx(pause_s)
            pause_s = min(MOST_PAUSE_S, 2 * pause_s)
            window.refused(entered_s)
            window.leave()
        assert window.size == 1.0
        window.close()

    run(scenario())


def test_who_leaves_the_queue_takes_no_place() -> None:
    async def scenario() -> None:
        window = Window(1)
        await window.enter()
        waiting = [asyncio.create_task(window.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        window.leave()
        waiting[1].cancel()  # its turn has come, and it does not know yet
        await asyncio.wait(waiting)
        assert [task.cancelled() for task in waiting] == [True, True, False]
        assert window.inside == 1

    run(scenario())
