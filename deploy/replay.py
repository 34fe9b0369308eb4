"""Sends a workload to an OpenAI server at its own arrival times and measures what each client saw.

The load is open loop: a request is sent when it is due, however many are under way, so a slow server meets
the queue it would meet in production. A request sent late is counted with its lag, none is left out.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

import aiohttp
from pydantic import BaseModel, Field, ValidationError

from cluster.errors import EnvironmentProblem
from cluster.request import NO_SLO, Slo
from deploy.replay_report import STATUSES, ReplayReport, RequestOutcome, Status
from deploy.slo_classes import SloClass
from deploy.workload import WorkloadRequest, prompt_tokens

REJECTIONS = (429, 503)
# Below the 5 s of uvicorn, else a request now and then meets a connection just being closed.
KEEPALIVE_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """How to send.

    Attributes:
        model: name of the model; None asks the server's `/v1/models` and takes the first.
        slo: what counts as goodput; without bounds every complete answer does.
        timeout_s: deadline of each request, from its sending to the end of its answer.
        cancel_share: share of the requests (0..1, chosen by `seed`) whose client hangs up ...
        cancel_within_s: ... at a random time up to this after sending, unless the answer ends before.
        seed: of the prompts and the cancellations.
        vocab_low, vocab_high: prompts are made of token ids in `vocab_low <= id < vocab_high`.
        headers: sent with every request (authorization, tenant).
        classes: SLO class of each request, whose bounds are sent with it; None sends none.

    Raises ValueError for a value outside its range.
    """

    model: str | None = None
    slo: Slo = NO_SLO
    timeout_s: float = 600.0
    cancel_share: float = 0.0
    cancel_within_s: float = 2.0
    seed: int = 0
    vocab_low: int = 100
    vocab_high: int = 4000
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold a key
    classes: Sequence[SloClass] | None = None

    def __post_init__(self) -> None:
        for name in ("timeout_s", "cancel_within_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a positive number of seconds")
        if not 0 <= self.cancel_share <= 1:
            raise ValueError(f"cancel_share is {self.cancel_share!r}, expected 0 to 1")
        if not 0 <= self.vocab_low < self.vocab_high:
            vocabulary = f"{self.vocab_low}..{self.vocab_high}"
            raise ValueError(f"vocabulary {vocabulary} is empty, expected 0 <= vocab_low < vocab_high")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayProgress:
    """Where a replay is: `sent` of `total` requests, `elapsed_s` after its start, `finished` by status."""

    elapsed_s: float
    total: int
    sent: int
    finished: Mapping[Status, int]


async def replay(
    url: str,
    requests: Sequence[WorkloadRequest],
    options: ReplayOptions,
    on_progress: Callable[[ReplayProgress], None] | None = None,
) -> ReplayReport:
    """Send every request at its `arrival_s` after the start and wait for all to end.

    `url` is the server, with or without `/v1`. `on_progress` is called after every send and every end; what
    it raises ends the replay, in an ExceptionGroup. Whatever happens to a request is its outcome. Raises
    EnvironmentProblem when no model is given and the server names none, and ValueError for no requests.
    """
    if not requests:
        raise ValueError("no requests to replay")
    url = url.rstrip("/").removesuffix("/v1")
    async with aiohttp.ClientSession(
        headers=options.headers,
        timeout=aiohttp.ClientTimeout(total=None),  # each request has its own deadline
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),  # open loop: never queue here
    ) as session:
        model = options.model or await _first_model(session, url, options.timeout_s)
        run = _Replay(session, url, model, requests, options, on_progress)
        outcomes = await run.all()
    return ReplayReport(
        url=url,
        model=model,
        slo=options.slo,
        duration_s=max(outcome.end_s for outcome in outcomes),
        outcomes=outcomes,
    )


class _Replay:
    """One replay under way."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        model: str,
        requests: Sequence[WorkloadRequest],
        options: ReplayOptions,
        on_progress: Callable[[ReplayProgress], None] | None,
    ) -> None:
        self._session, self._url, self._model = session, f"{url}/v1/completions", model
        self._requests, self._options, self._on_progress = requests, options, on_progress
        self._loop = asyncio.get_running_loop()
        self._start_s = 0.0
        self._sent = 0
        self._finished: Counter[Status] = Counter()
        rng = Random(f"{options.seed}/cancel")
        chosen = rng.sample(range(len(requests)), round(options.cancel_share * len(requests)))
        self._cancel_after_s = {index: rng.uniform(0, options.cancel_within_s) for index in chosen}

    async def all(self) -> tuple[RequestOutcome, ...]:
        """Send everything in the order of arrival; returns when the last request has ended."""
        order = sorted(range(len(self._requests)), key=lambda index: self._requests[index].arrival_s)
        tasks = []
        self._start_s = self._loop.time()
        async with asyncio.TaskGroup() as group:
            for index in order:
                body = self._body(index)  # before it is due: a long prompt takes milliseconds to make
                due_s = self._start_s + self._requests[index].arrival_s
                # Sleep even when late, so that requests already made get to be sent.
                await asyncio.sleep(max(0.0, due_s - self._loop.time()))
                tasks.append(group.create_task(self._one(index, body, due_s)))
        return tuple(task.result() for task in tasks)

    def _body(self, index: int) -> bytes:
        request, options = self._requests[index], self._options
        prompt = prompt_tokens(
            request, index, seed=options.seed, vocab_low=options.vocab_low, vocab_high=options.vocab_high
        )
        body = {
            "model": request.adapter or self._model,
            "prompt": prompt,
            "max_tokens": request.output_tokens,
            "ignore_eos": True,  # of vLLM: the answer has the length of the trace, whatever the model says
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body, separators=(",", ":")).encode()

    async def _one(self, index: int, body: bytes, due_s: float) -> RequestOutcome:
        """Send one request and follow its answer to an end, whichever."""
        request = self._requests[index]
        answer = _Answer()
        sent_s = self._loop.time()
        self._sent += 1
        self._report()
        cancel_after_s = self._cancel_after_s.get(index, math.inf)
        status: Status = "ok"
        error: str | None = None
        try:
            async with asyncio.timeout_at(sent_s + min(self._options.timeout_s, cancel_after_s)):
                await self._exchange(index, body, answer)
            answer.check_complete(request)
        except TimeoutError:
            if cancel_after_s < self._options.timeout_s:
                status = "cancelled"
            else:
                status, error = "timeout", f"no end within {self._options.timeout_s:g} s, {answer.progress()}"
        except _NotServed as refusal:
            status, error = refusal.status, str(refusal)
        except (aiohttp.ClientError, OSError) as failure:
            status, error = "failed", f"{type(failure).__name__}: {failure}, {answer.progress()}"
        end_s = self._loop.time()
        self._finished[status] += 1
        self._report()
        return RequestOutcome(
            index=index,
            status=status,
            input_tokens=request.input_tokens,
            output_tokens=answer.output_tokens,
            sent_s=sent_s - self._start_s,
            lag_s=max(0.0, sent_s - due_s),
            end_s=end_s - self._start_s,
            ttft_s=None if answer.first_s is None else answer.first_s - sent_s,
            tpot_s=answer.tpot_s(),
            e2e_s=None if answer.last_s is None else answer.last_s - sent_s,
            max_gap_s=answer.max_gap_s,
            error=error,
            slo_class=self._options.classes[index].name if self._options.classes else "",
            slo=self._options.classes[index].slo if self._options.classes else None,
            asked_tokens=request.output_tokens,
        )

    async def _exchange(self, index: int, body: bytes, answer: _Answer) -> None:
        request = self._requests[index]
        # By its id a server's logs tell which request of the workload this is.
        headers = {
            "Content-Type": "application/json",
            "x-request-id": f"replay-{self._options.seed}-{index}",
        }
        if request.session_id is not None:
            headers["x-session-id"] = request.session_id
        if self._options.classes is not None:
            headers |= slo_headers(self._options.classes[index].slo)
        async with self._session.post(self._url, data=body, headers=headers) as response:
            if response.status != 200 or response.content_type != "text/event-stream":
                status: Status = "rejected" if response.status in REJECTIONS else "failed"
                raise _NotServed(status, await _describe(response))
            rest = b""
            async for block in response.content.iter_any():
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:  # comments and event names say nothing that the data doesn't
                    if line.startswith(b"data:"):
                        answer.take(line.removeprefix(b"data:").strip(), self._loop.time())

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(
                ReplayProgress(
                    elapsed_s=self._loop.time() - self._start_s,
                    total=len(self._requests),
                    sent=self._sent,
                    finished={status: self._finished[status] for status in STATUSES},
                )
            )


