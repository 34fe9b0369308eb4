"""Trials side by side: in this process, or on several cores, with the same answers in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Protocol, Self

from deploy.planner.goal import Goal

_goal: Goal | None = None


class Workers(Protocol):
    """Calls `what(goal, *args)` for every `args`; answers come in the order of the calls."""

    def map(self, what: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]: ...


class Here:
    """One after the other, in this process."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal

    def map(self, what: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [what(self._goal, *args) for args in calls]


class Cores:
    """On several processes; a context manager."""

    def __init__(self, goal: Goal, count: int) -> None:
        # The workload is sent once to each, not with every call.
        self._pool = ProcessPoolExecutor(
            count, mp_context=get_context("fork"), initializer=_begin, initargs=(goal,)
        )

    def map(self, what: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        return list(self._pool.map(_call, [(what, args) for args in calls]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)


def _begin(goal: Goal) -> None:
    global _goal
    _goal = goal


def _call(job: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    what, args = job
    return what(_goal, *args)
