"""From a spec to what the twin of one of its instances is: limits, memory, speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import SpecError
from cluster.hardware import Hardware
from cluster.instance import Role
from cluster.latency import ConstantLatency, LatencyModel, ProfiledLatency, at_pace, load_profile
from cluster.model_shape import ModelShape, shape_of
from cluster.roofline import RooflineLatency
from cluster.spec import ClusterSpec

# Without any word about memory: more than any test fills.
DEFAULT_KV_TOKENS = 1_000_000
DEFAULT_MAX_MODEL_LEN = 32_768
# vLLM 0.32: CacheConfig.gpu_memory_utilization.
GPU_MEMORY_UTILIZATION = 0.92
# Activations, CUDA graphs and buffers of an engine on each GPU. vLLM measures them at start; this is what is
# left of its gpu_memory_utilization beside weights and KV in DistServe's table of OPT on A100s.
ACTIVATION_BYTES = 3 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinOptions:
    """An instance's twin.

    Attributes:
        blocks, block_size: KV memory, in blocks and tokens per block.
        max_model_len: longest prompt plus output, in tokens.
        max_num_seqs, max_num_batched_tokens, long_prefill_token_threshold: vLLM's limits of an iteration.
        chunked_prefill: whether a prompt may be computed in parts.
        separate_prefill: whether an iteration with prompts holds no decodes, and goes first.
        prefix_caching: whether blocks are found again.
        reserve_full_prompt: whether a prompt is begun only when all of it fits the free blocks.
        pipeline_stages, gpus: how it is laid out.
        latency: iteration times.
        kv_bytes_per_token: over all layers, of the whole model.
        lease_s: how long blocks are kept for a reader that nobody hears of.
        max_loras, max_cpu_loras, adapter_load_s: LoRA adapters in an iteration and in host memory, 0 for
            none, and what loading one takes.
        overlap: whether KV of a prompt of several chunks moves while it is computed.
    """

    blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    latency: LatencyModel
    long_prefill_token_threshold: int = 0
    chunked_prefill: bool = True
    separate_prefill: bool = False
    prefix_caching: bool = True
    reserve_full_prompt: bool = True
    pipeline_stages: int = 1
    gpus: int = 1
    kv_bytes_per_token: int = 0
    lease_s: float = 30.0
    max_loras: int = 0
    max_cpu_loras: int = 0
    adapter_load_s: float = 0.0
    overlap: bool = False


def twin_options(spec: ClusterSpec, role: Role, phase_options: Mapping[str, Any]) -> TwinOptions:
    """The twin of an instance of `role`; the engine options weigh as they do for vLLM: the phase's, then the
    spec's, then the pool's.

    Raises:
        SpecError: an unknown shape or hardware, a profile of another layout, or a model that does not fit.
    """
    pool, sim = spec.pool(role), spec.sim
    options: dict[str, Any] = {**phase_options, **spec.engine_options, **pool.engine_options}
    hardware = sim.hardware_of(role)
    shape = _shape(spec, needed=hardware is not None)
    if pool.data_parallel_size > 1 and shape is not None:
        experts = shape.experts.count if shape.experts else 0
        if experts < pool.ranks * pool.data_parallel_size:
            raise SpecError(
                file="(spec)",
                path=f"{role}.data_parallel_size",
                value=pool.data_parallel_size,
                allowed=f"{shape.name} has {experts} experts, and each GPU of a group needs one: "
                f"raise {role}.count instead",
            )
    block_size = int(options.get("block_size") or sim.block_size)
    max_model_len = int(
        options.get("max_model_len")
        or sim.max_model_len
        or (shape.max_positions if shape and shape.max_positions else DEFAULT_MAX_MODEL_LEN)
    )
    tokens = _kv_tokens(spec, role, options, shape, hardware)
    blocks = tokens // block_size
    if blocks * block_size < max_model_len:
        raise SpecError(
            file="(spec)",
            path="engine_options.max_model_len",
            value=max_model_len,
            allowed=f"{role} holds {blocks * block_size:,} tokens of KV, less than one such request: "
            "lower it, or give the pool more memory",
        )
    batched, seqs = _vllm_defaults(spec, hardware, pool.ranks)
    chunked = bool(options.get("enable_chunked_prefill", True))
    batched = int(options.get("max_num_batched_tokens") or batched)
    if not chunked:
        batched = max(batched, max_model_len)  # whole prompts need room for the longest, as vLLM demands
    seqs = int(options.get("max_num_seqs") or min(seqs, batched))
    if seqs > batched:
        raise SpecError(
            file="(spec)",
            path="engine_options.max_num_seqs",
            value=seqs,
            allowed=f"as in vLLM, at most max_num_batched_tokens, which is {batched} for {role}",
        )
    loras = int(options.get("max_loras") or 1) if options.get("enable_lora") else 0
    return TwinOptions(
        blocks=blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=batched,
        latency=_latency(spec, role, shape, hardware),
        long_prefill_token_threshold=int(options.get("long_prefill_token_threshold") or 0),
        chunked_prefill=chunked,
        separate_prefill=spec.sim.separate_prefill,
        prefix_caching=bool(options.get("enable_prefix_caching", True)),
        reserve_full_prompt=bool(options.get("scheduler_reserve_full_isl", True)),
        pipeline_stages=pool.pipeline_parallel_size,
        gpus=pool.ranks,
        kv_bytes_per_token=shape.kv_bytes_per_token if shape else 0,
        lease_s=float(spec.transfer.lease_s),
        max_loras=loras,
        max_cpu_loras=int(options.get("max_cpu_loras") or loras) if loras else 0,
        adapter_load_s=sim.adapter_load_s,
        overlap=spec.transfer.overlap,
    )


def _shape(spec: ClusterSpec, *, needed: bool) -> ModelShape | None:
    """The model's shape, if anything says what it is."""
    name = spec.sim.shape or spec.model
    if spec.sim.shape is None and not needed and not (Path(name) / "config.json").is_file():
        return None
    return shape_of(name)


