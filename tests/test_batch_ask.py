"""Asking the app of this process."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cluster.slo_spec import SloSpec
from router.batch_ask import LAST, Answer, answer_line, asking, unanswered_line
from router.traits import CURRENT, TraitsMiddleware


async def reply(send: Any, status: int, *parts: bytes) -> None:
    headers = [(b"X-Request-Id", b"theirs")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for number, part in enumerate(parts, 1):
        await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})


async def test_the_app_sees_a_request_that_fills_slack() -> None:
    seen: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        seen.update(body=message["body"], traits=CURRENT.get(), path=scope["path"])
        seen.update({name.decode(): value for name, value in scope["headers"]})
        await reply(send, 200, b'{"a":', b"1}")

    guarded = TraitsMiddleware(
        app, SloSpec.model_validate({"default": "c", "classes": {"c": {"ttft_ms": 9}}})
    )
    answer = await asking(guarded, "sk-1")("/v1/completions", b"{}", "batch_req_1")
    assert (answer.status, answer.body, answer.is_ok) == (200, b'{"a":1}', True)
    assert (seen["path"], seen["body"]) == ("/v1/completions", b"{}")
    assert (seen["authorization"], seen["x-request-id"]) == (b"Bearer sk-1", b"batch_req_1")
    assert (seen["traits"].fills_slack, seen["traits"].priority) == (True, LAST)


async def test_an_app_that_fails_is_an_answer() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError("oops")

    answer = await asking(app)("/v1/completions", b"{}", "r")
    assert answer.status == 500
    assert "oops" in json.loads(answer.body)["error"]["message"]


async def test_it_stays_until_it_is_cancelled() -> None:
    left = False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal left
        await receive()
        try:
            await receive()
        finally:
            left = True

    task = asyncio.create_task(asking(app)("/v1/completions", b"{}", "r"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert left


@pytest.mark.parametrize(("body", "told"), [(b'{"x":\n 1}', {"x": 1}), (b"<html>\xff", "<html>\ufffd")])
def test_an_answer_is_one_line(body: bytes, told: object) -> None:
    line = answer_line(
        "mine", "batch_req_1", Answer(status=400, body=body, headers={"x-request-id": "theirs"})
    )
    assert b"\n" not in line
    assert json.loads(line) == {
        "id": "batch_req_1",
        "custom_id": "mine",
        "response": {"status_code": 400, "request_id": "theirs", "body": told},
        "error": None,
    }


def test_what_was_not_asked_is_told_too() -> None:
    line = json.loads(unanswered_line("mine", "batch_req_1", "expired"))
    assert line["response"] is None
    assert line["error"]["code"] == "batch_expired"


async def test_an_app_that_waits_for_a_disconnect_hears_of_it() -> None:
    """As vLLM's handlers do: cancelled themselves, they would leave their work running."""
    seen: list[str] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await receive()
        seen.append((await receive())["type"])

    asked = asyncio.create_task(asking(app)("/v1/completions", b"{}", "r"))
    for _ in range(5):
        await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert seen == ["http.disconnect"]
