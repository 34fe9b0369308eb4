"""An instance: one engine replica of one role. Values only; nothing here does anything."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    """Which phase an instance serves. A matter of routing: the engines are equal."""

    PREFILL = "prefill"
    DECODE = "decode"


class InstanceState(StrEnum):
    """STARTING -> READY -> DRAINING -> GONE; only READY instances are given requests."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What must be equal in a cluster for its instances to read each other's KV and messages.

    Attributes:
        engine: engine name and version, for example `vllm 0.32.0`.
        model: hash over the checkpoint's config and weight files.
        dtype: element type of weights and activations.
        kv_dtype: element type of the KV cache.
        block_size_tokens: tokens in a KV block.
    """

    engine: str
    model: str
    dtype: str
    kv_dtype: str
    block_size_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a started engine says of itself.

    Attributes:
        max_model_len: longest prompt plus output, in tokens.
        kv_capacity_tokens: tokens that fit into the KV cache.
        kv_bytes_per_token: bytes of KV cache a token takes over all layers and ranks.
        max_num_seqs: requests in a batch.
        tensor_parallel_size, pipeline_parallel_size: ranks.
        max_loras, max_cpu_loras: LoRA adapters in a batch, and in host memory; 0 without any.
        chunk_tokens: tokens of one prompt in an iteration at most; 0 for no limit.
        news_address: where it hears how far a prompt is computed elsewhere; empty for one that reads KV only
            when all of it is there.
    """

    fingerprint: Fingerprint
    max_model_len: int
    kv_capacity_tokens: int
    kv_bytes_per_token: int
    max_num_seqs: int
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_loras: int = 0
    max_cpu_loras: int = 0
    chunk_tokens: int = 0
    news_address: str = ""


def chunk_tokens(max_num_batched_tokens: int, long_prefill_token_threshold: int, *, is_chunked: bool) -> int:
    """Tokens of one prompt in an iteration at most, by vLLM's limits of it; 0 for no limit."""
    if not is_chunked:
        return 0
    return min(limit for limit in (max_num_batched_tokens, long_prefill_token_threshold) if limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRank:
    """Which one of a data-parallel group an instance is.

    Attributes:
        rank, size: its number in the group, and how many there are.
        host, port: where the group's first instance is met.
    """

    rank: int
    size: int
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceInfo:
    """One life of an instance, as the registry and every ingress know it.

    Attributes:
        instance_id: stable name of the place in the spec, for example `decode-0`; survives restarts.
        incarnation: unique name of this life; a restarted instance has another.
        engine_index: position of the instance in the spec, the `engine` label of vLLM's metrics.
        address: ZeroMQ endpoint of its data path, empty before it is READY.
        detail: what it is doing while STARTING, or why it is GONE.
        hopeless: `reason` of the error when it is GONE for one that will not change; it is not started again.
    """

    instance_id: str
    role: Role
    engine_index: int
    incarnation: str = ""
    state: InstanceState = InstanceState.STARTING
    address: str = ""
    node: str = ""
    pid: int = 0
    facts: EngineFacts | None = None
    detail: str = ""
    hopeless: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain dict for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLoad:
    """What an instance reports of its own load with every batch of outputs.

    Attributes:
        running, waiting: requests in the engine.
        kv_usage: share of the KV cache in use, 0 to 1.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
