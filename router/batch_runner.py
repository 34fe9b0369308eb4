"""Runs batches: claims what nobody runs, asks line by line in an order that shares prefixes, writes down
answers.

A line that is refused for want of slack is asked again, as often as it takes; how many are under way at once
follows from that (`batch_window.py`). What was answered is on disk at once, so whoever goes on with a batch
asks for the rest only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import IO, Any

from cluster.batch_spec import BatchSpec
from router.batch_ask import Ask, answer_line, unanswered_line
from router.batch_file import BadLine, Line, custom_ids, parse_line, read_lines
from router.batch_order import in_order
from router.batch_state import Batch, BatchError, BatchErrors, RequestCounts, Status
from router.batch_store import BatchStore, Claim, ClaimLost, UnknownId
from router.batch_window import Window

logger = logging.getLogger(__name__)

# Batches that other replicas took in, or left, are looked for so often.
SCAN_S = 5.0
# A claim is renewed, and a wish to cancel looked for, so often: several times in a lease.
RENEW_S = 2.0
# Lines of its files that an owner writes between two signs of life.
RENEW_LINES = 500
SWEEP_S = 3600.0
DAY_S = 86_400.0
# Of one replica; they take turns.
MOST_BATCHES = 8
# A line that meets no instance is asked again so many times in all; one that meets no slack, for ever.
MOST_TRIES = 8
# Of a bad input, the API tells so many.
MOST_ERRORS = 100
# Others get their turn after so many steps of something long.
STEPS = 32

InThread = Callable[..., Awaitable[Any]]


class BatchRunner:
    """Runs the batches of a store, of those that nobody else runs."""

    def __init__(
        self, store: BatchStore, ask: Ask, spec: BatchSpec, in_thread: InThread = asyncio.to_thread
    ) -> None:
        """
        Args:
            ask: runs one request.
            in_thread: calls what computes for long.
        """
        self._store = store
        self._ask = ask
        self._spec = spec
        self._in_thread = in_thread
        self._window = Window(spec.most_at_once)
        self._woken = asyncio.Event()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._ended: set[str] = set()
        self._swept_s: float | None = None

    def wake(self) -> None:
        """There is a new batch."""
        self._woken.set()

    async def run(self) -> None:
        """Run until cancelled; what is under way then is for others, at once."""
        try:
            while True:
                self._woken.clear()
                try:
                    self._claim_some()
                    await self._sweep()
                except OSError as error:
                    logger.error("batches can't be read: %s", error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SCAN_S):
                        await self._woken.wait()
        finally:
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._window.close()

    def _claim_some(self) -> None:
        ids = set(self._store.batch_ids())
        self._ended &= ids
        waiting = []
        for batch_id in ids - self._ended - self._running.keys():
            with contextlib.suppress(UnknownId):
                batch = self._store.batch(batch_id)
                if batch.is_ended:
                    self._ended.add(batch_id)
                else:
                    waiting.append((batch.created_at, batch_id))
        for _, batch_id in sorted(waiting):
            if len(self._running) >= MOST_BATCHES:
                return
            with contextlib.suppress(UnknownId):
                if (claim := self._store.claim(batch_id)) is not None:
                    task = asyncio.create_task(self._serve(claim), name=f"run-{batch_id}")
                    self._running[batch_id] = task
                    task.add_done_callback(partial(self._left, batch_id))

    def _left(self, batch_id: str, _: asyncio.Task[None]) -> None:
        del self._running[batch_id]
        self.wake()

    async def _sweep(self) -> None:
        now_s = self._store.clock()
        if self._swept_s is not None and now_s < self._swept_s + SWEEP_S:
            return
        self._swept_s = now_s
        await _in_turns(self._store.sweep(now_s - self._spec.keep_days * DAY_S))

    async def _serve(self, claim: Claim) -> None:
        """One batch, to its end."""
        is_free = True
        try:
            batch = self._store.batch(claim.batch_id)
            if not batch.is_ended:
                await self._finish(batch, claim, await self._until_end(batch, claim))
        except ClaimLost:
            logger.warning("another took over batch %s", claim.batch_id)
        except UnknownId:  # it was removed
            pass
        except Exception:
            # The edge of a batch. Whoever has it after the lease tries again, until the batch expires.
            is_free = False
            logger.exception("batch %s broke off", claim.batch_id)
        finally:
            claim.close(is_free=is_free)

    async def _until_end(self, batch: Batch, claim: Claim) -> Status:
        """Work on it until it is done, or shall not be done any more; returns what it is then."""
        work = asyncio.create_task(self._work(batch, claim), name=f"work-{batch.id}")
        told = -1
        try:
            while True:
                if self._store.cancelled_at(batch.id) is not None:
                    return "cancelled"
                if self._store.clock() >= batch.expires_at:
                    return "expired"
                await asyncio.wait({work}, timeout=RENEW_S)
                claim.renew()
                if work.done():
                    return work.result()
                counts = batch.request_counts
                if told != (told := counts.completed + counts.failed):
                    self._store.save(batch)
        finally:
            work.cancel()
            await asyncio.wait({work})

    async def _work(self, batch: Batch, claim: Claim) -> Status:
        lines, bad = await self._read(batch)
        if bad:
            batch.errors = BatchErrors(data=[BatchError(**one._asdict()) for one in bad])
            return "failed"
        done: dict[int, bool] = {}
        await _in_turns(done.update({number: is_ok}) for number, is_ok, _ in self._store.answers(batch.id))
        completed = sum(done.values())
        batch.request_counts = RequestCounts(
            total=len(lines), completed=completed, failed=len(done) - completed
        )
        batch.status = "in_progress"
        if batch.in_progress_at is None:
            batch.become("in_progress", self._store.clock())
        self._store.save(batch)
        ordered = await self._in_thread(in_order, lines)
        await self._run([line for line in ordered if line.number not in done], batch, claim)
        return "completed"

    async def _read(self, batch: Batch) -> tuple[list[Line], list[BadLine]]:
        """The lines of its input, or the first that are bad."""
        lines: list[Line] = []
        bad: list[BadLine] = []
        with self._store.input(batch.id).open("rb") as file:
            for found in read_lines(file, batch.endpoint, self._spec.most_lines):
                if isinstance(found, Line):
                    lines.append(found)
                elif found is not None:
                    bad.append(found)
                    if len(bad) == MOST_ERRORS:
                        break
                await asyncio.sleep(0)
        return lines, bad

    async def _run(self, lines: Sequence[Line], batch: Batch, claim: Claim) -> None:
        room = asyncio.Semaphore(self._spec.most_at_once)
        with self._store.input(batch.id).open("rb") as file:
            async with asyncio.TaskGroup() as group:
                for line in lines:
                    await room.acquire()
                    task = group.create_task(self._run_line(line, file, batch, claim))
                    task.add_done_callback(lambda _: room.release())

    async def _run_line(self, line: Line, file: IO[bytes], batch: Batch, claim: Claim) -> None:
        file.seek(line.offset)
        asked = parse_line(file.read(line.size), batch.endpoint)
        request_id = f"batch_req_{uuid.uuid4().hex}"
        # It comes last, whatever it says of itself.
        body = json.dumps({key: value for key, value in asked.body.items() if key != "priority"}).encode()
        tries = 0
        while True:
            entered_s = await self._window.enter()
            try:
                answer = await self._ask(batch.endpoint, body, request_id)
                if answer.status in (429, 503):
                    self._window.refused(entered_s)
                elif answer.is_ok:
                    self._window.served()
            finally:
                self._window.leave()
            tries += answer.status == 503
            if answer.status != 429 and (answer.status != 503 or tries == MOST_TRIES):
                break
        claim.add(line.number, answer_line(asked.custom_id, request_id, answer), is_ok=answer.is_ok)
        counts = batch.request_counts
        if answer.is_ok:
            counts.completed += 1
        else:
            counts.failed += 1

    async def _finish(self, batch: Batch, claim: Claim, end: Status) -> None:
        """Its files, and then its last state. Raises ClaimLost before anything of it is written."""
        claim.renew()
        if end != "failed":
            batch.become("finalizing", self._store.clock())
            self._store.save(batch)
            await self._write_files(batch, claim, end)
        claim.renew()
        if end == "cancelled":
            batch.cancelling_at = self._store.cancelled_at(batch.id)
        batch.become(end, self._store.clock())
        self._store.save(batch)
        self._ended.add(batch.id)

    async def _write_files(self, batch: Batch, claim: Claim, end: Status) -> None:
        """What was answered well, and everything else; neither where there is nothing of it."""
        files: dict[bool, tuple[IO[bytes], str]] = {}
        with contextlib.ExitStack() as stack:

            def write(is_ok: bool, line: bytes) -> None:
                if is_ok not in files:
                    name = f"{batch.id}_{'output' if is_ok else 'error'}.jsonl"
                    content, meta = stack.enter_context(self._store.new_file(name, "batch_output"))
                    files[is_ok] = content, meta.id
                files[is_ok][0].write(line)

            answered: set[int] = set()

            def everything() -> Iterator[None]:
                for number, is_ok, line in self._store.answers(batch.id):
                    answered.add(number)
                    write(is_ok, line)
                    if not len(answered) % RENEW_LINES:
                        claim.renew()
                    yield
                if end == "completed":
                    return
                with self._store.input(batch.id).open("rb") as file:
                    for number, custom_id in custom_ids(file, batch.endpoint):
                        if not number % RENEW_LINES:
                            claim.renew()
                        if number not in answered:
                            request_id = f"batch_req_{uuid.uuid4().hex}"
                            write(False, unanswered_line(custom_id, request_id, end) + b"\n")
                        yield

            await _in_turns(everything())
        batch.output_file_id, batch.error_file_id = (
            files[is_ok][1] if is_ok in files else None for is_ok in (True, False)
        )


async def _in_turns(steps: Iterator[None]) -> None:
    """Take all steps, and let others have their turn in between."""
    for number, _ in enumerate(steps):
        if number % STEPS == STEPS - 1:
            await asyncio.sleep(0)
