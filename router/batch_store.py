"""Files and batches on disk, for several ingress replicas on one directory.

    files/<id>/content, meta.json          a file; it is there when meta.json is
    batches/<id>/state.json                what the API tells of it, written by its owner only
    batches/<id>/input.jsonl               a link to the input, which may be deleted meanwhile
    batches/<id>/claim.<n>                 the n-th owner; alive while its time stamp is renewed
    batches/<id>/answers.<n>               what that owner has got: line number, kind and the API's line
    batches/<id>/cancel                    somebody wants it cancelled

Only one can create `claim.<n+1>`, so only one takes over; an owner that finds it has lost. Each appends to a
file of its own: a line that was torn by a crash, or written by one who did not know yet that it had lost,
harms nothing. Everything else appears by renaming. What the operating system has, it keeps: a process may
die, a power cut may cost the last seconds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from cluster.errors import EnvironmentProblem, ServingError
from router.batch_state import RUNNING, Batch, StoredFile

# An owner that has not renewed its claim for so long is dead.
LEASE_S = 30.0
# A file that never became one: its upload, or its batch, broke off.
ABANDONED_S = 86_400.0
ANSWERED, FAILED = b"+", b"-"
_ID = re.compile(r"(file-|batch_)[0-9a-f]{32}")


class UnknownId(ServingError):
    """No such file or batch. Facts: `kind`, `name`."""

    http_status = 404
    reason = "not-found"

    kind: str
    name: str

    def describe(self) -> str:
        return f"no {self.kind} has the id {self.name!r}"


class ClaimLost(ServingError):
    """Another has taken over a batch, as this owner was not heard of. Facts: `batch`."""

    reason = "claim-lost"

    batch: str


class Claim:
    """A batch that is this process's to run.

    Attributes:
        batch_id: of the batch.
    """

    def __init__(self, directory: Path, number: int, clock: Callable[[], float]) -> None:
        self.batch_id = directory.name
        self._path = directory / f"claim.{number}"
        self._next = directory / f"claim.{number + 1}"
        self._clock = clock
        self._answers = (directory / f"answers.{number}").open("ab", buffering=0)

    def renew(self) -> None:
        """Say that the owner lives. Raises ClaimLost."""
        try:
            if not self._next.exists():
                os.utime(self._path, (self._clock(), self._clock()))
                return
        except FileNotFoundError:  # removed with its batch
            pass
        raise ClaimLost(batch=self.batch_id)

    def add(self, number: int, line: bytes, *, is_ok: bool) -> None:
        """Keep the answer to a line of the input: a line of the output, or of the error file."""
        record = b"%d\t%b\t%b\n" % (number, ANSWERED if is_ok else FAILED, line)
        if self._answers.write(record) != len(record):  # what is torn is read as none, if nothing follows it
            raise OSError(errno.ENOSPC, "an answer was not written whole", str(self._path))

    def close(self, *, is_free: bool = True) -> None:
        """Let others have it: at once, or when the lease is over."""
        self._answers.close()
        with contextlib.suppress(FileNotFoundError):
            if is_free and not self._next.exists():
                os.utime(self._path, (0, 0))


class BatchStore:
    """The directory. Nothing is there before it is needed. Raises OSError where the disk does."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            clock: seconds since the epoch, the same on all machines that use the directory.
        """
        self._files = directory / "files"
        self._batches = directory / "batches"
        self.clock = clock

    # --- files

    @contextlib.contextmanager
    def new_file(self, filename: str, purpose: str) -> Iterator[tuple[IO[bytes], StoredFile]]:
        """Write a file: it is there when the block ends well. Raises EnvironmentProblem where there can be
        none."""
        meta = StoredFile(
            id=f"file-{uuid.uuid4().hex}",
            filename=filename,
            purpose=purpose,
            created_at=int(self.clock()),
        )
        place = self._files / meta.id
        try:
            place.mkdir(parents=True)
        except OSError as error:
            raise EnvironmentProblem(
                problem=f"{place} can't be made ({error.strerror})",
                remedy="name a directory that can be written under 'batch.directory' in the spec",
            ) from None
        try:
            with (place / "content").open("wb") as content:
                yield content, meta
                meta.bytes = content.tell()
            _replace(place / "meta.json", msgspec.json.encode(meta))
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise

    def file(self, file_id: str) -> StoredFile:
        """What is known of a file. Raises UnknownId."""
        try:
            return msgspec.json.decode(
                (self._place(self._files, "file", file_id) / "meta.json").read_bytes(), type=StoredFile
            )
        except (FileNotFoundError, msgspec.DecodeError):  # the latter after a power cut
            raise UnknownId(kind="file", name=file_id) from None

    def files(self) -> list[StoredFile]:
        """All files, the newest first."""
        found = []
        for place in _entries(self._files):
            with contextlib.suppress(UnknownId):
                found.append(self.file(place.name))
        return sorted(found, key=lambda one: (one.created_at, one.id), reverse=True)

    def content(self, file_id: str) -> Path:
        """Where the bytes of a file are. Raises UnknownId."""
        self.file(file_id)
        return self._files / file_id / "content"

    def delete_file(self, file_id: str) -> None:
        """Remove a file; a batch that runs keeps its input. Raises UnknownId."""
        self.file(file_id)
        (self._files / file_id / "meta.json").unlink(missing_ok=True)
        shutil.rmtree(self._files / file_id, ignore_errors=True)

    # --- batches

    def create(self, batch: Batch) -> None:
        """A new batch, for whoever claims it. Raises UnknownId for its input."""
        content = self.content(batch.input_file_id)
        place = self._batches / batch.id
        place.mkdir(parents=True)
        try:
            os.link(content, place / "input.jsonl")
        except OSError:  # a file system without hard links
            shutil.copyfile(content, place / "input.jsonl")
        self.save(batch)

    def batch(self, batch_id: str) -> Batch:
        """A batch as it is now. Raises UnknownId."""
        place = self._place(self._batches, "batch", batch_id)
        try:
            batch = msgspec.json.decode((place / "state.json").read_bytes(), type=Batch)
        except (FileNotFoundError, msgspec.DecodeError):
            raise UnknownId(kind="batch", name=batch_id) from None
        if batch.status in RUNNING and (asked_at := self.cancelled_at(batch_id)) is not None:
            batch.status, batch.cancelling_at = "cancelling", asked_at
        return batch

    def batches(self) -> list[Batch]:
        """All batches, the newest first."""
        found = []
        for batch_id in self.batch_ids():
            with contextlib.suppress(UnknownId):
                found.append(self.batch(batch_id))
        return sorted(found, key=lambda one: (one.created_at, one.id), reverse=True)

    def batch_ids(self) -> list[str]:
        """Ids of all that there are, and of some that never became one."""
        return [place.name for place in _entries(self._batches)]

    def save(self, batch: Batch) -> None:
        """Its owner has changed it."""
        _replace(self._batches / batch.id / "state.json", msgspec.json.encode(batch))

    def cancel(self, batch_id: str) -> None:
        """Ask its owner to end it. Raises UnknownId."""
        self.batch(batch_id)
        marker = self._batches / batch_id / "cancel"
        marker.touch()
        os.utime(marker, (self.clock(), self.clock()))

    def cancelled_at(self, batch_id: str) -> int | None:
        """When it was asked to be cancelled."""
        try:
            return int((self._batches / batch_id / "cancel").stat().st_mtime)
        except FileNotFoundError:
            return None

    def input(self, batch_id: str) -> Path:
        """Where its requests are."""
        return self._batches / batch_id / "input.jsonl"

    def claim(self, batch_id: str) -> Claim | None:
        """Become its owner; None while it has one. Raises UnknownId."""
        place = self._place(self._batches, "batch", batch_id)
        if not (place / "state.json").exists():
            raise UnknownId(kind="batch", name=batch_id)
        last = max(_numbers(place, "claim"), default=0)
        try:
            if last and (place / f"claim.{last}").stat().st_mtime + LEASE_S > self.clock():
                return None
            path = place / f"claim.{last + 1}"
            path.touch(exist_ok=False)
            os.utime(path, (self.clock(), self.clock()))
        except FileExistsError:  # another was quicker
            return None
        except FileNotFoundError:
            raise UnknownId(kind="batch", name=batch_id) from None
        return Claim(place, last + 1, self.clock)

    def answers(self, batch_id: str) -> Iterator[tuple[int, bool, bytes]]:
        """(line number, whether it went well, the API's line) of every answer so far, the first of each
        line."""
        place = self._batches / batch_id
        seen: set[int] = set()
        for owner in sorted(_numbers(place, "answers")):
            with (place / f"answers.{owner}").open("rb") as file:
                for record in file:
                    if not record.endswith(b"\n"):
                        break  # torn: its owner died in the middle
                    number, kind, line = record.split(b"\t", 2)
                    if int(number) not in seen:
                        seen.add(int(number))
                        yield int(number), kind == ANSWERED, line

    # --- both

    def sweep(self, before_s: float) -> Iterator[None]:
        """Remove files that were created, and batches that have ended, before that time, one at each step."""
        for place in _entries(self._files):
            try:
                old = self.file(place.name).created_at < before_s
            except UnknownId:
                old = _is_abandoned(place, self.clock())
            if old:
                shutil.rmtree(place, ignore_errors=True)
            yield
        for place in _entries(self._batches):
            try:
                batch = self.batch(place.name)
                old = batch.is_ended and (batch.ended_at or batch.created_at) < before_s
            except UnknownId:
                old = _is_abandoned(place, self.clock())
            if old:
                shutil.rmtree(place, ignore_errors=True)
            yield

    @staticmethod
    def _place(parent: Path, kind: str, name: str) -> Path:
        """Where something of that name is: an id and nothing else, so nowhere outside. Raises UnknownId."""
        if _ID.fullmatch(name) is None or not name.startswith(kind):
            raise UnknownId(kind=kind, name=name[:64])
        return parent / name


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def _numbers(place: Path, kind: str) -> list[int]:
    return [int(path.suffix[1:]) for path in place.glob(f"{kind}.*")]


def _is_abandoned(place: Path, now_s: float) -> bool:
    try:
        return place.stat().st_mtime + ABANDONED_S < now_s
    except FileNotFoundError:
        return False


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # or a power cut leaves the new name with nothing behind it
    part.replace(path)
