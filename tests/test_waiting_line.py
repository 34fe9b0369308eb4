"""Who waits for whom."""

from __future__ import annotations

import asyncio
import math

from deploy.virtual_time import run_virtual
from router.waiting_line import TURN_S, WaitingLine


def in_virtual_time(line: WaitingLine, *waits: tuple[float, float], news_s: float = math.inf) -> list[object]:
    """What becomes of requests that ask at 0 s for (until_s, give_up_s): (when, whether it had its turn)."""

    async def main() -> list[object]:
        loop = asyncio.get_running_loop()
        zero_s = loop.time()

        async def wait(until_s: float, give_up_s: float) -> tuple[float, bool]:
            has_turn = await line.turn(zero_s + until_s, zero_s + give_up_s)
            return round(loop.time() - zero_s, 6), has_turn

        if news_s < math.inf:
            loop.call_at(zero_s + news_s, line.news)
        return list(await asyncio.gather(*(wait(*one) for one in waits)))

    found, _ = run_virtual(main())
    assert len(line) == 0
    return found


def test_a_turn_comes_when_there_may_be_room() -> None:
    assert in_virtual_time(WaitingLine(), (2.0, 9.0)) == [(2.0, True)]


def test_no_turn_comes_too_late() -> None:
    assert in_virtual_time(WaitingLine(), (9.0, 2.0)) == [(0.0, False)]
    # Behind one that waits for longer.
    assert in_virtual_time(WaitingLine(), (5.0, 8.0), (1.0, 9.0)) == [(5.0, True), (5.0 + TURN_S, True)]
    assert in_virtual_time(WaitingLine(), (7.9, 8.0), (1.0, 8.001)) == [(7.9, True), (7.91, True)]
    assert in_virtual_time(WaitingLine(), (7.999, 8.0), (1.0, 8.001)) == [(7.999, True), (8.001, False)]


def test_whose_time_is_up_first_is_first_and_turns_do_not_come_at_once() -> None:
    waits = [(1.0, 30.0), (1.0, 10.0), (1.0, 20.0)]
    found = in_virtual_time(WaitingLine(), *waits)
    assert found == [(1.0 + 2 * TURN_S, True), (1.0, True), (1.0 + TURN_S, True)]


def test_news_gives_the_first_its_turn() -> None:
    found = in_virtual_time(WaitingLine(), (5.0, 30.0), (6.0, 40.0), news_s=2.0)
    assert found == [(2.0, True), (6.0, True)]


def test_a_full_line_takes_nobody() -> None:
    found = in_virtual_time(WaitingLine(most=2), (1.0, 9.0), (1.0, 9.0), (1.0, 9.0))
    assert found == [(1.0, True), (1.0 + TURN_S, True), (0.0, False)]


def test_who_leaves_lets_the_next_one_be_first() -> None:
    line = WaitingLine()

    async def main() -> tuple[float, bool]:
        loop = asyncio.get_running_loop()
        zero_s = loop.time()
        first = asyncio.create_task(line.turn(zero_s + 5.0, zero_s + 8.0))
        second = asyncio.create_task(line.turn(zero_s + 1.0, zero_s + 9.0))
        await asyncio.sleep(2.0)
        first.cancel()
        has_turn = await second
        return round(loop.time() - zero_s, 6), has_turn

    found, _ = run_virtual(main())
    assert found == (2.0, True)
    assert len(line) == 0
