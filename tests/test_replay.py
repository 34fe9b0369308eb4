"""The load client against a small server that answers as told, well or badly."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from cluster.errors import EnvironmentProblem
from cluster.request import Slo
from deploy.replay import ReplayOptions, ReplayProgress, replay
from deploy.replay_report import STATUSES, Distribution, ReplayReport, RequestOutcome, parse_goodput
from deploy.slo_classes import SloClass
from deploy.workload import WorkloadRequest, prompt_tokens

Behaviour = Callable[["FakeServer", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class FakeServer:
    """An OpenAI completions server with one behaviour; keeps what it was asked."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.hung_up = 0
        self.active = 0
        self.most_active = 0
        self.url = ""
        self.models: list[str] = ["tiny", "other"]

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            return await self.behaviour(self, request, body)
        except (asyncio.CancelledError, ConnectionResetError):
            self.hung_up += 1
            raise
        finally:
            self.active -= 1


@asynccontextmanager
async def serving(behaviour: Behaviour) -> AsyncIterator[FakeServer]:
    server = FakeServer(behaviour)
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


async def open_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    return response


async def send(response: web.StreamResponse, event: object) -> None:
    text = event if isinstance(event, str) else json.dumps(event)
    await response.write(f"data: {text}\n\n".encode())


def token(finish_reason: str | None = None, text: str = "x") -> dict[str, object]:
    return {
        "object": "text_completion",
        "choices": [{"index": 0, "text": text, "finish_reason": finish_reason}],
    }


def usage(
    body: dict[str, Any], output_tokens: int | None = None, prompt: int | None = None
) -> dict[str, object]:
    return {
        "choices": [],
        "usage": {
            "prompt_tokens": len(body["prompt"]) if prompt is None else prompt,
            "completion_tokens": body["max_tokens"] if output_tokens is None else output_tokens,
        },
    }


async def stream_tokens(response: web.StreamResponse, count: int, finish: str = "length") -> None:
    for index in range(count):
        await send(response, token(finish if index == count - 1 else None))


