"""The twin engine: behaves like an engine towards its host, computes no model.

Its tokens are a function of the sequence so far, as a real model's greedy tokens are, so a request that is
handed over, moved or replayed must go on with the same tokens or a test sees it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cluster import wire
from cluster.engine import Frames
from cluster.fingerprint import model_fingerprint
from cluster.instance import EngineFacts, Fingerprint
from cluster.spec import ClusterSpec
from cluster.wire import Load, PrefillCounts, StepOutputs, TokenOutput, TokenRequest

SIM_ENGINE_NAME = "sim 1"
_VOCABULARY = range(100, 4000)


def next_token(state: int) -> int:
    """The token that follows a sequence with this hash."""
    return _VOCABULARY[state % len(_VOCABULARY)]


def extend(state: int, tokens: list[int]) -> int:
    """Hash of a sequence after more tokens (FNV-1a over token ids, 64 bits)."""
    for token in tokens:
        state = ((state ^ token) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return state


SEQUENCE_START = 0xCBF29CE484222325


@dataclass(slots=True)
class _Sequence:
    request_id: str
    state: int
    prompt_tokens: int
    remaining: int
    keeps: bool
    read_tokens: int
    generated: int = 0


@dataclass(slots=True)
class SimEngine:
    """Continuous batching by iteration: each step prefills what is waiting and gives every running request
    one token; a step takes `spec.sim`'s time, or none."""

    spec: ClusterSpec
    _waiting: list[_Sequence] = field(default_factory=list)
    _running: dict[str, _Sequence] = field(default_factory=dict)
    _work: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, progress: Callable[[str], None]) -> EngineFacts:
        progress("starting the twin engine")
        sim = self.spec.sim
        return EngineFacts(
            fingerprint=Fingerprint(
                engine=SIM_ENGINE_NAME,
                model=model_fingerprint(self.spec.model),
                dtype="none",
                kv_dtype="none",
                block_size_tokens=sim.block_size,
            ),
            max_model_len=sim.max_model_len,
            kv_capacity_tokens=sim.kv_capacity_tokens,
            kv_bytes_per_token=0,
            max_num_seqs=1 << 20,
        )

    def add(self, frames: Frames) -> None:
        request = msgspec.msgpack.decode(frames[0], type=TokenRequest)
        params = request.sampling_params or {}
        transfer = (params.get("extra_args") or {}).get("kv_transfer_params") or {}
        sequence = _Sequence(
            request_id=request.request_id,
            state=extend(SEQUENCE_START, request.prompt_token_ids),
            prompt_tokens=len(request.prompt_token_ids),
            remaining=params.get("max_tokens", 16),
            keeps=bool(transfer.get("do_remote_decode")),
            read_tokens=int(transfer.get("remote_num_tokens") or 0),
        )
        self._waiting.append(sequence)
        self._work.set()

    def abort(self, request_ids: list[str]) -> None:
        gone = set(request_ids)
        self._waiting = [s for s in self._waiting if s.request_id not in gone]
        for request_id in request_ids:
            self._running.pop(request_id, None)

    def release(self, request_ids: list[str]) -> None:
        """Nothing to do: the twin keeps no blocks."""

    async def call(self, method: str, args: list[Any]) -> Any:
        raise NotImplementedError(f"the twin engine has no method {method!r}")

    async def outputs(self) -> StepOutputs:
        while not (self._waiting or self._running):
            self._work.clear()
            await self._work.wait()
        sim = self.spec.sim
        started, self._waiting = self._waiting, []
        uncached = sum(max(1, s.prompt_tokens - s.read_tokens) for s in started)
        # Also without any cost: the host must get its turn to take requests and aborts.
        await asyncio.sleep(sim.step_s + uncached * sim.prefill_s_per_token)
        for sequence in started:
            self._running[sequence.request_id] = sequence
        return StepOutputs(outputs=[self._advance(s) for s in list(self._running.values())])

    def load(self) -> Load:
        return Load(running=len(self._running), waiting=len(self._waiting), kv_usage=0.0)

    def part(self, outputs: StepOutputs, members: list[TokenOutput], *, with_stats: bool) -> Frames:
        return [msgspec.msgpack.encode(StepOutputs(outputs=members, timestamp=outputs.timestamp))]

    async def stop(self) -> None:
        self._waiting.clear()
        self._running.clear()

    def _advance(self, sequence: _Sequence) -> TokenOutput:
        token = next_token(sequence.state)
        sequence.state = extend(sequence.state, [token])
        sequence.remaining -= 1
        sequence.generated += 1
        output = TokenOutput(request_id=sequence.request_id, new_token_ids=[token])
        if sequence.generated == 1:
            output.prefill_stats = self._prefill_counts(sequence)
        if sequence.remaining <= 0:
            output.finish_reason = wire.FINISH_LENGTH
            del self._running[sequence.request_id]
            if sequence.keeps:
                output.kv_transfer_params = self._handle(sequence)
        return output

    @staticmethod
    def _prefill_counts(sequence: _Sequence) -> PrefillCounts:
        read = min(sequence.read_tokens, sequence.prompt_tokens - 1)
        return PrefillCounts(
            num_prompt_tokens=sequence.prompt_tokens,
            num_computed_tokens=sequence.prompt_tokens - read,
            num_cached_tokens=read,
            num_external_cached_tokens=read,
        )

    @staticmethod
    def _handle(sequence: _Sequence) -> dict[str, Any]:
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[0]],
            "remote_request_id": sequence.request_id,
            "remote_num_tokens": sequence.prompt_tokens,
        }
