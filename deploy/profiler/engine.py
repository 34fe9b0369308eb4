"""Measures one engine of a spec, in this process: no Ray, no HTTP, every iteration with its batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec

from cluster.engine import Engine
from cluster.errors import EnvironmentProblem, SpecError
from cluster.instance import EngineFacts, Role
from cluster.latency import Batch
from cluster.spec import ClusterSpec
from deploy.profiler.grid import DECODE_HEADROOM_TOKENS, Limits, Point, grid
from deploy.profiler.iterations import Iteration, IterationTracker, PromptCount

OUTPUT_DEADLINE_S = 120.0
DECODE_STEPS = 24
# The engine is busy with this prompt while others are handed in, so that they start in one iteration.
# No length of the grid, so that its own iteration, which begins in an idle engine, is told from the others.
GATE_TOKENS = 250
VOCABULARY = (100, 4000)
LEAST_ROUNDS = 2
LONGEST_PROMPT = 8192
MOST_REQUESTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """An iteration and the point of the grid that it was measured for."""

    point: Point
    batch: Batch
    seconds: float


def make_engine(spec: ClusterSpec, role: Role) -> Engine:
    """The engine of an instance of this role, as a worker makes it, which counts its iterations.

    Raises SpecError and EnvironmentProblem as a worker's start does.
    """
    if (size := spec.pool(role).data_parallel_size) > 1:
        raise SpecError(
            file="(spec)",
            path=f"{role}.data_parallel_size",
            value=size,
            allowed="one engine alone is measured, without those that it shares experts with: profile a "
            "running cluster with --url",
        )
    if spec.engine == "sim":
        from cluster.sim_engine import SimEngine

        return SimEngine.of(spec, role, _phase_options(spec, role))
    from cluster.ports import free_ports
    from cluster.vllm_options import engine_options, require_device, set_engine_environment

    instance_id = f"{role}-0"
    require_device(spec, instance_id)
    host = "127.0.0.1"
    cores = "|".join(str(rank) for rank in range(spec.pool(role).ranks))
    side_port, news_port = free_ports(host, 2)
    set_engine_environment(spec, role, host=host, side_port=side_port, news_port=news_port, cores=cores)
    from cluster import vllm_engine

    options = engine_options(spec, role, _phase_options(spec, role))
    options["enable_logging_iteration_details"] = True
    kind = vllm_engine.ThreadEngine if spec.engine_process == "thread" else vllm_engine.ProcessEngine
    return kind(options)


def engine_limits(facts: EngineFacts, *, max_prompt: int | None, max_requests: int | None) -> Limits:
    """How far the grid goes on this engine: by default to half of its context and to its whole batch, within
    `LONGEST_PROMPT` and `MOST_REQUESTS`. Raises ValueError for more than the engine takes.
    """
    longest = facts.max_model_len - DECODE_HEADROOM_TOKENS
    if max_prompt is not None and max_prompt > longest:
        raise ValueError(
            f"max-prompt is {max_prompt}, expected at most {longest}: prompt and answer share the "
            f"{facts.max_model_len} tokens of max_model_len"
        )
    if max_requests is not None and max_requests > facts.max_num_seqs:
        raise ValueError(
            f"max-concurrency is {max_requests}, expected at most {facts.max_num_seqs}, the engine's "
            "max_num_seqs"
        )
    return Limits(
        max_prompt=max_prompt or max(1, min(LONGEST_PROMPT, facts.max_model_len // 2)),
        max_requests=max_requests or min(facts.max_num_seqs, MOST_REQUESTS),
        kv_tokens=facts.kv_capacity_tokens,
    )


def _phase_options(spec: ClusterSpec, role: Role) -> dict[str, Any]:
    if role is Role.PREFILL:
        from prefill_worker.phase import phase_options
    else:
        from decode_worker.phase import phase_options
    return phase_options(spec)


class EngineProbe:
    """Brings a started engine into the batches of the grid and times its iterations.

    The end of an iteration is the engine's own time stamp, where it has one, else the arrival of its outputs.
    vLLM's stamps and asyncio's loop go by one clock in all processes of a machine.
    """

    def __init__(self, engine: Engine, rng: Random, max_model_len: int) -> None:
        self._engine = engine
        self._max_model_len = max_model_len
        self._rng = rng
        self._now = asyncio.get_running_loop().time
        self._tracker = IterationTracker()
        self._requests = 0

    async def measure(self, point: Point) -> list[Measured]:
        """The iterations of one point. The engine is idle before and after."""
        if point.kind == "prefill":
            seen = await self._prefill(point)
        else:
            seen = await self._decode(point)
        return [Measured(point=point, batch=i.batch, seconds=i.seconds) for i in seen]

    async def _prefill(self, point: Point) -> list[Iteration]:
        lengths = [GATE_TOKENS, *[point.tokens] * point.requests]
        self._submit([(length, 1) for length in lengths])
        seen: list[Iteration] = []
        while self._tracker.open:
            seen += await self._step()
        return [i for i in seen if i.batch.prefill_tokens != GATE_TOKENS]

    async def _decode(self, point: Point) -> list[Iteration]:
        names = self._submit([(point.tokens, self._endless(point.tokens))] * point.requests)
        seen: list[Iteration] = []
        while min(self._tracker.generated(name) for name in names) < 2:
            seen += await self._step()
        if point.beside:
            beside = self._submit([(point.beside, self._endless(point.beside))])
            while self._tracker.generated(beside[0]) < 2:
                seen += await self._step()
            names += beside
        steady_from = min(self._tracker.generated(name) for name in names)
        while min(self._tracker.generated(name) for name in names) < steady_from + DECODE_STEPS:
            seen += await self._step()
        await self._end(names)
        return seen

    def _endless(self, prompt_tokens: int) -> int:
        """Output tokens enough for a request to be there until it is aborted."""
        return self._max_model_len - prompt_tokens

    async def _end(self, names: list[str]) -> None:
        """Abort these, and wait until the engine is past the iteration that they were in."""
        self._engine.abort(names)
        self._tracker.forget(names)
        self._submit([(1, 1)])
        while self._tracker.open:
            await self._step()

    def _submit(self, wanted: Sequence[tuple[int, int]]) -> list[str]:
        """Hand in requests of (prompt tokens, output tokens); their ids. No prompt begins like another."""
        names, messages = [], []
        for prompt_tokens, output_tokens in wanted:
            self._requests += 1
            name = f"profile-{self._requests}"
            names.append(name)
            messages.append(encoded_request(name, self._prompt(prompt_tokens), output_tokens))
        for name, message, (prompt_tokens, _) in zip(names, messages, wanted, strict=True):
            self._tracker.add(name, prompt_tokens, self._now())
            self._engine.add([message])
        return names

    def _prompt(self, tokens: int) -> list[int]:
        return self._rng.choices(range(*VOCABULARY), k=tokens)

    async def _step(self) -> list[Iteration]:
        try:
            async with asyncio.timeout(OUTPUT_DEADLINE_S):
                outputs = await self._engine.outputs()
        except TimeoutError:
            raise EnvironmentProblem(
                problem=f"the engine gave no output for {OUTPUT_DEADLINE_S:g} s",
                remedy="try smaller --max-prompt and --max-concurrency",
            ) from None
        details = getattr(outputs.scheduler_stats, "iteration_details", None)
        prompts = None
        if details is not None:
            prompts = PromptCount(requests=details.num_ctx_requests, tokens=details.num_ctx_tokens)
        ended_s = outputs.timestamp or self._now()
        iteration = self._tracker.step(outputs.outputs, prompts, ended_s)
        self._tracker.forget([o.request_id for o in outputs.outputs if o.finish_reason is not None])
        return [] if iteration is None else [iteration]


def encoded_request(request_id: str, prompt: list[int], output_tokens: int) -> bytes:
    """A greedy request of a fixed length, which vLLM reads as its `EngineCoreRequest` and the twin as
    `wire.TokenRequest`: both are msgpack arrays, and this has the fields that vLLM gives no default."""
    sampling = {"temperature": 0.0, "max_tokens": output_tokens, "ignore_eos": True, "detokenize": False}
    pooling = lora = salt = rank = features = None
    return msgspec.msgpack.encode(
        [request_id, prompt, features, sampling, pooling, time.time(), lora, salt, rank]
    )


async def measure_engine(
    engine: Engine,
    limits: Limits,
    *,
    max_model_len: int,
    seconds: float,
    seed: int,
    say: Callable[[str], None],
) -> list[Measured]:
    """Go over the grid in shuffled rounds until the time is spent; the first round is warm-up.

    At least `LEAST_ROUNDS` rounds are measured, however long that takes.
    """
    rng = Random(seed)
    probe = EngineProbe(engine, rng, max_model_len)
    points = grid(limits)
    measured: list[Measured] = []
    now = asyncio.get_running_loop().time
    began_s = now()
    rounds = -1
    while rounds < LEAST_ROUNDS or now() - began_s < seconds:
        rounds += 1
        for point in rng.sample(points, len(points)):
            seen = await probe.measure(point)
            if rounds:
                measured += seen
        what = f"round {rounds}" if rounds else "warm-up"
        say(f"{what}: {len(points)} points, {len(measured):,} iterations, {now() - began_s:.0f} s")
    return measured
