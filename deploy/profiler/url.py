"""Measures a running OpenAI server from outside, by the tokens it streams; estimators: `streams`."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import aiohttp
from pydantic import BaseModel, Field, ValidationError

from cluster.errors import EnvironmentProblem
from deploy.profiler.engine import LEAST_ROUNDS, VOCABULARY
from deploy.profiler.grid import Limits, Point, grid
from deploy.profiler.streams import PointStreams, Stream

ANSWER_DEADLINE_S = 120.0
STEADY_TOKENS = 48
# Of lone streams, of which there are several: a machine that was idle is slower for the first of an answer.
LONE_STEADY_TOKENS = 24
# From this many streams on a server may send two tokens in one event, and must say how many there are.
COUNTED_FROM = 8
PAUSE_S = 0.02
# Below the 5 s of uvicorn, else a request now and then meets a connection just being closed.
KEEPALIVE_S = 3.0
# A server does not say how much KV it holds; near a full cache it queues, and the batch is another one.
KV_TOKENS = 65_536
# A lone prompt is soon computed: one alone would say more of a moment's noise than of the engine.
LONE_PROMPTS = 3
# Of prompts that are lone or beside decodes: their hand-over shows between the first and the second.
HANDED_OVER_TOKENS = 2
# Lone requests are what a server gets that is not busy, and after a pause a machine is slower for a while.
LONE_PAUSE_S = 1.5
# Prompts at once beside decodes: their engine shall not idle between one's end and the next one's coming.
PROMPTS_BESIDE = 4
# Of the model's context, left for the answers that are measured.
ANSWER_TOKENS = 4 * STEADY_TOKENS


class _Model(BaseModel):
    id: str
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[_Model] = Field(min_length=1)


class _Choice(BaseModel):
    token_ids: list[int] | None = None


class _Event(BaseModel):
    choices: list[_Choice] = []
    error: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model behind a URL; `max_model_len` is None where the server does not say (vLLM does)."""

    name: str
    max_model_len: int | None


