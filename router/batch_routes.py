"""`/v1/files` and `/v1/batches`, as OpenAI's clients speak to them."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.datastructures import UploadFile

from cluster.batch_spec import BatchSpec
from cluster.errors import EnvironmentProblem, ServingError
from router.batch_file import ENDPOINTS
from router.batch_runner import BatchRunner
from router.batch_state import RUNNING, Batch, StoredFile
from router.batch_store import BatchStore, UnknownId

MEGABYTE = 1_000_000
# What a form has around its file.
FORM_BYTES = 65_536
CHUNK_BYTES = 1 << 20
# Batches that have not ended; a further one is refused.
MOST_WAITING = 1000
_WINDOW = re.compile(r"([1-9][0-9]{0,2})h")
_MOST_WINDOW_H = 720
# As the API has it: pairs, characters of a key and of a value.
_METADATA = (16, 64, 512)
Page = Annotated[int, Query(ge=1, le=10_000)]
Kept = TypeVar("Kept", StoredFile, Batch)


class BadBatchRequest(ServingError):
    """A request to these routes that makes no sense. Facts: `param`, `value`, `allowed`."""

    http_status = 400
    reason = "bad-request"

    param: str
    value: object
    allowed: str

    def describe(self) -> str:
        return f"{self.param}: {self.value!r} is not allowed; {self.allowed}"


class FileTooLarge(ServingError):
    """An upload beyond the limit. Facts: `bytes`, `most_bytes`."""

    http_status = 413
    reason = "too-large"

    bytes: int
    most_bytes: int

    def describe(self) -> str:
        return (
            f"the upload has {self.bytes} bytes, a file may have {self.most_bytes} ('batch.largest_file_mb')"
        )


class BatchHasEnded(ServingError):
    """What has ended can't be cancelled. Facts: `batch`, `status`."""

    http_status = 409
    reason = "batch-ended"

    batch: str
    status: str

    def describe(self) -> str:
        return f"batch {self.batch} is {self.status} and can't be cancelled"


class TooManyBatches(ServingError):
    """Enough batches wait already. Facts: `waiting`."""

    retryable = True
    http_status = 429
    reason = "too-many-batches"

    waiting: int

    def describe(self) -> str:
        return f"{self.waiting} batches have not ended; wait for some of them, or cancel some"


_TOLD = (BadBatchRequest, FileTooLarge, BatchHasEnded, TooManyBatches, UnknownId, EnvironmentProblem)


def add_batches(app: FastAPI, store: BatchStore, runner: BatchRunner, spec: BatchSpec) -> None:
    """The routes, and the runner for as long as the app lives."""
    for kind in _TOLD:
        app.add_exception_handler(kind, _tell)
    _add_file_routes(app, store, spec)
    _add_batch_routes(app, store, runner)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def living(living_app: FastAPI) -> AsyncIterator[Any]:
        async with inner(living_app) as state:
            running = asyncio.create_task(runner.run(), name="batches")
            try:
                yield state
            finally:
                running.cancel()
                await asyncio.wait({running})

    app.router.lifespan_context = living


# Handlers that are no coroutines run in a thread: they wait for a disk.