def slo_headers(slo: Slo) -> dict[str, str]:
    """What a client sends so that its request is served within these bounds."""
    bounds = {"x-pdserve-ttft-ms": slo.ttft_s, "x-pdserve-tpot-ms": slo.tpot_s}
    return {name: f"{bound_s * 1e3:.6g}" for name, bound_s in bounds.items() if bound_s < math.inf}


class _NotServed(Exception):
    """A request that got no complete answer, with the status it ends with."""

    def __init__(self, status: Status, error: str) -> None:
        super().__init__(error)
        self.status = status


class _Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class _Choice(BaseModel):
    finish_reason: str | None = None


class _Problem(BaseModel):
    message: str


class _Event(BaseModel):
    """What matters of a streamed chunk or of an error body; all else a server sends is ignored."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Problem | str | None = None
    message: str | None = None  # the flat error body of some servers

    def problem(self) -> str | None:
        """The error's text, if this is one."""
        return self.error.message if isinstance(self.error, _Problem) else self.error or self.message


class _Answer:
    """The answer to one request as it streams in; loop times in seconds."""

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.max_gap_s: float | None = None
        self._usage: _Usage | None = None
        self._finish_reason: str | None = None
        self._done = False

    @property
    def output_tokens(self) -> int:
        return self._usage.completion_tokens if self._usage else 0

    def take(self, data: bytes, now_s: float) -> None:
        """One SSE event. Raises _NotServed when it is an error or unreadable."""
        if data == b"[DONE]":
            self._done = True
            return
        try:
            event = _Event.model_validate_json(data)
        except ValidationError:
            text = data[:100].decode(errors="replace")
            raise _NotServed("failed", f"unreadable event in the stream: {text}") from None
        problem = event.problem()
        if problem is not None:
            raise _NotServed("failed", f"error in the stream: {problem}, {self.progress()}")
        self._usage = event.usage or self._usage
        # Not its text: a special token or a part of a character is a token with empty text, and vLLM sends no
        # choice without a token.
        if event.choices:
            self._finish_reason = event.choices[0].finish_reason or self._finish_reason
            if self.last_s is None:
                self.first_s = now_s
            else:
                self.max_gap_s = max(self.max_gap_s or 0.0, now_s - self.last_s)
            self.last_s = now_s

    def check_complete(self, request: WorkloadRequest) -> None:
        """At the end of the stream. Raises _NotServed unless all that was asked for came."""
        if self._finish_reason is None:
            raise _NotServed("failed", f"stream ended without finish_reason, {self.progress()}")
        if self._finish_reason not in ("length", "stop"):
            raise _NotServed("failed", f"finish_reason {self._finish_reason!r}, {self.progress()}")
        if self._usage is None or not self._done:
            raise _NotServed("failed", f"stream ended without {'usage' if self._done else '[DONE]'}")
        for name, got, asked in (
            ("output", self._usage.completion_tokens, request.output_tokens),
            ("prompt", self._usage.prompt_tokens, request.input_tokens),
        ):
            if got != asked:
                raise _NotServed("failed", f"{got} {name} tokens instead of {asked}")

    def tpot_s(self) -> float | None:
        """Time per output token after the first; None before the usage or for fewer than two tokens."""
        if self.first_s is None or self.last_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)

    def progress(self) -> str:
        """Words for an error text; no counts, so that equal errors can be counted together."""
        return "before the first token" if self.first_s is None else "after the first token"


async def _describe(response: aiohttp.ClientResponse) -> str:
    """One line about a response that is no event stream."""
    text = (await response.read()).decode(errors="replace")
    with suppress(ValidationError):  # else it is not an OpenAI error body: the text as it is
        text = _Event.model_validate_json(text).problem() or text
    reason = response.headers.get("x-pdserve-reason")
    kind = "" if response.status != 200 else f", {response.content_type} instead of an event stream"
    return f"HTTP {response.status}{f' ({reason})' if reason else ''}{kind}: {' '.join(text.split())[:200]}"


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model] = Field(min_length=1)


async def _first_model(session: aiohttp.ClientSession, url: str, timeout_s: float) -> str:
    try:
        async with asyncio.timeout(timeout_s), session.get(f"{url}/v1/models") as response:
            if response.status == 200:
                return _Models.model_validate_json(await response.read()).data[0].id
            found = await _describe(response)
    except (aiohttp.ClientError, OSError, ValidationError) as error:  # a TimeoutError is an OSError
        found = str(error) or type(error).__name__
    problem = f"{url}/v1/models does not name a model ({found})"
    raise EnvironmentProblem(problem=problem, remedy="check that the server is up, or name the model")
