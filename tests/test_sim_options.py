"""From a spec to a twin: whose options weigh more, how much KV fits, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import SpecError
from cluster.hardware import hardware_named
from cluster.instance import Role
from cluster.latency import Batch, ConstantLatency, LatencyProfile, ProfiledLatency
from cluster.model_shape import shape_of
from cluster.roofline import RooflineLatency
from cluster.sim_options import (
    ACTIVATION_BYTES,
    DEFAULT_KV_TOKENS,
    DEFAULT_MAX_MODEL_LEN,
    GPU_MEMORY_UTILIZATION,
    TwinOptions,
    twin_options,
)
from cluster.spec import parse_spec

SHAPE = "llama-3-8b"


def twin(
    sim: dict[str, Any] | None = None,
    role: Role = Role.DECODE,
    phase: dict[str, Any] | None = None,
    **keys: Any,
) -> TwinOptions:
    spec = parse_spec({"model": "m", "engine": "sim", "sim": sim or {}} | keys)
    return twin_options(spec, role, phase or {})


def refusal(*args: Any, **keys: Any) -> SpecError:
    with pytest.raises(SpecError) as caught:
        twin(*args, **keys)
    return caught.value


def test_without_any_word_it_has_vllms_defaults_and_room_for_all() -> None:
    options = twin()
    assert options.block_size == 16
    assert options.blocks * 16 == DEFAULT_KV_TOKENS
    assert options.max_model_len == DEFAULT_MAX_MODEL_LEN
    assert (options.max_num_batched_tokens, options.max_num_seqs) == (2048, 256)
    assert options.chunked_prefill
    assert options.prefix_caching
    assert options.reserve_full_prompt
    assert options.long_prefill_token_threshold == 0
    assert options.latency == ConstantLatency()


@pytest.mark.parametrize(
    ("hardware", "device", "expected"),
    [
        ("h100", "gpu", (8192, 1024)),
        ("b200", "gpu", (16384, 1024)),
        ("a100", "gpu", (2048, 256)),  # 80 GB, and not among the large ones to vLLM
        ("l40s", "gpu", (2048, 256)),
        (None, "cpu", (2048 * 2, 128 * 2)),
    ],
)
def test_limits_of_an_iteration_are_vllms_defaults(
    hardware: str | None, device: str, expected: tuple[int, int]
) -> None:
    options = twin(
        {"hardware": hardware, "shape": SHAPE if hardware else None, "max_model_len": 8192},
        device=device,
        decode={"tensor_parallel_size": 2},
    )
    assert (options.max_num_batched_tokens, options.max_num_seqs) == expected


@pytest.mark.parametrize(
    ("phase", "common", "pool", "weighs"),
    [(1, None, None, 1), (1, 2, None, 2), (1, 2, 3, 3), (1, None, 3, 3)],
)
def test_a_pools_options_weigh_more_than_the_specs_and_these_more_than_the_phases(
    phase: int, common: int | None, pool: int | None, weighs: int
) -> None:
    def options(value: int | None) -> dict[str, Any]:
        return {} if value is None else {"max_num_seqs": value}

    assert (
        twin(
            phase=options(phase), engine_options=options(common), decode={"engine_options": options(pool)}
        ).max_num_seqs
        == weighs
    )


def test_vllms_keys_are_read() -> None:
    options = twin(
        {"block_size": 32},
        engine_options={
            "block_size": 8,
            "max_model_len": 500,
            "max_num_seqs": 7,
            "max_num_batched_tokens": 99,
            "long_prefill_token_threshold": 5,
            "enable_prefix_caching": False,
            "scheduler_reserve_full_isl": False,
            "num_gpu_blocks_override": 100,
        },
        transfer={"lease_s": 9},
    )
    assert (options.block_size, options.blocks, options.max_model_len) == (8, 100, 500)
    assert (options.max_num_seqs, options.max_num_batched_tokens) == (7, 99)
    assert options.long_prefill_token_threshold == 5
    assert not options.prefix_caching
    assert not options.reserve_full_prompt
    assert options.lease_s == 9


def test_whole_prompts_have_room_for_the_longest() -> None:
    options = twin(engine_options={"enable_chunked_prefill": False, "max_model_len": 5000})
    assert not options.chunked_prefill
    assert options.max_num_batched_tokens == 5000


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 2), (16, 1)])
def test_kv_is_what_the_memory_leaves_beside_weights_and_activations(tensor: int, pipeline: int) -> None:
    options = twin(
        {"hardware": "h100", "shape": SHAPE, "max_model_len": 8192},
        decode={"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline},
    )
    shape = shape_of(SHAPE)
    left = (
        hardware_named("h100").memory_bytes * GPU_MEMORY_UTILIZATION
        - shape.weight_bytes / (tensor * pipeline)
        - ACTIVATION_BYTES
    )
    # The 8 KV heads are divided among up to 8 ranks; the 32 layers among the stages.
    per_rank = shape.kv_bytes_per_token / min(tensor, 8) / pipeline
    assert options.blocks == int(left / per_rank) // 16
    assert options.gpus == tensor * pipeline
    assert options.pipeline_stages == pipeline
    assert options.kv_bytes_per_token == shape.kv_bytes_per_token
    assert isinstance(options.latency, RooflineLatency)


def test_the_share_of_the_memory_and_its_size_can_be_given() -> None:
    sim = {"hardware": "h100", "shape": SHAPE, "max_model_len": 8192}
    assert twin(sim, engine_options={"gpu_memory_utilization": 0.5}).blocks < twin(sim).blocks
    per_token = shape_of(SHAPE).kv_bytes_per_token
    sized = twin(sim, engine_options={"kv_cache_memory_bytes": 10_000 * per_token})
    assert sized.blocks == 10_000 // 16
    assert twin(sim | {"kv_capacity_tokens": 9000}).blocks == 9000 // 16


def profile_at(path: Path, **layout: int) -> str:
    LatencyProfile(
        model="m",
        machine="this",
        source="a test",
        prefill=({"base_s": 0.01, "token_s": 0.001},),  # type: ignore[arg-type]
        decode=({"base_s": 0.01},),  # type: ignore[arg-type]
        region={"prefill_tokens": 100},
        **layout,  # type: ignore[arg-type]
    ).save(path)
    return str(path)


def test_a_profile_gives_the_times_of_its_role(tmp_path: Path) -> None:
    one, two = profile_at(tmp_path / "p.json"), profile_at(tmp_path / "d.json", tensor_parallel_size=2)
    sim = {"profile": {"prefill": one, "decode": two}}
    decode = {"tensor_parallel_size": 2}
    options = twin(sim, decode=decode)
    assert isinstance(options.latency, ProfiledLatency)
    assert options.latency.profile.tensor_parallel_size == 2
    assert isinstance(twin(sim, Role.PREFILL, decode=decode).latency, ProfiledLatency)


def test_a_profile_of_another_layout_is_refused(tmp_path: Path) -> None:
    path = profile_at(tmp_path / "p.json", tensor_parallel_size=2)
    error = refusal({"profile": path})
    assert error.path == "sim.profile"
    assert "(2, 1, 1), and decode has (1, 1, 1)" in str(error)


def test_a_model_that_does_not_fit_is_refused() -> None:
    error = refusal({"hardware": "l40s", "shape": "llama-3-70b"})
    assert error.path == "decode.tensor_parallel_size"
    assert "use more ranks" in str(error)


def test_one_request_must_fit_the_memory() -> None:
    error = refusal({"kv_capacity_tokens": 1000}, engine_options={"max_model_len": 1001})
    assert error.path == "engine_options.max_model_len"
    assert "992 tokens" in str(error)


@pytest.mark.parametrize(
    ("sim", "says"),
    [({"hardware": "h1000"}, "h100"), ({"hardware": "h100", "shape": "llama-9"}, "llama-3-8b")],
)
def test_unknown_names_are_told_with_the_known_ones(sim: dict[str, Any], says: str) -> None:
    assert says in str(refusal(sim))


def test_no_more_requests_than_tokens_fit_an_iteration() -> None:
    assert twin(engine_options={"max_num_batched_tokens": 100}).max_num_seqs == 100
    error = refusal(engine_options={"max_num_batched_tokens": 100, "max_num_seqs": 101})
    assert error.path == "engine_options.max_num_seqs"
    assert error.value == 101
    assert "which is 100 for decode" in str(error)


def test_adapters_are_as_many_as_vllm_would_hold() -> None:
    assert (twin().max_loras, twin().max_cpu_loras) == (0, 0)
    plain = twin(engine_options={"enable_lora": True})
    assert (plain.max_loras, plain.max_cpu_loras) == (1, 1)
    options = {"enable_lora": True, "max_loras": 4, "max_cpu_loras": 16}
    wide = twin({"adapter_load_s": 0.3}, engine_options=options)
    assert (wide.max_loras, wide.max_cpu_loras, wide.adapter_load_s) == (4, 16, 0.3)


def test_the_links_of_the_spec_are_those_of_its_groups() -> None:
    def token_s(**network: float) -> float:
        sim = {"shape": "deepseek-v3", "hardware": "h200", "network": network}
        pool = {"count": 16, "data_parallel_size": 16}
        spec = parse_spec({"model": "m", "engine": "sim", "prefill": pool, "decode": pool, "sim": sim})
        return twin_options(spec, Role.DECODE, {}).latency.iteration_s(Batch(0, 0, 0, 128, 128_000))

    assert token_s(nic_gbps=25) > 2 * token_s()
    assert token_s(gpus_per_node=16) < token_s()


def test_a_group_has_an_expert_for_each_gpu() -> None:
    sim = {"shape": "mixtral-8x7b", "hardware": "h100"}
    decode = {"count": 16, "data_parallel_size": 16}
    spec = parse_spec({"model": "m", "engine": "sim", "decode": decode, "sim": sim})
    with pytest.raises(SpecError, match="mixtral-8x7b has 8 experts, and each GPU of a group needs one"):
        twin_options(spec, Role.DECODE, {})
