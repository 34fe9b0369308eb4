"""The routes, spoken to by the `openai` client without a network; the app's answers are made up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI, Request

from cluster.batch_spec import BatchSpec
from router.batch_ask import asking
from router.batch_routes import MEGABYTE, add_batches
from router.batch_runner import BatchRunner
from router.batch_store import BatchStore
from router.traits import CURRENT

SPEC = BatchSpec(largest_file_mb=1)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of an app whose completions are the prompt in capitals."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def complete(request: Request) -> dict[str, Any]:
        return {"text": (await request.json())["prompt"].upper(), "slack": CURRENT.get().fills_slack}

    store = BatchStore(tmp_path)
    add_batches(app, store, BatchRunner(store, asking(app), SPEC), SPEC)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
        yield await stack.enter_async_context(
            openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http)
        )


def lines(*prompts: str, url: str = "/v1/completions") -> bytes:
    return b"".join(
        json.dumps({"custom_id": p, "method": "POST", "url": url, "body": {"prompt": p}}).encode() + b"\n"
        for p in prompts
    )


async def upload(client: openai.AsyncOpenAI, content: bytes) -> str:
    return (await client.files.create(file=("in.jsonl", content), purpose="batch")).id


async def until_ended(client: openai.AsyncOpenAI, batch_id: str) -> Any:
    async with asyncio.timeout(20):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if batch.status in ("completed", "failed", "expired", "cancelled"):
                return batch
            await asyncio.sleep(0.05)


async def test_upload_create_wait_read(client: openai.AsyncOpenAI) -> None:
    content = lines("one", "two")
    file = await client.files.create(file=("mine.jsonl", content), purpose="batch")
    assert (file.filename, file.bytes, file.purpose) == ("mine.jsonl", len(content), "batch")
    made = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"k": "v"}
    )
    assert (made.status, made.metadata, made.expires_at) == (
        "validating",
        {"k": "v"},
        made.created_at + 86_400,
    )
    batch = await until_ended(client, made.id)
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed) == (2, 2)
    output = [
        json.loads(line) for line in (await client.files.content(batch.output_file_id)).text.splitlines()
    ]
    assert {one["custom_id"]: one["response"]["body"]["text"] for one in output} == {
        "one": "ONE",
        "two": "TWO",
    }
    assert batch.error_file_id is None
    assert {one.purpose for one in (await client.files.list()).data} == {"batch", "batch_output"}


async def test_a_bad_input_is_told_with_its_line(client: openai.AsyncOpenAI) -> None:
    file_id = await upload(client, lines("a") + lines("b", url="/v1/embeddings"))
    made = await client.batches.create(
        input_file_id=file_id, endpoint="/v1/completions", completion_window="24h"
    )
    batch = await until_ended(client, made.id)
    assert batch.status == "failed"
    assert [(error.line, error.code) for error in batch.errors.data] == [(2, "invalid_url")]
    with pytest.raises(openai.ConflictError, match="is failed and can't be cancelled"):
        await client.batches.cancel(made.id)


async def test_lists_go_page_by_page(client: openai.AsyncOpenAI) -> None:
    file_id = await upload(client, lines("a"))
    made = {
        (await client.batches.create(
            input_file_id=file_id, endpoint="/v1/completions", completion_window="24h"
        )).id
        for _ in range(5)
    }  # fmt: skip
    assert len((await client.batches.list(limit=2)).data) == 2
    assert {batch.id async for batch in client.batches.list(limit=2)} == made
    for batch_id in made:
        await until_ended(client, batch_id)
    with pytest.raises(openai.BadRequestError, match="after"):
        await client.batches.list(after="batch_nobody")


async def test_a_file_can_be_deleted(client: openai.AsyncOpenAI) -> None:
    file_id = await upload(client, lines("a"))
    assert (await client.files.retrieve(file_id)).status == "processed"
    assert (await client.files.content(file_id)).content == lines("a")
    assert (await client.files.delete(file_id)).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=file_id):
            await call(file_id)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"endpoint": "/v1/embeddings"}, openai.BadRequestError, "the endpoints are /v1/chat/completions"),
        ({"completion_window": "soon"}, openai.BadRequestError, "say '24h'"),
        ({"completion_window": "999h"}, openai.BadRequestError, "say '24h'"),
        ({"input_file_id": "file-x"}, openai.NotFoundError, "no file has the id 'file-x'"),
        ({"input_file_id": 3}, openai.BadRequestError, "name an uploaded file"),
        ({"metadata": {"k": "v" * 513}}, openai.BadRequestError, "metadata"),
        ({"extra_body": {"output_expires_after": {}}}, openai.BadRequestError, "output_expires_after"),
    ],
)
async def test_a_batch_that_makes_no_sense(
    client: openai.AsyncOpenAI, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    file_id = await upload(client, lines("a"))
    asked = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"} | arguments
    with pytest.raises(error, match=says):
        await client.batches.create(**asked)


async def test_an_upload_that_makes_no_sense(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="files are for batches"):
        await client.files.create(file=("a", b"x"), purpose="fine-tune")
    with pytest.raises(openai.APIStatusError, match="largest_file_mb") as caught:
        await client.files.create(file=("a", b"x" * (MEGABYTE + 1)), purpose="batch")
    assert caught.value.status_code == 413
    with pytest.raises(openai.APIStatusError) as caught:
        await client.files.create(file=("a", b"x" * (2 * MEGABYTE)), purpose="batch")
    assert caught.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="multipart"):
        await client.post("/files", body={"purpose": "batch"}, cast_to=object)
    for body in ([1], "x"):
        with pytest.raises(openai.BadRequestError, match="JSON object"):
            await client.post("/batches", body=body, cast_to=object)