def kv_memory_bytes(
    shape: ModelShape,
    hardware: Hardware,
    ranks: int,
    share: float | str | None = None,
    data_parallel_size: int = 1,
) -> float:
    """Of a GPU's memory, what is left for KV beside a rank's weights; negative where these don't fit.

    Args:
        share: of the memory that vLLM takes; its default where it is None.
    """
    taken = hardware.memory_bytes * float(share or GPU_MEMORY_UTILIZATION)
    return taken - shape.weight_bytes_per_rank(ranks, data_parallel_size) - ACTIVATION_BYTES


def _kv_tokens(
    spec: ClusterSpec,
    role: Role,
    options: Mapping[str, Any],
    shape: ModelShape | None,
    hardware: Hardware | None,
) -> int:
    """Tokens of KV that an instance holds."""
    if spec.sim.kv_capacity_tokens is not None:
        return spec.sim.kv_capacity_tokens
    if blocks := options.get("num_gpu_blocks_override"):
        return int(blocks) * int(options.get("block_size") or spec.sim.block_size)
    if shape is None:
        return DEFAULT_KV_TOKENS
    pool = spec.pool(role)
    per_rank = shape.kv_bytes_per_token_and_rank(pool.tensor_parallel_size, pool.pipeline_parallel_size)
    if room := options.get("kv_cache_memory_bytes"):
        return int(int(room) / per_rank)
    if hardware is None:
        return DEFAULT_KV_TOKENS
    left = kv_memory_bytes(
        shape, hardware, pool.ranks, options.get("gpu_memory_utilization"), pool.data_parallel_size
    )
    if left <= 0:
        ranks = pool.ranks * pool.data_parallel_size
        raise SpecError(
            file="(spec)",
            path=f"{role}.tensor_parallel_size",
            value=pool.tensor_parallel_size,
            allowed=f"{shape.name} has {shape.weight_bytes / 1e9:.0f} GB of weights, which {ranks} "
            f"{hardware.name} can't hold: use more ranks",
        )
    return int(left / per_rank)


def _vllm_defaults(spec: ClusterSpec, hardware: Hardware | None, ranks: int) -> tuple[int, int]:
    """(max_num_batched_tokens, max_num_seqs) where the spec has none.

    vLLM 0.32, `EngineArgs.get_batch_defaults`, for its API server.
    """
    if spec.device == "cpu":
        return 2048 * ranks, 128 * ranks
    if hardware is None or hardware.memory_bytes < 70 * 2**30 or hardware.name.startswith("a100"):
        return 2048, 256
    return (16384 if hardware.memory_bytes >= 160 * 2**30 else 8192), 1024


def _latency(
    spec: ClusterSpec, role: Role, shape: ModelShape | None, hardware: Hardware | None
) -> LatencyModel:
    return at_pace(_said(spec, role, shape, hardware), spec.sim.pace.get(role, 1.0))


def _said(spec: ClusterSpec, role: Role, shape: ModelShape | None, hardware: Hardware | None) -> LatencyModel:
    """What profile, hardware or fixed costs say of an instance."""
    pool, sim = spec.pool(role), spec.sim
    path = sim.profile.get(role) if isinstance(sim.profile, dict) else sim.profile
    if path is not None:
        profile = load_profile(path)
        measured = profile.tensor_parallel_size, profile.pipeline_parallel_size, 1
        asked = pool.tensor_parallel_size, pool.pipeline_parallel_size, pool.data_parallel_size
        if measured != asked:
            raise SpecError(
                file="(spec)",
                path="sim.profile",
                value=path,
                allowed=f"it was measured with (tensor, pipeline, data) parallel sizes {measured}, and {role}"
                f" has {asked}: measure that layout; for data-parallel groups give 'hardware' instead",
            )
        return ProfiledLatency(profile)
    if hardware is not None and shape is not None:
        return RooflineLatency(
            shape,
            sim.network.joining(hardware),
            pool.tensor_parallel_size,
            pipeline_parallel_size=pool.pipeline_parallel_size,
            data_parallel_size=pool.data_parallel_size,
        )
    return ConstantLatency(step_s=sim.step_s, prefill_s_per_token=sim.prefill_s_per_token)