@dataclass(slots=True)
class _Answer:
    """An answer under way; events are read when the measuring is over, to keep the client cheap."""

    prompt_tokens: int
    sent_s: float
    decodes: bool
    burst: int = 0
    events: list[tuple[float, bytes]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False

    def stream(self) -> Stream | None:
        """None when it ended before its first token. Raises EnvironmentProblem for an error in the stream."""
        times: list[float] = []
        for time_s, data in self.events:
            if data == b"[DONE]":
                continue
            try:
                event = _Event.model_validate_json(data)
            except ValidationError:
                raise _not_measurable(f"unreadable event {data[:100]!r}") from None
            if event.error is not None:
                raise _not_measurable(f"error in the stream: {event.error}")
            if event.choices:
                times += [time_s] * len(event.choices[0].token_ids or (0,))
        if not times:
            return None
        return Stream(
            prompt_tokens=self.prompt_tokens,
            sent_s=self.sent_s,
            times_s=tuple(times),
            decodes=self.decodes,
            burst=self.burst,
        )


def _not_measurable(found: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        problem=f"the server does not answer as it should ({found})",
        remedy="try smaller --max-prompt and --max-concurrency, or name the model with --model",
    )


class UrlProbe:
    """Sends the prompts of a point to a server and keeps when their tokens come."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        model: ServedModel,
        rng: Random,
        lone_pause_s: float = LONE_PAUSE_S,
    ) -> None:
        self._session, self._url, self._model, self._rng = session, f"{url}/v1/completions", model, rng
        self._lone_pause_s = lone_pause_s

    async def measure(self, point: Point) -> PointStreams:
        """Visit a point; the server is idle before and after. Raises EnvironmentProblem."""
        try:
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                answers = await (self._prefill(point) if point.kind == "prefill" else self._decode(point))
        except TimeoutError:
            raise _not_measurable(f"no end of {point} within {ANSWER_DEADLINE_S:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _not_measurable(f"{type(error).__name__}: {error}") from None
        await asyncio.sleep(PAUSE_S)  # a server frees what cancelled requests held a moment later
        streams = tuple(stream for answer in answers if (stream := answer.stream()) is not None)
        return PointStreams(point=point, streams=streams)

    async def _prefill(self, point: Point) -> list[_Answer]:
        answers: list[_Answer] = []
        for number in range(LONE_PROMPTS if point.requests == 1 else 1):
            await self._pause(point)
            await asyncio.gather(*self._burst(point.requests, point.tokens, number, answers))
        return answers

    async def _pause(self, point: Point) -> None:
        if point.requests == 1:
            await asyncio.sleep(self._lone_pause_s)

    def _burst(
        self, requests: int, tokens: int, number: int, answers: list[_Answer], *, beside: bool = False
    ) -> list[asyncio.Task[None]]:
        """Prompts at once; of several that are alone there, only the first token is of interest."""
        output = HANDED_OVER_TOKENS if requests == 1 or beside else 1
        bodies = [self._body(tokens, output) for _ in range(requests)]
        burst = [_Answer(tokens, 0.0, decodes=False, burst=number) for _ in bodies]
        answers += burst
        return [asyncio.create_task(self._ask(a, b)) for a, b in zip(burst, bodies, strict=True)]

    async def _decode(self, point: Point) -> list[_Answer]:
        if point.requests > 1 or point.beside:
            return await self._streams(point, STEADY_TOKENS)
        answers: list[_Answer] = []
        for _ in range(LONE_PROMPTS):
            await self._pause(point)
            answers += await self._streams(point, LONE_STEADY_TOKENS)
        return answers

    async def _streams(self, point: Point, steady: int) -> list[_Answer]:
        """Streams that are hung up on when all of them have got `steady` tokens while all decoded."""
        counted = point.requests >= COUNTED_FROM
        bodies = [
            self._body(point.tokens, self._output(point.tokens), counted) for _ in range(point.requests)
        ]
        answers = [_Answer(point.tokens, 0.0, decodes=True) for _ in bodies]
        beside: list[_Answer] = []
        tasks = [asyncio.create_task(self._ask(a, b)) for a, b in zip(answers, bodies, strict=True)]
        try:
            for answer in answers:
                await _events(answer, 2)
            if point.beside:
                # Not before all decode: their own prompts would be in the way. And to the end of a burst: an
                # iteration that has begun goes on when its clients have left, and delays the next point.
                await self._beside(point.beside, answers, beside)
            else:
                await _steady(answers, steady)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for failure in ended:
            if isinstance(failure, Exception):
                raise failure
        return [*answers, *beside]

    async def _beside(self, tokens: int, decoding: list[_Answer], beside: list[_Answer]) -> None:
        """One burst after the other, until enough was decoded."""
        enough = asyncio.create_task(_steady(decoding, 2 * STEADY_TOKENS))
        tasks: list[asyncio.Task[None]] = []
        try:
            for number in itertools.count():
                tasks += self._burst(PROMPTS_BESIDE, tokens, number, beside, beside=True)
                for answer in beside[-PROMPTS_BESIDE:]:
                    await _events(answer, 1)  # while these are handed over, the next ones are computed
                if enough.done():
                    await asyncio.gather(*tasks)
                    return
        finally:
            for task in (enough, *tasks):
                task.cancel()

    def _output(self, prompt_tokens: int) -> int:
        """As many as there is room for: the stream is hung up on when enough has been seen."""
        return (self._model.max_model_len or 2 * prompt_tokens + 512) - prompt_tokens

    def _body(self, prompt_tokens: int, output_tokens: int, counted: bool = False) -> bytes:
        body = {
            "model": self._model.name,
            "prompt": self._rng.choices(range(*VOCABULARY), k=prompt_tokens),
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        if counted:
            body["return_token_ids"] = True
        return json.dumps(body, separators=(",", ":")).encode()

    async def _ask(self, answer: _Answer, body: bytes) -> None:
        loop = asyncio.get_running_loop()
        answer.sent_s = loop.time()
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(self._url, data=body, headers=headers) as response:
                if response.status != 200:
                    text = (await response.read()).decode(errors="replace")
                    raise _not_measurable(f"HTTP {response.status}: {' '.join(text.split())[:200]}")
                rest = b""
                async for block in response.content.iter_any():
                    now_s = loop.time()
                    *lines, rest = (rest + block).split(b"\n")
                    answer.events += [
                        (now_s, line[5:].strip()) for line in lines if line.startswith(b"data:")
                    ]
                    answer.changed.set()
        finally:
            answer.ended = True
            answer.changed.set()


async def _events(answer: _Answer, count: int) -> None:
    """Wait until an answer has so many events, or has ended."""
    while len(answer.events) < count and not answer.ended:
        answer.changed.clear()
        await answer.changed.wait()


async def _steady(answers: list[_Answer], count: int) -> None:
    """Wait until each answer has so many events more than now, or has ended."""
    wanted = [len(answer.events) + count for answer in answers]
    for answer, events in zip(answers, wanted, strict=True):
        await _events(answer, events)


async def served_model(session: aiohttp.ClientSession, url: str, name: str | None) -> ServedModel:
    """The server's first model, or the one of this name. Raises EnvironmentProblem."""
    try:
        async with asyncio.timeout(10.0), session.get(f"{url}/v1/models") as response:
            if response.status != 200:
                found = f"HTTP {response.status}"
            else:
                models = _Models.model_validate_json(await response.read()).data
                for model in models:
                    if name in (None, model.id):
                        return ServedModel(name=model.id, max_model_len=model.max_model_len)
                found = f"it has {', '.join(model.id for model in models)}, not {name}"
    except (aiohttp.ClientError, OSError, ValidationError) as error:
        found = (str(error) or type(error).__name__).splitlines()[0]
    raise EnvironmentProblem(
        problem=f"{url}/v1/models does not name the model ({found})",
        remedy="check that the server is up ('pdserve up SPEC' starts one) and --model",
    )


@asynccontextmanager
async def session_to_measure() -> AsyncIterator[aiohttp.ClientSession]:
    """A session that never queues and has no deadline of its own."""
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None),
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
    ) as session:
        yield session


