"""The input of a batch: a JSON Lines file, one request a line, as OpenAI's Batch API has it.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": ..., ...}}

Checked line by line, so that nobody waits for another; of a good line only what the order of the requests
needs is kept, and where to read it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from typing import IO, Any, NamedTuple

# What a line may ask for, and how long an answer is where it does not say (vLLM's default, and a guess).
ENDPOINTS = {"/v1/chat/completions": 256, "/v1/completions": 16, "/v1/responses": 256}
LONGEST_CUSTOM_ID = 512
# Beyond the longest prompts there are; a line is read and parsed in one go, while nobody else has a turn.
MOST_LINE_BYTES = 8 << 20
# Of what is wrong, shown to whoever sent it.
MOST_SHOWN = 80
# Prompts are compared in blocks of so many characters: about the 64 tokens that few caches go below.
BLOCK_CHARS = 256
NAME_BYTES = 8
CHARS_PER_TOKEN = 4
_OUTPUT_KEYS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


class Line(NamedTuple):
    """A good line.

    Attributes:
        number: in the file, from 1.
        offset, size: its bytes in the file.
        blocks: names of the blocks of its prompt, one after the other, of `NAME_BYTES` each.
        input_tokens, output_tokens: as far as can be told without the model.
    """

    number: int
    offset: int
    size: int
    blocks: bytes
    input_tokens: float
    output_tokens: int


class BadLine(NamedTuple):
    """What is wrong with a file; `line` counts from 1, or is None for all of it. As the API tells it."""

    code: str
    message: str
    line: int | None
    param: str | None = None


class Asked(NamedTuple):
    """What a line asks for.

    Attributes:
        body: of the request, as it is in the file.
    """

    custom_id: str
    body: dict[str, Any]


class LineRefused(Exception):
    """A line that makes no sense: code, message, parameter."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(code, message, param)


def read_lines(file: IO[bytes], endpoint: str, most_lines: int) -> Iterator[Line | BadLine | None]:
    """Every line of a file, good or bad, in turn; None for an empty one. A file without lines, or with more
    than `most_lines`, is bad as a whole, and is read no further.

    Args:
        endpoint: one of `ENDPOINTS`; every line must be for it.
    """
    known: dict[str, int] = {}
    offset = number = 0
    for raw, size in _raw_lines(file):
        number += 1
        begin, offset = offset, offset + size
        if not raw.strip():
            yield None
            continue
        if len(known) >= most_lines:
            yield BadLine("too_many_tasks", f"a batch has at most {most_lines} requests", None)
            return
        try:
            asked = parse_line(raw, endpoint)
            if (first := known.setdefault(asked.custom_id, number)) != number:
                raise LineRefused(
                    "duplicate_custom_id",
                    f"custom_id {asked.custom_id!r} is that of line {first}",
                    "custom_id",
                )
        except LineRefused as refused:
            code, message, param = refused.args
            known.setdefault(f"\n{number}", number)  # counted: no custom_id of a good line has this name
            yield BadLine(code, f"line {number}: {message}", number, param)
            continue
        prompt = prompt_text(asked.body)
        yield Line(
            number=number,
            offset=begin,
            size=size,
            blocks=block_names(prompt),
            input_tokens=max(1.0, len(prompt) / CHARS_PER_TOKEN),
            output_tokens=_output_tokens(asked.body, ENDPOINTS[endpoint]),
        )
    if not known:
        yield BadLine("empty_file", "the file has no requests", None)


def _raw_lines(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """(line, its bytes in the file); of one that is too long just more than may be."""
    while raw := file.readline(MOST_LINE_BYTES + 1):
        size, end = len(raw), raw
        while size > MOST_LINE_BYTES and not end.endswith(b"\n") and (end := file.readline(MOST_LINE_BYTES)):
            size += len(end)
        yield raw, size


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def parse_line(raw: bytes, endpoint: str) -> Asked:
    """What a line asks for. Raises LineRefused."""
    if len(raw) > MOST_LINE_BYTES:
        raise LineRefused("line_too_long", f"it has more than {MOST_LINE_BYTES >> 20} MiB")
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, or nested without end
        raise LineRefused("invalid_json_line", f"it is not JSON: {error}") from None
    if not isinstance(line, dict):
        raise LineRefused("invalid_json_line", "it is not a JSON object")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= LONGEST_CUSTOM_ID or "\n" in custom_id:
        what = "a text of one line" if "custom_id" in line else "missing; give a text"
        raise LineRefused(
            "invalid_custom_id",
            f"custom_id is to be {what}, of 1 to {LONGEST_CUSTOM_ID} characters",
            "custom_id",
        )
    if (method := line.get("method", "POST")) != "POST":
        raise LineRefused("invalid_method", f"method {_shown(method)} is not POST", "method")
    if (url := line.get("url")) != endpoint:
        raise LineRefused("invalid_url", f"url {_shown(url)} is not the batch's endpoint {endpoint}", "url")
    body = line.get("body")
    if not isinstance(body, dict):
        raise LineRefused("invalid_body", "body is to be a JSON object", "body")
    if body.get("stream"):
        raise LineRefused("invalid_body", "a batch has no streams: leave 'stream' out", "body.stream")
    return Asked(custom_id, body)


def custom_ids(file: IO[bytes], endpoint: str) -> Iterator[tuple[int, str]]:
    """(line number, custom_id) of the good lines."""
    for number, (raw, _) in enumerate(_raw_lines(file), 1):
        with suppress(LineRefused):
            yield number, parse_line(raw, endpoint).custom_id


def prompt_text(body: dict[str, Any]) -> str:
    """The prompt of a request in the order in which templates render it, so far as that can be known: two
    that begin alike here begin alike there."""
    parts = [json.dumps(body["tools"])] if body.get("tools") else []
    if isinstance(instructions := body.get("instructions"), str):
        parts.append(instructions)
    for key in ("prompt", "input"):
        if isinstance(text := body.get(key), str):
            parts.append(text)
        elif isinstance(text, list) and text:
            parts += [one if isinstance(one, str) else json.dumps(one) for one in text]
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            parts.append(json.dumps(message))
            continue
        content = message.get("content")
        text = content if isinstance(content, str) else json.dumps(content)
        parts.append(f"{message.get('role')}:{text}")
    return "\x1e".join(parts)


def block_names(text: str) -> bytes:
    """The names of a text's blocks: equal names, equal blocks. A twentieth or less of the text, which is not
    kept; in the order of these names, texts with a common beginning stand together."""
    names = []
    for begin in range(0, len(text), BLOCK_CHARS):
        block = text[begin : begin + BLOCK_CHARS].encode("utf-8", "surrogatepass")
        names.append(blake2b(block, digest_size=NAME_BYTES).digest())
    return b"".join(names)


# More is nonsense, which vLLM will refuse; here it would be no number to reckon with.
MOST_TOKENS = 10_000_000


def _output_tokens(body: dict[str, Any], usual: int) -> int:
    for key in _OUTPUT_KEYS:
        if isinstance(tokens := body.get(key), int) and tokens > 0:
            usual = min(tokens, MOST_TOKENS)
            break
    choices = body.get("n")
    return usual * (min(choices, MOST_TOKENS) if isinstance(choices, int) and choices > 0 else 1)
