"""Files and batches as the API tells them (OpenAI's `File` and `Batch`), and as they are kept."""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
# While it is one of these, a batch can be cancelled.
RUNNING: frozenset[Status] = frozenset({"validating", "in_progress"})
ENDED: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})


class StoredFile(msgspec.Struct, kw_only=True):
    """A file; times in seconds since the epoch."""

    id: str
    filename: str
    purpose: str
    created_at: int
    bytes: int = 0
    object: str = "file"
    status: str = "processed"


class RequestCounts(msgspec.Struct, kw_only=True):
    """Requests of a batch; those that are neither completed nor failed are to be run."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(msgspec.Struct, kw_only=True):
    """What is wrong with an input; `line` counts from 1, and is None for all of it."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(msgspec.Struct, kw_only=True):
    """What is wrong with an input, the first of it."""

    data: list[BatchError]
    object: str = "list"


class Batch(msgspec.Struct, kw_only=True):
    """A batch; times in seconds since the epoch, None where it never came to that."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: Status = "validating"
    object: str = "batch"
    metadata: dict[str, str] | None = None
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in ENDED

    @property
    def ended_at(self) -> int | None:
        """When it did."""
        return self.completed_at or self.failed_at or self.expired_at or self.cancelled_at

    def become(self, status: Status, now_s: float) -> None:
        """It is that from now on."""
        self.status = status
        setattr(self, f"{status}_at", int(now_s))
