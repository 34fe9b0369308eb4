"""States of a batch, and how the API tells them."""

from __future__ import annotations

import msgspec
from openai.types import Batch as TheirBatch
from openai.types import FileObject

from router.batch_state import Batch, StoredFile


def test_the_openai_client_reads_them() -> None:
    batch = Batch(
        id="batch_1", endpoint="/v1/completions", input_file_id="file-1", completion_window="24h",
        created_at=10, expires_at=20,
    )  # fmt: skip
    batch.become("in_progress", 12.7)
    assert (batch.status, batch.in_progress_at, batch.is_ended) == ("in_progress", 12, False)
    theirs = TheirBatch.model_validate_json(msgspec.json.encode(batch))
    assert theirs.status == "in_progress"
    assert theirs.request_counts is not None
    assert theirs.request_counts.total == 0
    batch.become("expired", 21)
    assert batch.is_ended
    file = StoredFile(id="file-1", filename="a", purpose="batch", created_at=1, bytes=3)
    assert FileObject.model_validate_json(msgspec.json.encode(file)).bytes == 3
