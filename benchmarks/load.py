"""A load client that costs little: raw HTTP/1.1, no parsing but of the usage at the end, so that the server
is the limit."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

_TAIL_BYTES = 1024
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What a load got.

    Attributes:
        requests, tokens: complete answers, and their output tokens.
        wall_s: from the first byte sent to the last received.
        first_s: time to the first token of each request, sorted.
    """

    requests: int
    tokens: int
    wall_s: float
    first_s: tuple[float, ...]


async def stream_load(
    url: str,
    *,
    model: str,
    requests: int,
    concurrency: int,
    prompt_tokens: int,
    output_tokens: int,
    seed: int = 0,
    deadline_s: float = 300.0,
) -> LoadResult:
    """Send streamed completions, `concurrency` at a time, and count their tokens.

    Raises RuntimeError for an answer that is not 200 or has not all its tokens.
    """
    rng = random.Random(seed)
    host, port = urlsplit(url).hostname or "127.0.0.1", urlsplit(url).port or 80
    bodies = []
    for _ in range(requests):
        body = json.dumps(
            {
                "model": model,
                "prompt": [rng.randrange(100, 4000) for _ in range(prompt_tokens)],
                "max_tokens": output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        bodies.append(head.encode() + body)
    slots = asyncio.Semaphore(concurrency)
    first: list[float] = []

    async def one(body: bytes) -> int:
        async with slots:
            return await _one(host, port, body, first)

    began = time.perf_counter()
    async with asyncio.timeout(deadline_s):
        counts = await asyncio.gather(*(one(body) for body in bodies))
    wall_s = time.perf_counter() - began
    if short := [count for count in counts if count != output_tokens]:
        raise RuntimeError(f"{len(short)} answers had another length than {output_tokens}: {short[:5]}")
    return LoadResult(requests=requests, tokens=sum(counts), wall_s=wall_s, first_s=tuple(sorted(first)))


async def _one(host: str, port: int, body: bytes, first: list[float]) -> int:
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    sent = time.perf_counter()
    try:
        writer.write(body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status!r} {(await reader.read(2000))!r}")
        tail, begun = b"", False
        while data := await reader.read(1 << 16):
            tail = (tail + data)[-_TAIL_BYTES:]
            if not begun and b"data: {" in tail:
                begun = True
                first.append(time.perf_counter() - sent)
        usage = _USAGE.search(tail)
        return int(usage[1]) if usage else 0
    finally:
        writer.close()
