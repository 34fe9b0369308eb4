"""An asyncio loop whose clock jumps to the next timer: code that waits costs nothing, and nothing depends on
the machine.

Callbacks that are due at the same time run in the order in which they were scheduled, so one seed gives one
history in every process. A world in which everybody waits and no timer is left ends with
`SimulationDeadlock`.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, NoReturn, TypeVar, TypeVarTuple

from cluster.errors import ServingError

_Result = TypeVar("_Result")
_Ts = TypeVarTuple("_Ts")
# A step of work without any timer in between: more than any request causes, less than a user waits for.
MAX_CALLBACKS_AT_ONE_TIME = 10_000_000


class SimulationDeadlock(ServingError):
    """Nobody can go on: tasks wait and no timer is left. Facts: `now_s`, `waiting` (a line per task)."""

    reason = "simulation-deadlock"

    now_s: float
    waiting: list[str]

    def describe(self) -> str:
        tasks = "; ".join(self.waiting) or "none"
        return f"at {self.now_s:.6f} s of virtual time nothing is due any more; waiting tasks: {tasks}"


class SimulationLivelock(ServingError):
    """Callbacks run without end and time stands still. Facts: `now_s`, `callbacks`, `last`."""

    reason = "simulation-livelock"

    now_s: float
    callbacks: int
    last: str

    def describe(self) -> str:
        return (
            f"at {self.now_s:.6f} s of virtual time {self.callbacks:,} callbacks ran and no time passed; "
            f"the next one is {self.last}"
        )


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """The loop. Threads and sockets have no place in it: they would bring the real clock in.

    Attributes:
        events: callbacks run so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._sequence = 0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._cancelled = 0
        self._at_this_time = 0
        self.events = 0

    def time(self) -> float:
        return self._now_s

    def call_soon(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def call_later(
        self, delay: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        timer._scheduled = True  # type: ignore[attr-defined]  # a cancel is then reported below
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, timer))
        return timer

    def run_in_executor(  # type: ignore[override]  # it never returns
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> NoReturn:
        raise RuntimeError(f"{func!r} wants a thread, which virtual time can't wait for")

    # --- what BaseEventLoop asks of a loop

    def _run_once(self) -> None:
        ready = self._ready  # type: ignore[attr-defined]
        if not ready:
            self._jump(ready)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            self.events += 1
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # the edge of the loop, as asyncio.Handle has it
                self.call_exception_handler(
                    {"message": f"exception in {handle!r}", "exception": error, "handle": handle}
                )
        self._at_this_time += 1
        if self._at_this_time > MAX_CALLBACKS_AT_ONE_TIME:
            raise SimulationLivelock(
                now_s=self._now_s, callbacks=self._at_this_time, last=repr(ready[0]) if ready else "none"
            )

    def _jump(self, ready: Any) -> None:
        """Go to the time of the next timer and make all that are due then ready."""
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)[2]._scheduled = False  # type: ignore[attr-defined]
            self._cancelled -= 1
        if not timers:
            if self._stopping:  # type: ignore[attr-defined]
                return
            raise SimulationDeadlock(now_s=self._now_s, waiting=self._waiting())
        due_s = timers[0][0]
        if due_s > self._now_s:
            self._now_s = due_s
            self._at_this_time = 0
        while timers and timers[0][0] <= due_s:
            timer = heapq.heappop(timers)[2]
            timer._scheduled = False  # type: ignore[attr-defined]
            if timer._cancelled:
                self._cancelled -= 1
            else:
                ready.append(timer)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        # Deadlines are nearly always cancelled: dropped in bulk, else they would fill the memory.
        self._cancelled += 1
        if self._cancelled > 1000 and self._cancelled * 2 > len(self._timers):
            alive = []
            for entry in self._timers:
                if entry[2]._cancelled:
                    entry[2]._scheduled = False  # type: ignore[attr-defined]
                else:
                    alive.append(entry)
            heapq.heapify(alive)
            self._timers = alive
            self._cancelled = 0

    def _waiting(self) -> list[str]:
        tasks = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
        return [f"{task.get_name()} in {_place(task)}" for task in tasks]

    def _process_events(self, event_list: Any) -> None:
        """No selector, no events."""

    def _write_to_self(self) -> None:
        raise RuntimeError("a thread called into a loop with virtual time")


def _place(task: asyncio.Task[Any]) -> str:
    """Where a task waits: function and line of its innermost coroutine."""
    place = "no frame"
    awaited: Any = task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        place = f"{frame.f_code.co_qualname} (line {frame.f_lineno})"
        awaited = awaited.cr_await
    return place


def run_virtual(main: Coroutine[Any, Any, _Result]) -> tuple[_Result, VirtualTimeLoop]:
    """Run a coroutine from time 0 of a new loop to its end; returns its result and the loop, closed.

    Raises:
        SimulationDeadlock: tasks wait for each other, or for something that nobody will do.
        SimulationLivelock: callbacks follow callbacks and no time passes.
    """
    loop = VirtualTimeLoop()
    try:
        asyncio.set_event_loop(loop)
        task = loop.create_task(main, name="main")
        try:
            result = loop.run_until_complete(task)
        finally:
            left = [t for t in asyncio.all_tasks(loop) if not t.done()]
            for one in sorted(left, key=lambda t: t.get_name()):
                one.cancel()
            if left:
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        return result, loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()
