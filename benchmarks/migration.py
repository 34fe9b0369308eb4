"""Moves of running requests between real engines on this machine's CPUs (Markdown):

python -m benchmarks.migration [--rounds 5] [--streams 100] [--at-the-end]

One prefill and two decode instances of `deploy/specs/cpu.yaml` with a model whose engine has the work, not
the front end. First one stream at a time: how long it stands still when it moves with so many tokens of
context, beside what computing them anew takes, by turns. Then many at a time, told to move at random times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import httpx
import yaml

from benchmarks.cluster import URL, cluster, wait_serving
from benchmarks.fidelity import build_model, spec_for

CONTEXTS = (64, 128, 256, 512, 1024, 2048, 3500)
DEADLINE_S = 120.0
# Tokens before a move, and after it.
BEFORE, AFTER = 8, 24
AT_ONCE, LATEST_S = 8, 1.0


@dataclass(slots=True)
class Stream:
    """A request and when its tokens came."""

    name: str
    times_s: list[float] = field(default_factory=list)

    @property
    def usual_s(self) -> float:
        """Median time between two tokens."""
        return median(later - sooner for sooner, later in zip(self.times_s, self.times_s[1:], strict=False))

    @property
    def longest_s(self) -> float:
        """Longest time between two tokens."""
        return max(later - sooner for sooner, later in zip(self.times_s, self.times_s[1:], strict=False))


class Client:
    """Sends requests of random tokens."""

    def __init__(self, http: httpx.AsyncClient, seed: int) -> None:
        self._http = http
        self._random = Random(seed)
        self._count = 0

    async def stream(
        self,
        context: int,
        tokens: int,
        started: Callable[[Stream], Awaitable[Any]] | None = None,
        **more: Any,
    ) -> Stream:
        """Follow one to its end; `started` is called when it has `BEFORE` tokens."""
        self._count += 1
        stream = Stream(f"bench-{self._count}")
        body = {
            "model": "tiny",
            "prompt": [self._random.randrange(100, 4000) for _ in range(context)],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            **more,
        }
        loop = asyncio.get_running_loop()
        headers = {"x-request-id": stream.name}
        async with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    if "error" in json.loads(line.removeprefix("data: ")):
                        raise RuntimeError(line)
                    stream.times_s.append(loop.time())
                    if len(stream.times_s) == BEFORE and started is not None:
                        await started(stream)
        return stream

    async def move(self, stream: Stream, after_s: float = 0.0) -> bool:
        """To the instance where it is not; False where it can't be moved then."""
        await asyncio.sleep(after_s)
        for place in self._random.sample(("decode-0", "decode-1"), 2):
            answer = await self._http.post(f"/pdserve/move/{stream.name}", params={"to": place})
            if answer.status_code == 200:
                return True
        return False

    async def first_token_s(self, context: int) -> float:
        """Of a prompt that nobody has, computed where it decodes."""
        began_s = asyncio.get_running_loop().time()
        stream = await self.stream(context, 2, vllm_xargs={"pdserve_unsplit": 1})
        return stream.times_s[0] - began_s


async def by_context(client: Client, rounds: int) -> None:
    print("| context | usual token (ms) | standing still when moved (ms) | computed anew (ms) | ratio |")
    print("|---|---|---|---|---|")
    for context in CONTEXTS:
        usual, still, anew = [], [], []
        for _ in range(rounds):
            stream = await client.stream(context, BEFORE + AFTER, started=client.move)
            usual.append(stream.usual_s)
            still.append(stream.longest_s - stream.usual_s)
            anew.append(await client.first_token_s(context + BEFORE))
        token, moved, computed = (1e3 * median(values) for values in (usual, still, anew))
        cells = f"{context} | {token:.1f} | {moved:.0f} | {computed:.0f} | {computed / moved:.1f}"
        print(f"| {cells} |", flush=True)


async def many(client: Client, streams: int) -> None:
    random = Random(1)
    slots = asyncio.Semaphore(AT_ONCE)

    async def one() -> tuple[Stream, bool]:
        moves: list[asyncio.Task[bool]] = []

        async def started(stream: Stream) -> None:
            moves.append(asyncio.create_task(client.move(stream, random.uniform(0.0, LATEST_S))))

        async with slots:
            stream = await client.stream(random.randint(64, 1500), 100, started=started)
            return stream, await moves[0]

    done = await asyncio.gather(*(one() for _ in range(streams)))
    moved = [stream for stream, has_moved in done if has_moved]
    still = sorted(1e3 * (stream.longest_s - stream.usual_s) for stream in moved)
    usual = 1e3 * median(stream.usual_s for stream in moved)
    ends = [still[int(share * (len(still) - 1))] for share in (0.5, 0.9, 0.99)]
    print(
        f"\n{streams} streams, {AT_ONCE} at a time, {len(moved)} moved: the longest pause of each, beyond "
        f"its usual {usual:.0f} ms, is {ends[0]:.0f} ms at the median, {ends[1]:.0f} at the 90th percentile, "
        f"{ends[2]:.0f} at the 99th",
        flush=True,
    )


async def measure(rounds: int, streams: int) -> None:
    async with httpx.AsyncClient(base_url=URL, timeout=DEADLINE_S) as http:
        client = Client(http, seed=0)
        await by_context(client, 1)  # kernels and links warm up
        await by_context(client, rounds)
        await many(client, streams)
        for line in (await http.get("/metrics")).text.splitlines():
            if line.startswith(("pdserve_migration_stall_seconds_", "pdserve_kv_tokens_recomputed_total")):
                print(line)


def main() -> None:
    """Start the cluster and print what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument(
        "--at-the-end", action="store_true", help="read nothing before a request has ended (transfer.overlap)"
    )
    parser.add_argument("--size", default="medium", help="of benchmarks.fidelity")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = spec_for(Path(folder), build_model(Path(folder), args.size), args.size)
        raw = yaml.safe_load(path.read_text())
        raw["decode"]["count"] = 2
        raw["transfer"] = {"overlap": not args.at_the_end}
        path.write_text(yaml.safe_dump(raw))
        with cluster("", str(path)) as running:
            wait_serving(running)
            asyncio.run(measure(args.rounds, args.streams))


if __name__ == "__main__":
    main()