def _add_file_routes(app: FastAPI, store: BatchStore, spec: BatchSpec) -> None:
    @app.post("/v1/files")
    async def upload(request: Request) -> Response:
        return _json(await _store_upload(request, store, spec))

    @app.get("/v1/files")
    def files(
        purpose: str | None = None,
        after: str | None = None,
        limit: Page = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        found = [file for file in store.files() if purpose in (None, file.purpose)]
        return _page(found if order == "desc" else found[::-1], after, limit)

    @app.get("/v1/files/{file_id}")
    def file(file_id: str) -> Response:
        return _json(store.file(file_id))

    @app.get("/v1/files/{file_id}/content")
    def content(file_id: str) -> Response:
        return FileResponse(store.content(file_id), media_type="application/octet-stream")

    @app.delete("/v1/files/{file_id}")
    def delete(file_id: str) -> Response:
        store.delete_file(file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def _add_batch_routes(app: FastAPI, store: BatchStore, runner: BatchRunner) -> None:
    @app.post("/v1/batches")
    async def create(request: Request) -> Response:
        batch = _new_batch(await _object(request), store.clock())
        await asyncio.to_thread(_accept, batch, store)
        runner.wake()
        return _json(batch)

    @app.get("/v1/batches")
    def batches(after: str | None = None, limit: Page = 20) -> Response:
        return _page(store.batches(), after, limit)

    @app.get("/v1/batches/{batch_id}")
    def batch(batch_id: str) -> Response:
        return _json(store.batch(batch_id))

    @app.post("/v1/batches/{batch_id}/cancel")
    def cancel(batch_id: str) -> Response:
        found = store.batch(batch_id)
        if found.status not in RUNNING and found.status != "cancelling":
            raise BatchHasEnded(batch=batch_id, status=found.status)
        store.cancel(batch_id)
        return _json(store.batch(batch_id))


async def _store_upload(request: Request, store: BatchStore, spec: BatchSpec) -> StoredFile:
    """The file of a form. Raises BadBatchRequest, FileTooLarge."""
    most_bytes = spec.largest_file_mb * MEGABYTE
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise BadBatchRequest(param="content-length", value=length, allowed="say how long the upload is")
    if int(length) > most_bytes + FORM_BYTES:
        raise FileTooLarge(bytes=int(length), most_bytes=most_bytes)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise BadBatchRequest(
            param="content-type",
            value=request.headers.get("content-type"),
            allowed="send multipart/form-data",
        )
    async with request.form(max_files=1, max_fields=8, max_part_size=FORM_BYTES) as form:
        for key in form:
            if key not in ("file", "purpose"):
                raise BadBatchRequest(
                    param=key,
                    value=form[key],
                    allowed=f"files are kept for {spec.keep_days:g} days, and have no other options",
                )
        if (purpose := form.get("purpose")) != "batch":
            raise BadBatchRequest(param="purpose", value=purpose, allowed="files are for batches: 'batch'")
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise BadBatchRequest(param="file", value=upload, allowed="send a file")
        if (upload.size or 0) > most_bytes:
            raise FileTooLarge(bytes=upload.size or 0, most_bytes=most_bytes)
        with store.new_file(upload.filename or "batch.jsonl", "batch") as (content, meta):
            while chunk := await upload.read(CHUNK_BYTES):
                content.write(chunk)
    return meta


async def _object(request: Request) -> dict[str, Any]:
    raw = await request.body()
    try:
        body = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise BadBatchRequest(param="body", value=str(error), allowed="send a JSON object") from None
    if not isinstance(body, dict):
        raise BadBatchRequest(param="body", value=type(body).__name__, allowed="send a JSON object")
    return body


def _new_batch(body: dict[str, Any], now_s: float) -> Batch:
    """The batch that somebody asks for. Raises BadBatchRequest."""
    known = ("input_file_id", "endpoint", "completion_window", "metadata")
    for key in body:
        if key not in known:
            raise BadBatchRequest(param=key, value=body[key], allowed=f"the keys are {', '.join(known)}")
    file_id, endpoint, window = (body.get(key) for key in known[:3])
    if not isinstance(file_id, str):
        raise BadBatchRequest(param="input_file_id", value=file_id, allowed="name an uploaded file")
    if endpoint not in ENDPOINTS:
        raise BadBatchRequest(
            param="endpoint", value=endpoint, allowed=f"the endpoints are {', '.join(ENDPOINTS)}"
        )
    hours = _WINDOW.fullmatch(window) if isinstance(window, str) else None
    if hours is None or int(hours[1]) > _MOST_WINDOW_H:
        raise BadBatchRequest(
            param="completion_window", value=window, allowed=f"say '24h', or from '1h' to '{_MOST_WINDOW_H}h'"
        )
    return Batch(
        id=f"batch_{uuid.uuid4().hex}",
        endpoint=endpoint,
        input_file_id=file_id,
        completion_window=hours[0],
        created_at=int(now_s),
        expires_at=int(now_s) + 3600 * int(hours[1]),
        metadata=_metadata(body.get("metadata")),
    )


def _metadata(given: object) -> dict[str, str] | None:
    if given is None:
        return None
    pairs, key_length, value_length = _METADATA
    if (
        not isinstance(given, dict)
        or len(given) > pairs
        or not all(isinstance(value, str) and len(value) <= value_length for value in given.values())
        or not all(len(key) <= key_length for key in given)
    ):
        raise BadBatchRequest(
            param="metadata", value=given,
            allowed=f"up to {pairs} texts of up to {value_length} characters, keys of up to {key_length}",
        )  # fmt: skip
    return given


def _accept(batch: Batch, store: BatchStore) -> None:
    """Raises UnknownId, BadBatchRequest, TooManyBatches."""
    if (purpose := store.file(batch.input_file_id).purpose) != "batch":
        raise BadBatchRequest(
            param="input_file_id",
            value=batch.input_file_id,
            allowed=f"its purpose is {purpose!r}, not 'batch'",
        )
    if (waiting := sum(not one.is_ended for one in store.batches())) >= MOST_WAITING:
        raise TooManyBatches(waiting=waiting)
    store.create(batch)


def _page(found: Sequence[Kept], after: str | None, limit: int) -> Response:
    """Some of them, from after the one with that id on; from the first on where there is none."""
    ids = [one.id for one in found]
    if after is not None and after not in ids:
        raise BadBatchRequest(param="after", value=after, allowed="give the id of one in the list")
    begin = 0 if after is None else ids.index(after) + 1
    page = found[begin : begin + limit]
    return _json(
        {
            "object": "list",
            "data": page,
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": begin + limit < len(found),
        }
    )


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


async def _tell(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    body = {
        "message": str(error),
        "type": error.reason,
        "param": error.facts.get("param"),
        "code": error.http_status,
    }
    headers = {"x-pdserve-reason": error.reason}
    return JSONResponse({"error": body}, status_code=error.http_status, headers=headers)
