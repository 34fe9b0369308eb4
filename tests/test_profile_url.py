"""The probe of a server, against a small one that answers at once, well or badly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from random import Random
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from cluster.errors import EnvironmentProblem
from deploy.profiler.grid import Point
from deploy.profiler.url import (
    LONE_PROMPTS,
    PROMPTS_BESIDE,
    STEADY_TOKENS,
    PointStreams,
    ServedModel,
    UrlProbe,
    measure_url,
    served_model,
    session_to_measure,
)


class FakeServer:
    """An OpenAI completions server without a model.

    Attributes:
        bodies: what it was asked.
        fails: answers with this HTTP status, or this text as an event, instead.
        together: tokens in one event.
        active: answers under way.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.fails: int | str | None = None
        self.together = 1
        self.active = 0
        self.most_active = 0
        self.url = ""
        self.max_model_len: int | None = 4096

    async def list_models(self, request: web.Request) -> web.Response:
        models = [{"id": name, "max_model_len": self.max_model_len} for name in ("tiny", "other")]
        return web.json_response({"data": models})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if isinstance(self.fails, int):
            return web.json_response({"error": {"message": "no room"}}, status=self.fails)
        self.active += 1
        self.most_active = max(self.active, self.most_active)
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b": a comment\n\n")
            if self.fails is not None:
                await response.write(f"data: {self.fails}\n\n".encode())
                return response
            for _ in range(0, body["max_tokens"], self.together):
                choice: dict[str, Any] = {"text": "x"}
                if body.get("return_token_ids"):
                    choice["token_ids"] = [7] * self.together
                await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
                await asyncio.sleep(0)
            await response.write(b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n')
            return response
        finally:
            self.active -= 1


@asynccontextmanager
async def serving() -> AsyncIterator[FakeServer]:
    server = FakeServer()
    app = web.Application()
    app.router.add_get("/v1/models", server.list_models)
    app.router.add_post("/v1/completions", server.complete)
    # With handler_cancellation a client that hangs up cancels its handler, as in vLLM's server.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        server.url = f"http://{host}:{port}"
        yield server
    finally:
        await runner.cleanup()


async def visit(server: FakeServer, point: Point) -> PointStreams:
    model = ServedModel(name="tiny", max_model_len=4096)
    async with aiohttp.ClientSession() as session:
        return await UrlProbe(session, server.url, model, Random(0), 0.0).measure(point)


async def test_prompts_are_sent_at_once_and_ask_for_one_token() -> None:
    async with serving() as server:
        found = await visit(server, Point("prefill", 4, 32))
    assert server.most_active == 4
    assert [len(stream.times_s) for stream in found.streams] == [1] * 4
    assert all(stream.ttft_s > 0 and not stream.decodes for stream in found.streams)
    assert [body["max_tokens"] for body in server.bodies] == [1] * 4
    prompts = {tuple(body["prompt"]) for body in server.bodies}
    assert len(prompts) == 4
    assert all(len(prompt) == 32 for prompt in prompts)


async def test_decoding_streams_are_hung_up_on_when_enough_was_seen() -> None:
    async with serving() as server:
        found = await visit(server, Point("decode", 3, 64))
        async with asyncio.timeout(5):
            while server.active:
                await asyncio.sleep(0)
    assert [body["max_tokens"] for body in server.bodies] == [4096 - 64] * 3
    assert all(STEADY_TOKENS < len(stream.times_s) < 4096 - 64 for stream in found.streams)
    assert all(stream.times_s == tuple(sorted(stream.times_s)) for stream in found.streams)


async def test_a_lone_prompt_is_measured_several_times_one_after_the_other() -> None:
    async with serving() as server:
        found = await visit(server, Point("prefill", 1, 32))
    assert server.most_active == 1
    assert [stream.burst for stream in found.streams] == list(range(LONE_PROMPTS))
    assert [len(burst) for burst in found.bursts(1)] == [1] * LONE_PROMPTS


async def test_a_lone_request_comes_after_a_pause() -> None:
    async with serving() as server, session_to_measure() as session:
        model = ServedModel(name="tiny", max_model_len=4096)
        probe = UrlProbe(session, server.url, model, Random(0), 0.05)
        lone = await probe.measure(Point("prefill", 1, 32))
    times = [(stream.sent_s, stream.times_s[0]) for stream in lone.streams]
    assert all(after[0] - before[1] >= 0.05 for before, after in pairwise(times))


async def test_bursts_of_prompts_go_beside_decodes_one_after_the_other() -> None:
    async with serving() as server:
        found = await visit(server, Point("mixed", 2, 64, 16))
    beside = [stream for stream in found.streams if not stream.decodes]
    bursts = found.bursts(PROMPTS_BESIDE)
    assert bursts
    ends = [(min(s.sent_s for s in burst), max(s.times_s[0] for s in burst)) for burst in bursts]
    assert all(before[1] <= after[0] for before, after in pairwise(ends))
    assert all(stream.prompt_tokens == 16 and len(stream.times_s) == 2 for stream in beside)
    assert sum(stream.decodes for stream in found.streams) == 2


async def test_many_streams_count_tokens_that_come_in_one_event() -> None:
    async with serving() as server:
        server.together = 3
        found = await visit(server, Point("decode", 8, 16))
    assert all(body["return_token_ids"] for body in server.bodies)
    for stream in found.streams:
        assert stream.times_s[0] == stream.times_s[2]
        assert len(stream.times_s) % 3 == 0


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        (400, "HTTP 400"),
        ('{"error": {"message": "out of blocks"}}', "out of blocks"),
        ("{broken", "unreadable event"),
    ],
)
@pytest.mark.parametrize(
    "point", [Point("prefill", 2, 32), Point("decode", 2, 32), Point("mixed", 2, 32, 16)]
)
async def test_a_server_that_fails_is_an_error_with_its_words(
    fails: int | str, told: str, point: Point
) -> None:
    async with serving() as server:
        server.fails = fails
        with pytest.raises(EnvironmentProblem, match=told):
            await visit(server, point)


async def test_the_model_is_the_first_or_the_named_one() -> None:
    async with serving() as server, aiohttp.ClientSession() as session:
        assert await served_model(session, server.url, None) == ServedModel(name="tiny", max_model_len=4096)
        assert (await served_model(session, server.url, "other")).name == "other"
        with pytest.raises(EnvironmentProblem, match="it has tiny, other, not third"):
            await served_model(session, server.url, "third")
        with pytest.raises(EnvironmentProblem, match="check that the server is up"):
            await served_model(session, server.url + "/elsewhere", None)


async def measure(url: str, **changes: Any) -> tuple[ServedModel, list[PointStreams]]:
    options: dict[str, Any] = {"model": None, "max_prompt": 32, "max_requests": 2, "seconds": 1e-9}
    return await measure_url(url, seed=0, say=lambda line: None, lone_pause_s=0.0, **(options | changes))


async def test_every_point_is_measured_in_every_round_but_the_first() -> None:
    async with serving() as server:
        model, visits = await measure(server.url)
    assert model.name == "tiny"
    points = [visit.point for visit in visits]
    assert {points.count(point) for point in points} == {2}
    assert {point.kind for point in points} == {"prefill", "decode", "mixed"}


async def test_prompts_that_leave_no_room_for_an_answer_are_refused() -> None:
    async with serving() as server:
        server.max_model_len = 300
        with pytest.raises(ValueError, match="expected at most 108"):
            await measure(server.url, max_prompt=200)


async def test_no_server() -> None:
    with pytest.raises(EnvironmentProblem, match="pdserve up"):
        await measure("http://127.0.0.1:9")