async def answer_well(server: FakeServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await open_stream(request)
    await response.write(b": a comment, as proxies send to keep a connection\n\nevent: token\n")
    await stream_tokens(response, body["max_tokens"])
    await send(response, usage(body))
    await send(response, "[DONE]")
    return response


def workload(count: int, gap_s: float = 0.0, output_tokens: int = 3) -> list[WorkloadRequest]:
    return [
        WorkloadRequest(arrival_s=gap_s * i, input_tokens=5 + i, output_tokens=output_tokens)
        for i in range(count)
    ]


async def outcome_of(behaviour: Behaviour, options: ReplayOptions | None = None) -> RequestOutcome:
    """What one request of five prompt and three output tokens comes to."""
    async with serving(behaviour) as server:
        report = await replay(server.url, workload(1), options or ReplayOptions(model="m"))
    return report.outcomes[0]


# Good answers, and what is sent.


async def test_every_request_gets_its_answer_and_its_measurements() -> None:
    async with serving(answer_well) as server:
        report = await replay(server.url, workload(20, gap_s=0.002), ReplayOptions())
    assert report.counts == {"ok": 20, "rejected": 0, "failed": 0, "timeout": 0, "cancelled": 0}
    assert (report.model, report.attainment, report.errors) == ("tiny", 1.0, [])
    for index, outcome in enumerate(report.outcomes):
        assert (outcome.index, outcome.input_tokens, outcome.output_tokens) == (index, 5 + index, 3)
        assert outcome.ttft_s is not None
        assert outcome.tpot_s is not None
        assert outcome.e2e_s is not None
        assert outcome.max_gap_s is not None
        assert 0 < outcome.ttft_s <= outcome.e2e_s <= outcome.end_s - outcome.sent_s
        assert outcome.tpot_s == pytest.approx((outcome.e2e_s - outcome.ttft_s) / 2)
        assert outcome.max_gap_s <= outcome.e2e_s - outcome.ttft_s
        assert outcome.sent_s >= index * 0.002, "never before it is due"
        assert outcome.lag_s == pytest.approx(outcome.sent_s - index * 0.002)
    assert report.duration_s == max(outcome.end_s for outcome in report.outcomes)


async def test_what_is_sent() -> None:
    hashed = WorkloadRequest(
        arrival_s=0.0, input_tokens=700, output_tokens=4, hash_ids=(1, 2), session_id="a b"
    )
    sibling = replace(hashed, hash_ids=(1, 3), session_id=None)
    options = ReplayOptions(model="m", seed=7, vocab_low=10, vocab_high=20, headers={"x-tenant-id": "t"})
    async with serving(answer_well) as server:
        await replay(f"{server.url}/v1/", [hashed, sibling], options)
    first, second = server.bodies
    assert first == {
        "model": "m",
        "prompt": prompt_tokens(hashed, 0, seed=7, vocab_low=10, vocab_high=20),
        "max_tokens": 4,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert first["prompt"][:512] == second["prompt"][:512]
    assert first["prompt"][512:] != second["prompt"][512:]
    assert [headers.get("x-session-id") for headers in server.headers] == ["a b", None]
    assert {headers["x-tenant-id"] for headers in server.headers} == {"t"}
    assert [headers["x-request-id"] for headers in server.headers] == ["replay-7-0", "replay-7-1"]
    assert {headers["content-type"] for headers in server.headers} == {"application/json"}


async def test_bounds_go_along_and_count() -> None:
    strict = SloClass(name="strict", slo=Slo(ttft_s=1e-9, tpot_s=0.0255))
    loose = SloClass(name="loose")
    async with serving(answer_well) as server:
        options = ReplayOptions(classes=[strict, loose, loose])
        report = await replay(server.url, workload(3), options)
    found = [
        (headers.get("x-pdserve-ttft-ms"), headers.get("x-pdserve-tpot-ms")) for headers in server.headers
    ]
    assert sorted(found, key=str) == sorted([("1e-06", "25.5"), (None, None), (None, None)], key=str)
    assert report.by_class == {"strict": (1, 0), "loose": (2, 2)}
    assert (report.met, report.attainment) == (2, 2 / 3)
    assert report.to_json()["classes"] == {
        "strict": {"requests": 1, "met": 0},
        "loose": {"requests": 2, "met": 2},
    }
    lines = report.to_text().splitlines()
    assert any(line.endswith("requests/s with what each asked for") for line in lines)
    assert "            strict: 0.0% (0 of 1)" in lines
    assert "            loose: 100.0% (2 of 2)" in lines


async def test_the_load_is_open_loop() -> None:
    everyone = asyncio.Event()

    async def wait_for_all(
        server: FakeServer, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        if server.active == 150:  # more than aiohttp's default of 100 connections
            everyone.set()
        await everyone.wait()
        return await answer_well(server, request, body)

    async with serving(wait_for_all) as server:
        report = await replay(server.url, workload(150), ReplayOptions(model="m", timeout_s=4.0))
    assert report.counts["ok"] == server.most_active == 150


async def test_requests_are_sent_in_the_order_of_arrival() -> None:
    requests = list(reversed(workload(3, gap_s=0.005)))
    async with serving(answer_well) as server:
        report = await replay(server.url, requests, ReplayOptions(model="m"))
    assert [len(body["prompt"]) for body in server.bodies] == [5, 6, 7]
    assert [outcome.index for outcome in report.outcomes] == [2, 1, 0], (
        "an index is a place in what was given"
    )


async def test_empty_texts_are_tokens_and_one_token_has_no_tpot() -> None:
    async def one_token(server: FakeServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await open_stream(request)
        await send(response, token("length", text=""))
        await send(response, usage(body))
        await send(response, "[DONE]")
        return response

    async with serving(one_token) as server:
        options = ReplayOptions(model="m", slo=Slo(ttft_s=5.0, tpot_s=1e-9))
        report = await replay(server.url, workload(1, output_tokens=1), options)
    (outcome,) = report.outcomes
    assert outcome.status == "ok"
    assert outcome.ttft_s == outcome.e2e_s
    assert (outcome.tpot_s, outcome.max_gap_s) == (None, None)
    assert report.met == 1


async def test_events_may_be_cut_and_joined_anywhere() -> None:
    async def in_pieces(server: FakeServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await open_stream(request)
        events = [token(), token(), token("length", text="ü"), usage(body)]
        text = "".join(f"data:{json.dumps(event, ensure_ascii=False)}\r\n\r\n" for event in events)
        whole = (text + "data: [DONE]\r\n\r\n").encode()
        for start in range(0, len(whole), 50):
            await response.write(whole[start : start + 50])
            await asyncio.sleep(0)
        return response

    assert (await outcome_of(in_pieces)).status == "ok"


async def test_progress_counts_up_to_the_end() -> None:
    seen: list[ReplayProgress] = []
    async with serving(answer_well) as server:
        await replay(server.url, workload(4), ReplayOptions(model="m"), seen.append)
    assert len(seen) == 8, "one per send and one per end"
    assert [p.sent for p in seen] == sorted(p.sent for p in seen)
    last = seen[-1]
    assert (last.total, last.sent, last.finished["ok"]) == (4, 4, 4)
    assert tuple(last.finished) == STATUSES
    assert last.elapsed_s > 0


# Bad answers.


@pytest.mark.parametrize(("http_status", "status"), [(429, "rejected"), (503, "rejected"), (400, "failed")])
async def test_an_error_response(http_status: int, status: str) -> None:
    async def refuse(server: FakeServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        headers = {"Retry-After": "1", "x-pdserve-reason": "rejected-saturated"}
        error = {"error": {"message": "all\nbusy", "type": "t", "param": None, "code": http_status}}
        return web.json_response(error, status=http_status, headers=headers)

    outcome = await outcome_of(refuse)
    assert (outcome.status, outcome.output_tokens, outcome.ttft_s) == (status, 0, None)
    assert outcome.error == f"HTTP {http_status} (rejected-saturated): all busy"


async def test_responses_that_are_no_event_stream() -> None:
    async def flat(server: FakeServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"object": "error", "message": "no such model", "code": 404}, status=200)

    async def page(server: FakeServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(text="<h1>bad gateway</h1>" * 100, status=502, content_type="text/html")

    outcome = await outcome_of(flat)
    assert outcome.status == "failed"
    assert outcome.error == "HTTP 200, application/json instead of an event stream: no such model"
    outcome = await outcome_of(page)
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error.startswith("HTTP 502: <h1>bad gateway")
    assert len(outcome.error) < 250


async def test_an_error_event_in_the_stream() -> None:
    async def break_off(server: FakeServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await open_stream(request)
        await send(response, token())
        await send(response, {"error": {"message": "worker lost", "type": "x", "code": 500}})
        await send(response, "[DONE]")
        return response

    outcome = await outcome_of(break_off)
    assert outcome.status == "failed"
    assert outcome.error == "error in the stream: worker lost, after the first token"
    assert outcome.ttft_s is not None, "what was measured is kept"


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([token(), token()], "stream ended without finish_reason, after the first token"),
        ([], "stream ended without finish_reason, before the first token"),
        ([token(), token("abort"), "USAGE", "[DONE]"], "finish_reason 'abort', after the first token"),
        ([token("length"), "[DONE]"], "stream ended without usage"),
        ([token("length"), "USAGE"], "stream ended without [DONE]"),
        ([token("stop"), usage({"prompt": [1] * 5}, 2), "[DONE]"], "2 output tokens instead of 3"),
        ([token("length"), usage({"prompt": [1] * 6}, 3), "[DONE]"], "6 prompt tokens instead of 5"),
        ([token(), "{not json"], "unreadable event in the stream: {not json"),
        (['{"choices": 7}'], 'unreadable event in the stream: {"choices": 7}'),
        (['{"error": "flat"}'], "error in the stream: flat, before the first token"),
    ],
)
async def test_incomplete_answers_are_failures(events: list[object], said: str) -> None:
    async def play(server: FakeServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await open_stream(request)
        for event in events:
            await send(response, usage(body) if event == "USAGE" else event)
        return response

    outcome = await outcome_of(play)
    assert (outcome.status, outcome.error) == ("failed", said)


async def test_a_connection_that_breaks_in_mid_stream() -> None:
    async def drop(server: FakeServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await open_stream(request)
        await send(response, token())
        await asyncio.sleep(0.01)
        assert request.transport is not None
        request.transport.close()
        return response

    outcome = await outcome_of(drop)
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error.startswith("ClientPayloadError: ")
    assert outcome.error.endswith(", after the first token")


async def test_nobody_listens() -> None:
    async with serving(answer_well) as server:
        pass
    report = await replay(server.url, workload(2), ReplayOptions(model="m"))
    assert report.counts["failed"] == 2
    assert report.outcomes[0].error is not None
    assert "ClientConnectorError" in report.outcomes[0].error
    assert (report.attainment, report.goodput_rps) == (0.0, 0.0)


# Deadlines and cancellation.


async def stall(server: FakeServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """One token, and then nothing until the client hangs up."""
    response = await open_stream(request)
    await send(response, token())
    await asyncio.Event().wait()
    return response


async def stall_silently(
    server: FakeServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("behaviour", "timeout_s", "when"),
    [(stall, 0.2, "after"), (stall_silently, 0.05, "before")],  # the first token needs time on a busy machine
)
async def test_every_request_has_a_deadline(behaviour: Behaviour, timeout_s: float, when: str) -> None:
    async with serving(behaviour) as server:
        report = await replay(server.url, workload(3), ReplayOptions(model="m", timeout_s=timeout_s))
        await until(lambda: server.active == 0)
        assert server.hung_up == len(server.bodies), "every handler was told"
    assert report.counts["timeout"] == 3
    assert report.errors == [(f"no end within {timeout_s} s, {when} the first token", 3)]
    assert timeout_s <= report.duration_s < 1.0
    assert [outcome.ttft_s is None for outcome in report.outcomes] == [when == "before"] * 3


async def test_cancelled_requests_hang_up_and_are_not_judged() -> None:
    async def stall_long_ones(
        server: FakeServer, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        slow = len(body["prompt"]) - 5 in cancelled
        return await (stall if slow else answer_well)(server, request, body)

    options = ReplayOptions(model="m", cancel_share=0.3, cancel_within_s=0.03, timeout_s=2.0, seed=3)
    cancelled = set(range(10))  # in a first replay all stall: learn whom the seed picks
    async with serving(stall_long_ones) as server:
        first = await replay(server.url, workload(10), replace(options, timeout_s=0.05))
        cancelled = {outcome.index for outcome in first.outcomes if outcome.status == "cancelled"}
        report = await replay(server.url, workload(10), options)
        await until(lambda: server.active == 0)
        assert server.hung_up == len(server.bodies) - 7, "a client that hangs up ends its handler"
    assert len(cancelled) == 3
    assert (report.counts["ok"], report.counts["cancelled"], report.attainment) == (7, 3, 1.0)
    assert cancelled == {outcome.index for outcome in report.outcomes if outcome.status == "cancelled"}
    assert report.errors == []


async def test_cancellation_is_not_swallowed() -> None:
    async with serving(stall) as server:
        task = asyncio.create_task(replay(server.url, workload(3), ReplayOptions(model="m")))
        await until(lambda: server.active == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: server.hung_up == 3)


# The model's name, and options.


async def test_a_server_without_models_is_an_environment_problem() -> None:
    async with serving(answer_well) as server:
        server.models = []
        with pytest.raises(EnvironmentProblem, match="does not name a model"):
            await replay(server.url, workload(1), ReplayOptions())
        with pytest.raises(EnvironmentProblem, match="HTTP 404"):
            await replay(f"{server.url}/elsewhere", workload(1), ReplayOptions())
    with pytest.raises(EnvironmentProblem, match=server.url):
        await replay(server.url, workload(1), ReplayOptions())


async def test_nothing_to_replay() -> None:
    with pytest.raises(ValueError, match="no requests"):
        await replay("http://127.0.0.1:1", [], ReplayOptions())


@pytest.mark.parametrize(
    "bad",
    [
        {"timeout_s": 0.0},
        {"timeout_s": math.inf},
        {"cancel_share": 1.1},
        {"cancel_within_s": 0.0},
        {"vocab_low": 5, "vocab_high": 5},
        {"vocab_low": -1},
    ],
)
def test_options_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        ReplayOptions(**bad)


def test_goodput_is_spelled_as_vllm_bench_does() -> None:
    assert parse_goodput(["ttft:300", "tpot:50"]) == Slo(ttft_s=0.3, tpot_s=0.05)
    assert parse_goodput(["tpot:12.5"]) == Slo(ttft_s=math.inf, tpot_s=0.0125)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], "nothing given"),
        (["e2el:100"], "unknown metric in 'e2el:100'"),
        (["300"], "unknown metric in '300'"),
        (["ttft"], "'' in 'ttft' is not a number"),
        (["ttft:fast"], "'fast' in 'ttft:fast' is not a number"),
        (["ttft:-1"], "not a positive number of ms"),
        (["ttft:nan"], "not a positive number of ms"),
        (["ttft:1", "ttft:2"], "ttft is given twice"),
    ],
)
def test_bad_goodput_says_what_is_expected(pairs: list[str], said: str) -> None:
    with pytest.raises(ValueError, match="expected ttft:MS and tpot:MS") as caught:
        parse_goodput(pairs)
    assert said in str(caught.value)


# The report.


def outcome(index: int, **changes: Any) -> RequestOutcome:
    fine = RequestOutcome(
        index=index,
        status="ok",
        input_tokens=100,
        output_tokens=11,
        sent_s=0.0,
        lag_s=0.001,
        end_s=2.0,
        ttft_s=0.2,
        tpot_s=0.02,
        e2e_s=0.4,
        max_gap_s=0.03,
        error=None,
    )
    return replace(fine, **changes)


def report_of(*outcomes: RequestOutcome, slo: Slo | None = None) -> ReplayReport:
    slo = slo or Slo(ttft_s=0.3, tpot_s=0.05)
    return ReplayReport(url="http://h:1", model="m", slo=slo, duration_s=2.0, outcomes=outcomes)


MIXED = report_of(
    outcome(0),
    outcome(1, ttft_s=0.3, tpot_s=0.05),  # on the bound is within it
    outcome(2, ttft_s=0.31),
    outcome(3, tpot_s=0.06),
    outcome(4, status="rejected", ttft_s=None, tpot_s=None, e2e_s=None, error="HTTP 429: busy"),
    outcome(5, status="failed", error="HTTP 500: broken"),
    outcome(6, status="failed", error="HTTP 500: broken"),
    outcome(7, status="timeout", error="no end"),
    outcome(8, status="cancelled"),
    outcome(9, status="cancelled"),
)


def test_attainment_is_of_all_but_the_cancelled() -> None:
    assert MIXED.counts == {"ok": 4, "rejected": 1, "failed": 2, "timeout": 1, "cancelled": 2}
    assert (MIXED.met, MIXED.attainment, MIXED.goodput_rps) == (2, 2 / 8, 1.0)
    assert MIXED.throughput == {
        "request_rps": 2.0,
        "input_tokens_per_s": 200.0,
        "output_tokens_per_s": 22.0,
    }
    ttft = MIXED.latencies["ttft_s"]
    assert ttft is not None
    assert (ttft.max, ttft.mean, ttft.p50) == pytest.approx((0.31, 1.01 / 4, 0.25))
    assert MIXED.errors[0] == ("HTTP 500: broken", 2)


def test_distribution_of_nothing() -> None:
    assert Distribution.of([None]) is None
    assert Distribution.of([2.0, None]) == Distribution(mean=2.0, p50=2.0, p90=2.0, p99=2.0, max=2.0)


def test_json_is_plain() -> None:
    text = json.dumps(MIXED.to_json(), allow_nan=False)
    summary = json.loads(text)
    assert summary["counts"]["rejected"] == 1
    assert summary["slo"] == {"ttft_s": 0.3, "tpot_s": 0.05}
    assert (summary["attainment"], summary["goodput_rps"]) == (0.25, 1.0)
    assert set(summary["tpot_s"]) == {"mean", "p50", "p90", "p99", "max"}
    assert summary["errors"][0] == {"error": "HTTP 500: broken", "count": 2}
    nothing = report_of(outcome(0, status="cancelled", lag_s=0.0), slo=Slo())
    summary = json.loads(json.dumps(nothing.to_json(), allow_nan=False))
    assert (summary["slo"], summary["attainment"]) == ({"ttft_s": None, "tpot_s": None}, None)
    assert summary["ttft_s"] is None


def test_text_is_a_table() -> None:
    assert MIXED.to_text().splitlines() == [
        "server      http://h:1, model m",
        "requests    10 in 2.0 s",
        "            4 ok, 1 rejected, 2 failed, 1 timeout, 2 cancelled",
        "throughput  2.00 requests/s",
        "            200 prompt and 22 output tokens/s",
        "goodput     1.00 requests/s with TTFT <= 300 ms and TPOT <= 50 ms",
        "attainment  25.0% (2 of 8)",
        "",
        "time in ms      mean       p50       p90       p99       max",
        "TTFT             252       250       307       310       310",
        "TPOT            37.5      35.0      57.0      59.7      60.0",
        "E2E              400       400       400       400       400",
        "max gap         30.0      30.0      30.0      30.0      30.0",
        "send lag        1.00      1.00      1.00      1.00      1.00",
        "",
        "errors",
        "     2 x HTTP 500: broken",
        "     1 x HTTP 429: busy",
        "     1 x no end",
    ]
    many = report_of(*(outcome(i, status="failed", error=f"e{i}") for i in range(13)), slo=Slo())
    assert many.to_text().splitlines()[-1] == "     3 x other errors"
    assert "goodput     0.00 requests/s with a full answer" in many.to_text()
    assert "TTFT               -" in many.to_text()