def _longest_prompt(model: ServedModel, asked: int | None) -> int:
    length = model.max_model_len
    if asked is None:
        return (length or 2048) // 2
    if length is not None and asked + ANSWER_TOKENS > length:
        raise ValueError(
            f"max-prompt is {asked}, expected at most {length - ANSWER_TOKENS}: prompt and answer share the "
            f"{length} tokens of {model.name}"
        )
    return asked


class MeasuredServer:
    """A server and the points to measure it on."""

    def __init__(self, probe: UrlProbe, model: ServedModel, points: list[Point], rng: Random) -> None:
        self.model = model
        self.points = points
        self._probe, self._rng = probe, rng

    async def round(self, part: int = 0, parts: int = 1) -> list[PointStreams]:
        """Every point once, in a random order, or every `parts`th from the `part`th on. Raises
        EnvironmentProblem."""
        points = self.points[part::parts]
        return [await self._probe.measure(point) for point in self._rng.sample(points, len(points))]


@asynccontextmanager
async def server_to_measure(
    url: str,
    model: str | None,
    max_prompt: int | None,
    max_requests: int,
    rng: Random,
    lone_pause_s: float = LONE_PAUSE_S,
) -> AsyncIterator[MeasuredServer]:
    """The server at `url`; the grid goes up to `max_prompt` tokens, by default half of the model's context.

    Raises EnvironmentProblem, and ValueError for limits that the model does not allow.
    """
    async with session_to_measure() as session:
        served = await served_model(session, url, model)
        longest = _longest_prompt(served, max_prompt)
        points = grid(Limits(max_prompt=longest, max_requests=max_requests, kv_tokens=KV_TOKENS))
        probe = UrlProbe(session, url, served, rng, lone_pause_s)
        yield MeasuredServer(probe, served, points, rng)


async def measure_url(
    url: str,
    *,
    model: str | None,
    max_prompt: int | None,
    max_requests: int,
    seconds: float,
    seed: int,
    say: Callable[[str], None],
    lone_pause_s: float = LONE_PAUSE_S,
) -> tuple[ServedModel, list[PointStreams]]:
    """Go over the grid in shuffled rounds until the time is spent; the first round is warm-up.

    The grid goes up to `max_prompt` tokens, by default half of the model's context. At least
    `engine.LEAST_ROUNDS` rounds are measured. Raises EnvironmentProblem, and ValueError for limits
    that the model does not allow.
    """
    rng = Random(seed)
    loop = asyncio.get_running_loop()
    visits: list[PointStreams] = []
    async with server_to_measure(url, model, max_prompt, max_requests, rng, lone_pause_s) as server:
        began_s, rounds = loop.time(), -1
        while rounds < LEAST_ROUNDS or loop.time() - began_s < seconds:
            rounds += 1
            found = await server.round()
            visits += found if rounds else []
            what = f"round {rounds}" if rounds else "warm-up"
            say(f"{what}: {len(found)} points, {loop.time() - began_s:.0f} s")
    return server.model, visits
