"""DecisionLog: every decision of a router as one JSON line, to be read by people and replayed by programs."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from cluster.errors import SpecError
from cluster.instance import Role
from cluster.request import ServeRequest
from cluster.spec import IngressSpec
from router.policy import Decision
from router.view import View

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
# About 10 MB. A disk that is so far behind loses lines, the ingress loses no memory.
MOST_WAITING_LINES = 30_000
# A decision among thousands of instances is explained by the least loaded ones.
LEAST_LOADED = 4


class LoggedDecision(msgspec.Struct, frozen=True, kw_only=True):
    """One line.

    Attributes:
        now_s: since the log was opened.
        request: id in the router; vLLM's adds to what the client sent.
        external: vLLM's id as its API tells it, `cmpl-`, the client's `x-request-id` and the prompt's number;
            None where there is none.
        prompt_tokens, max_tokens: of the request.
        outstanding: tokens under way on the least loaded instances of each role, as the policy saw them.
        link: the way that its KV takes (`router.links`).
        scores: what the policy weighed, by instance.
    """

    now_s: float
    request: str
    external: str | None
    prompt_tokens: int
    max_tokens: int
    prefill: str
    decode: str
    link: str
    outstanding: dict[str, int]
    scores: dict[str, float]
    reason: str


class DecisionLog:
    """Writes decisions to a file, at most `FLUSH_S` after they were made."""

    def __init__(
        self, path: Path, view: View, external_id: Callable[[str], str | None] = lambda request_id: None
    ) -> None:
        """
        Args:
            view: the instances that the decisions are made on.
            external_id: the id under which clients know a request.
        """
        self._path = path
        self._view = view
        self._external_id = external_id
        self._file: IO[bytes] | None = None
        self._began_s = 0.0
        self._lines: list[bytes] = []
        self._lost = 0
        self._failed = False
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin; what the file has already stays. Raises SpecError when it can't be written."""
        try:
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise SpecError(
                file="(spec)",
                path="ingress.decision_log",
                value=str(self._path),
                allowed=f"it can't be written ({error.strerror}): name a file in a directory there is",
            ) from None
        self._began_s = asyncio.get_running_loop().time()

    def add(self, request: ServeRequest, decision: Decision, now_s: float) -> None:
        """A decision was made (`Router.on_decision`)."""
        if len(self._lines) >= MOST_WAITING_LINES:
            self._lost += 1
            return
        line = LoggedDecision(
            now_s=round(now_s - self._began_s, 6),
            request=request.request_id,
            external=self._external_id(request.request_id),
            prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.max_tokens,
            prefill=decision.prefill,
            decode=decision.decode,
            link=decision.link,
            outstanding={
                instance.instance_id: instance.outstanding_tokens
                for role in Role
                for instance in itertools.islice(self._view.by_tokens(role), LEAST_LOADED)
            },
            scores=dict(decision.candidates),
            reason=decision.reason,
        )
        self._lines.append(msgspec.json.encode(line) + b"\n")
        if self._timer is None and self._writing is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._start_writing)

    async def close(self) -> None:
        """Write what is left."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writing is not None:
            await self._writing
        if self._file is not None:
            await self._write()
            self._file.close()
            self._file = None

    def _start_writing(self) -> None:
        self._timer = None
        self._writing = asyncio.create_task(self._flush(), name="decision-log")

    async def _flush(self) -> None:
        try:
            await self._write()
        finally:
            self._writing = None
        if self._lines:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._start_writing)

    async def _write(self) -> None:
        lines, self._lines = self._lines, []
        lost, self._lost = self._lost, 0
        if lost:
            logger.warning("%s: lost %d decisions, the disk is too slow", self._path, lost)
        assert self._file is not None
        try:
            await asyncio.to_thread(self._file.write, b"".join(lines))
            self._failed = False
        except OSError as error:  # a full disk must not end requests; it is said once
            if not self._failed:
                logger.error("%s: can't be written, decisions are lost: %s", self._path, error)
            self._failed = True


def log_path(ingress: IngressSpec, name: str) -> Path | None:
    """The file of one ingress replica, or None for no log; with several replicas each has its own.

    Args:
        name: of the replica.
    """
    if ingress.decision_log is None:
        return None
    path = Path(ingress.decision_log)
    return path if ingress.replicas == 1 else path.with_name(f"{path.stem}.{name}{path.suffix}")


def read_decisions(path: Path) -> list[LoggedDecision]:
    """The decisions of a log. Raises OSError, and ValueError for a line that is none."""
    decoder = msgspec.json.Decoder(LoggedDecision)
    with path.open("rb") as lines:
        return [decoder.decode(line) for line in lines]
