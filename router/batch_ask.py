"""Asks the app of this very process, as a client over HTTP would, and tells the answer in a batch's lines.

No socket and no proxy in between: the app gets an ASGI scope with the traits of a request that fills slack.
So the answer is exactly what vLLM's server says.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from router.traits import SCOPE_KEY, Asgi, Traits

logger = logging.getLogger(__name__)

# vLLM's priority: after whatever a client may have asked for. What it uses is a C int.
LAST = 1_000_000
# For the app to stop what nobody waits for any more.
LEAVE_S = 5.0
TRAITS = Traits(slo_class="batch", priority=LAST, fills_slack=True)
# (endpoint, body, request id) -> its answer.
Ask = Callable[[str, bytes, str], Awaitable["Answer"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the app said."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_ok(self) -> bool:
        return 200 <= self.status < 300


def asking(app: Asgi, api_key: str | None = None) -> Ask:
    """Asks an app.

    Args:
        api_key: one that the app accepts, where it wants any.
    """
    known = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    if api_key:
        known.append((b"authorization", f"Bearer {api_key}".encode()))

    async def ask(endpoint: str, body: bytes, request_id: str) -> Answer:
        headers = [*known, (b"content-length", b"%d" % len(body)), (b"x-request-id", request_id.encode())]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": endpoint, "raw_path": endpoint.encode(), "query_string": b"",
            "root_path": "", "headers": headers, "client": None, "server": None, SCOPE_KEY: TRAITS,
        }  # fmt: skip
        return await _exchange(app, scope, body)

    return ask


async def _exchange(app: Asgi, scope: dict[str, Any], body: bytes) -> Answer:
    status, headers = 500, {}
    parts: list[bytes] = []
    given = False
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {
                name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]
            }
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    # In a task of its own: an app that waits for its handler and for a disconnect, as vLLM's does, would be
    # cancelled itself and leave both of them running.
    serving = asyncio.ensure_future(app(scope, receive, send))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        left.set()
        await asyncio.wait({serving}, timeout=LEAVE_S)
        serving.cancel()
        raise
    except Exception as error:  # the HTTP edge: a server would log it and close the connection
        logger.exception("the app failed on %s", scope["path"])
        if not parts:
            said = {
                "error": {"message": repr(error), "type": "Internal Server Error", "param": None, "code": 500}
            }
            return Answer(status=500, body=json.dumps(said).encode())
    return Answer(status=status, body=b"".join(parts), headers=headers)


def answer_line(custom_id: str, request_id: str, answer: Answer) -> bytes:
    """An answer as a line of the output or of the error file, without its end."""
    try:
        # Parsed, as it may be anything: a line must be one line of JSON.
        body = json.loads(answer.body)
    except ValueError:
        body = answer.body.decode("utf-8", "replace")
    response = {
        "status_code": answer.status,
        "request_id": answer.headers.get("x-request-id", request_id),
        "body": body,
    }
    return _line(custom_id, request_id, response, None)


def unanswered_line(custom_id: str, request_id: str, end: str) -> bytes:
    """A line of the error file, without its end, for a request that was not run to its end.

    Args:
        end: of its batch, `expired` or `cancelled`.
    """
    said = {
        "expired": "This request could not be executed before the completion window expired.",
        "cancelled": "The batch was cancelled before this request was answered.",
    }
    return _line(custom_id, request_id, None, {"code": f"batch_{end}", "message": said[end]})


def _line(custom_id: str, request_id: str, response: object, error: object) -> bytes:
    line = {"id": request_id, "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(line, separators=(",", ":")).encode()
