"""What hosting an engine asks of it: vLLM's core in its own process or in a thread, or the twin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from cluster.errors import ServingError
from cluster.instance import EngineFacts
from cluster.wire import Blocks, GoOn, HandOver, Load, Offer

Frames = Sequence[Any]


class EngineDied(ServingError):
    """The engine of this instance is no more; the instance ends with it. Facts: `detail`."""

    retryable = True
    http_status = 503
    reason = "engine-died"

    detail: str

    def describe(self) -> str:
        return f"the engine died: {self.detail}"


class Engine(Protocol):
    """One engine. Requests and outputs are the engine's own types; the host only reads the output's
    `request_id` and moves the rest."""

    async def start(self, progress: Callable[[str], None]) -> EngineFacts:
        """Load the model and be ready; `progress` is told each phase."""
        ...

    def add(self, frames: Frames) -> None:
        """Decode and accept a request. Raises for one that can't be decoded."""
        ...

    def abort(self, request_ids: list[str]) -> None:
        """Stop these requests and free their blocks; unknown ids are no error."""
        ...

    def release(self, request_ids: list[str]) -> None:
        """Free the blocks kept for a reader that will not come; unknown ids are no error."""
        ...

    def hand_over(self, message: HandOver) -> None:
        """End a running request early. One that is unknown, does not run, or would end by then anyway is left
        as it is."""
        ...

    def go_on(self, message: GoOn) -> None:
        """The prompt that a request follows is computed; an unknown id is no error."""
        ...

    async def call(self, method: str, args: list[Any]) -> Any:
        """Call an engine method that is no request."""
        ...

    async def outputs(self) -> Any:
        """The next step's outputs. Raises EngineDied."""
        ...

    async def block_changes(self) -> Blocks:
        """The next changes of the prefix cache."""
        ...

    def load(self) -> Load:
        """Load after the last step."""
        ...

    def part(self, outputs: Any, members: list[Any], *, with_stats: bool) -> Frames:
        """Encode a step's outputs reduced to `members`; the step's statistics go to one ingress only."""
        ...

    async def stop(self) -> None:
        """End the engine and free what it holds."""
        ...


class Doorman(Protocol):
    """Decides whether an instance takes a request, before its engine hears of it. All times are `now_s`, on
    one clock."""

    def asked(self, offer: Offer, now_s: float) -> float | None:
        """Take a request (None), or refuse it: then the seconds until its prompt could begin."""
        ...

    def answered(self, request_ids: Iterable[str], now_s: float) -> None:
        """Requests have tokens, the first one or a further one."""
        ...

    def left(self, request_ids: Iterable[str], now_s: float) -> None:
        """Requests are gone; unknown ids are no error."""
        ...


def tell_doorman(doorman: Doorman, outputs: Iterable[Any], now_s: float) -> None:
    """A doorman hears of the outputs of an engine's step."""
    answered, ended = [], []
    for output in outputs:
        if output.new_token_ids:
            answered.append(output.request_id)
        elif output.finish_reason is not None:
            ended.append(output.request_id)
    doorman.answered(answered, now_s)
    doorman.left(ended, now_s)
