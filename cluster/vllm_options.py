"""From a spec to vLLM's own configuration: for an instance's engine, and for the ingress in front of it."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from typing import Any

from cluster import vllm_api
from cluster.errors import EnvironmentProblem, SpecError
from cluster.instance import GroupRank, Role
from cluster.spec import ClusterSpec

CONNECTOR_MODULE = "kv_transfer.vllm_connector"
TIERED_MODULE = "kv_transfer.tiered_vllm"
HOST_MEMORY_MODULE = "kv_transfer.host_memory_vllm"
# Environment of an engine: where it hears how far prompts are computed elsewhere; unset where it shall not.
NEWS_ADDRESS = "PDSERVE_NEWS_ADDRESS"


def engine_options(
    spec: ClusterSpec, role: Role, phase_defaults: dict[str, Any], group: GroupRank | None = None
) -> dict[str, Any]:
    """vLLM engine options of an instance: the phase's defaults, then the spec's, then its pool's.

    Args:
        group: which of a data-parallel group it is.
    """
    pool = spec.pool(role)
    options: dict[str, Any] = {"seed": spec.seed, **phase_defaults, **spec.engine_options}
    options |= {
        "model": spec.model,
        "served_model_name": spec.api_model_name,
        "tensor_parallel_size": pool.tensor_parallel_size,
        "pipeline_parallel_size": pool.pipeline_parallel_size,
        "kv_transfer_config": kv_transfer_config(spec),
    }
    # Named, because inside a Ray actor vLLM would choose its Ray executor, and start Ray anew.
    options["distributed_executor_backend"] = "uni" if pool.ranks == 1 else "mp"
    if group is not None:
        options |= {
            "data_parallel_size": group.size,
            # Its presence tells vLLM that requests come to each rank by itself.
            "data_parallel_rank": group.rank,
            "data_parallel_address": group.host,
            "data_parallel_rpc_port": group.port,
            "enable_expert_parallel": True,
        }
    options |= pool.engine_options
    return options


def kv_transfer_config(spec: ClusterSpec) -> dict[str, Any]:
    """vLLM's `kv_transfer_config` for every engine, and for the ingress that reads their statistics."""
    common = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    transfer = common | {
        "kv_connector": "PdConnector",
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_connector_extra_config": {
            "kv_lease_duration": spec.transfer.lease_s,
            "transport": spec.transfer.transport,
            # UCX worker threads; on CPUs each would take time from the engines' cores.
            "num_threads": 4 if spec.device == "gpu" else 1,
        },
    }
    if spec.tiers is None:
        return transfer
    keeping: dict[str, Any] = {
        "spec_name": "HostMemory",
        "spec_module_path": HOST_MEMORY_MODULE,
        "cpu_bytes_to_use": int(spec.tiers.host_gib * 2**30),
    }
    if spec.tiers.directory is not None:
        keeping["spec_name"] = "SharedMemory"
        keeping["secondary_tiers"] = [{"type": "fs", "root_dir": spec.tiers.directory}]
    host_memory = common | {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": keeping}
    return common | {
        "kv_connector": "TieredConnector",
        "kv_connector_module_path": TIERED_MODULE,
        "kv_connector_extra_config": {"connectors": [transfer, host_memory]},
    }


def engine_config(options: dict[str, Any], *, file: str = "(spec)") -> Any:
    """vLLM's checked `VllmConfig`.

    Raises:
        SpecError: an option vLLM does not have, or a value it refuses (with vLLM's words).
        EnvironmentProblem: a GPU spec on a machine without one.
    """
    known = {field.name for field in dataclasses.fields(vllm_api.AsyncEngineArgs)}
    for name, value in options.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see vLLM's engine arguments"
            raise SpecError(
                file=file,
                path=f"engine_options.{name}",
                value=value,
                allowed=f"vLLM has no such option; {hint}",
            )
    try:
        args = vllm_api.AsyncEngineArgs(**options)
        return args.create_engine_config(vllm_api.UsageContext.OPENAI_API_SERVER)
    except (ValueError, TypeError, OSError) as error:
        if "Non-MoE" in str(error) and (size := options.get("data_parallel_size", 1)) > 1:
            raise SpecError(
                file=file,
                path="data_parallel_size",
                value=size,
                allowed="the model has no experts that instances could share: raise the pool's count instead",
            ) from error
        raise SpecError(
            file=file, path="engine_options", value=options.get("model"), allowed=f"vLLM says: {error}"
        ) from error


def require_device(spec: ClusterSpec, instance_id: str) -> None:
    """Raise EnvironmentProblem when the instance's process sees no device of the spec's kind."""
    if spec.device != "gpu" or spec.engine == "sim":
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible.strip():
        raise EnvironmentProblem(
            problem=f"{instance_id} needs a GPU and its process sees none",
            remedy="run it on a GPU node, or set 'device: cpu' in the spec",
        )


def set_engine_environment(
    spec: ClusterSpec, role: Role, *, host: str, side_port: int, news_port: int, cores: str, rank: int = 0
) -> None:
    """Environment of an engine, to be set before vLLM is imported.

    Args:
        host: address other instances reach this one at.
        side_port: port of the NIXL handshake.
        news_port: where it hears of prompts that are computed elsewhere.
        cores: CPU cores of its ranks in vLLM's notation, for example `0|1`; CPU only.
        rank: in its data-parallel group.
    """
    pool = spec.pool(role)
    settings = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        # vLLM adds the rank to it.
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port - rank),
    }
    if spec.device == "cpu":
        settings |= {
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "OMP_NUM_THREADS": "1",
            # A worker thread of OpenMP otherwise spins for 200 ms after each operation.
            "KMP_BLOCKTIME": "0",
            "UCX_TLS": "tcp,shm,self,cma",
        }
    else:
        # UCX turns reads over CUDA IPC off where it sees no NVLink, and then goes through TCP on the host: a
        # hundredth of the speed (benchmarks/gpu).
        settings["UCX_CUDA_IPC_ENABLE_GET_ZCOPY"] = "on"
    if spec.transfer.overlap:
        settings[NEWS_ADDRESS] = f"tcp://{host}:{news_port}"
    if spec.engine_process == "thread":
        settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if spec.transfer.ucx_tls is not None:
        settings["UCX_TLS"] = spec.transfer.ucx_tls
    os.environ.update(settings | pool.env)


def server_arguments(spec: ClusterSpec) -> list[str]:
    """The ingress as a vLLM command line: engine options that the front end needs, and its own."""
    options: dict[str, Any] = {
        **spec.engine_options,
        "model": spec.model,
        "served_model_name": spec.api_model_name,
        "kv_transfer_config": kv_transfer_config(spec),
        "host": spec.ingress.host,
        "port": spec.ingress.port,
        **spec.ingress.server_options,
    }
    if spec.lora.adapters:
        ours = [{"name": name, "path": path} for name, path in spec.lora.adapters.items()]
        options["lora_modules"] = [*options.get("lora_modules", []), *ours]
    return [word for name, value in options.items() for word in _words(name.replace("_", "-"), value)]


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, dict):
        return [f"--{flag}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{flag}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)]
    return [f"--{flag}", str(value)]
