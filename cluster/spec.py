"""The spec: one YAML file that says what a cluster is. Read once, frozen, checked at the edge."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from cluster.batch_spec import BatchSpec
from cluster.errors import SpecError
from cluster.frozen import Frozen
from cluster.instance import Role
from cluster.sim_spec import SimEngineSpec
from cluster.slo_spec import SloSpec

EngineOptions = dict[str, Any]
# The policy with which one pool may be empty: every instance serves both phases.
UNSPLIT = "unsplit"


class PoolSpec(Frozen):
    """One pool: `count` equal instances of a role.

    Attributes:
        count: instances at start; 0 only with the policy `unsplit`.
        tensor_parallel_size, pipeline_parallel_size: ranks of each instance; on GPUs it takes their product
            in GPUs, all on one node.
        data_parallel_size: instances of a group, which compute a mixture of experts together: each has its
            own requests, its own KV and its part of the experts. A group starts, drains and ends as one;
            `count` is a multiple of it.
        cpus: CPU cores Ray reserves for an instance; on a CPU cluster each rank is bound to one core.
        attention_backend: vLLM's name of the attention kernels, the same for both pools; see
            `cluster.attention`.
        engine_options: any vLLM engine option, over the spec's common ones.
        env: environment variables of the instance's processes.
        resources: custom Ray resources that an instance takes; it runs on a node that has them, which is how
            a pool gets its type of GPU.
    """

    count: int = Field(default=1, ge=0)
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    data_parallel_size: PositiveInt = 1
    cpus: float = Field(default=1.0, gt=0)
    attention_backend: str | None = None
    engine_options: EngineOptions = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> PoolSpec:
        size = self.data_parallel_size
        if self.count % size:
            raise ValueError(f"count is {self.count}, and data_parallel_size {size}: use a multiple of it")
        if size > 1 and self.pipeline_parallel_size > 1:
            raise ValueError(f"data_parallel_size is {size}: pipeline_parallel_size must be 1")
        return self

    @property
    def ranks(self) -> int:
        """Processes of an instance that hold a part of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class IngressSpec(Frozen):
    """The OpenAI front end.

    Attributes:
        replicas: processes; each speaks to every instance.
        host, port: where HAProxy listens.
        server_options: any option of vLLM's OpenAI server, for example `tool_call_parser: hermes`.
        decision_log: file on the ingress' machine that gets a JSON line per decision (`router.decision_log`);
            with several replicas each adds its name to it.
        resources: custom Ray resources that a replica takes, as of a pool.
    """

    replicas: PositiveInt = 1
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    cpus: float = Field(default=1.0, ge=0)
    server_options: dict[str, Any] = Field(default_factory=dict)
    decision_log: str | None = Field(default=None, min_length=1)
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)


class DeadlineSpec(Frozen):
    """How long a stage may go without progress before the request is moved or ended, in seconds.

    Attributes:
        prefill_s: from sending the prompt to its first token.
        transfer_s: from the hand-over to the first token of the decode instance.
        stall_s: between two output tokens of a running decode.
        attempts: engines tried in all before the request ends with the last error.
        ttft_patience: how many times its TTFT bound a request is waited for; then it is ended, as an answer
            that late would only delay those of others.
        startup_s: for an instance to become READY.
        drain_s: for running requests to end when the cluster goes down.
    """

    prefill_s: PositiveFloat = 120.0
    transfer_s: PositiveFloat = 30.0
    stall_s: PositiveFloat = 60.0
    attempts: PositiveInt = 3
    ttft_patience: float = Field(default=2.0, ge=1)
    startup_s: PositiveFloat = 900.0
    drain_s: PositiveFloat = 30.0


TransportName = Literal["nixl", "torch", "local"]


class TransferSpec(Frozen):
    """How KV moves.

    Attributes:
        transport: `nixl`; `torch` for torch.distributed (gloo, on GPUs NCCL); `local` for instances on
            the CPUs of one machine.
        lease_s: how long a prefill instance keeps blocks that nobody asks for; the transfer renews it.
        ucx_tls: UCX transports, as in UCX_TLS; default: UCX's own choice on GPUs, shared memory on CPUs.
        overlap: whether a prompt of several chunks is read chunk by chunk while it is still computed.
    """

    transport: TransportName = "nixl"
    lease_s: int = Field(default=30, ge=6)
    ucx_tls: str | None = None
    overlap: bool = True


class TierSpec(Frozen):
    """Where KV goes that an engine has no room for any more, and is found again. Off where a spec has none.

    Attributes:
        host_gib: main memory for it, of each instance, in GiB.
        directory: where instances keep it for each other: on a file system of all of them, or on one of
            their node. Nothing is ever removed there. Adapters must not change under their paths.
    """

    host_gib: PositiveFloat = Field(allow_inf_nan=False)
    directory: str | None = None

    @field_validator("directory")
    @classmethod
    def _is_whole(cls, directory: str | None) -> str | None:
        if directory is not None and not directory.startswith("/"):
            raise ValueError("give the whole path, from / on: instances run in directories of their own")
        return directory


class LoraSpec(Frozen):
    """LoRA adapters; how many fit is vLLM's `enable_lora`, `max_loras`, ... in `engine_options`.

    Attributes:
        adapters: directory, or name on the model hub, by the name that clients ask for as `model`. Engines
            read them when they first need them, each from its own machine.
        runtime_updates: whether `/v1/load_lora_adapter` and `/v1/unload_lora_adapter` are there.
    """

    adapters: dict[str, str] = Field(default_factory=dict)
    runtime_updates: bool = False


class ClusterSpec(Frozen):
    """A cluster.

    Attributes:
        model: local checkpoint directory, or a name on the model hub.
        served_model_name: name in the API; default: `model`.
        device: `gpu` or `cpu`.
        engine: `vllm`, or `sim` for the twin.
        engine_process: `own` runs each engine in a process of its own (production); `thread` runs it inside
            the actor and is ready three times as fast (one rank only).
        engine_options: any vLLM engine option, for both pools and the ingress.
        tiers: where KV goes that an engine has no room for any more; default: nowhere.
        policy: name of the router's policy (`router.policies`).
        slo: classes of requests.
        batch: offline batches.
        prefill_order: which prompt goes first: the one that came first, or the one that is due first, for
            which another gives way between two of its chunks.
        prefill_queue: whether a prefill instance refuses a prompt that would wait there for longer than its
            bound, or than `deadlines.prefill_s`, and the router offers it to another; `open` takes all.
        prefill_batching: which prompts share an iteration: whoever comes next (`mixed`), or short ones with
            each other and not with chunks of long ones, for which they wait a few milliseconds (`by_length`).
        colocate: GPUs of a node (on CPUs, ranks) that holds instances of both pools, as many of each as their
            counts say, so that KV moves within it; default: an instance is wherever there is room.
        keep_sessions: whether prefill instances keep the KV of a session's prompt from being evicted for as
            long as it is worth it, for the session's next turn; for policies that predict times.
        rebalance: when a running request goes on at another decode instance, its KV handed over: where its
            own runs out of `memory`, or also where it misses TPOT bounds that another would keep (`all`); for
            policies that predict times. Those of an instance that drains always do.
        decode_admission: when a request is let into the memory of a decode instance: when there are
            `free_blocks` for it now, or when it fits at the `predicted_peak` of all that are there.
    """

    name: str = Field(default="pdserve", pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
    model: str
    served_model_name: str | None = None
    device: Literal["gpu", "cpu"] = "gpu"
    engine: Literal["vllm", "sim"] = "vllm"
    engine_process: Literal["own", "thread"] = "own"
    engine_options: EngineOptions = Field(default_factory=dict)
    seed: int = 0
    prefill: PoolSpec = Field(default_factory=PoolSpec)
    decode: PoolSpec = Field(default_factory=PoolSpec)
    ingress: IngressSpec = Field(default_factory=IngressSpec)
    deadlines: DeadlineSpec = Field(default_factory=DeadlineSpec)
    transfer: TransferSpec = Field(default_factory=TransferSpec)
    tiers: TierSpec | None = None
    lora: LoraSpec = Field(default_factory=LoraSpec)
    sim: SimEngineSpec = Field(default_factory=SimEngineSpec)
    policy: str = "goodput"
    slo: SloSpec = Field(default_factory=SloSpec)
    batch: BatchSpec = Field(default_factory=BatchSpec)
    prefill_order: Literal["arrival", "deadline"] = "deadline"
    prefill_queue: Literal["bounded", "open"] = "bounded"
    prefill_batching: Literal["mixed", "by_length"] = "mixed"
    colocate: PositiveInt | None = None
    keep_sessions: bool = False
    rebalance: Literal["off", "memory", "all"] = "memory"
    decode_admission: Literal["free_blocks", "predicted_peak"] = "free_blocks"

    @model_validator(mode="after")
    def _check(self) -> ClusterSpec:
        for role in Role:
            pool = self.pool(role)
            if not pool.count and (self.policy != UNSPLIT or not self.prefill.count + self.decode.count):
                raise ValueError(f"{role}.count is 0, and policy {self.policy!r} needs an instance there")
            if self.engine_process == "thread" and (ranks := pool.ranks * pool.data_parallel_size) > 1:
                raise ValueError(f"engine_process 'thread' runs one rank; {role} has {ranks}: use 'own'")
            if pool.pipeline_parallel_size > 1 and self.engine == "vllm" and self._reads_kv(role):
                raise ValueError(
                    f"{role}.pipeline_parallel_size is {pool.pipeline_parallel_size}: KV can be read from "
                    "pipeline stages, but not into them; use tensor_parallel_size (the twin, engine: sim, "
                    "has stages)"
                )
            if self.colocate is not None and pool.ranks > self.colocate:
                raise ValueError(
                    f"colocate is {self.colocate}, and an instance of {role} has {pool.ranks} ranks, all of "
                    "them on one node"
                )
            _refuse(pool.engine_options, f"{role}.engine_options")
            if "enable_lora" in pool.engine_options:
                raise ValueError(f"{role}.engine_options.enable_lora: both pools need it, use engine_options")
        if self.colocate is not None and max(self.pool(role).data_parallel_size for role in Role) > 1:
            raise ValueError("colocate: the instances of a data-parallel group are beside each other instead")
        if self.colocate is not None and self.sim.is_mixed:
            raise ValueError("colocate: the pools have different GPUs, which are not on one node")
        _refuse(self.engine_options, "engine_options")
        if (self.lora.adapters or self.lora.runtime_updates) and not self.engine_options.get("enable_lora"):
            raise ValueError("'lora' needs engine_options: {enable_lora: true}")
        if self.tiers is not None and self.engine == "sim":
            raise ValueError("'tiers' with engine 'sim': twins have only their own memory")
        if self.tiers is not None and self.engine_options.get("enable_prefix_caching") is False:
            raise ValueError("'tiers' keep what prefix caching finds: it must not be off")
        if self.tiers is not None and self.tiers.directory and self.lora.runtime_updates:
            raise ValueError(
                "tiers.directory with lora.runtime_updates: KV of an adapter would be found after another "
                "has taken its name and path"
            )
        if self.lora.runtime_updates and self.ingress.replicas > 1:
            raise ValueError(
                "lora.runtime_updates with several ingress replicas: one would not know what another was told"
            )
        return self

    def _reads_kv(self, role: Role) -> bool:
        """Whether instances of a role may be sent the KV of others."""
        return role is Role.DECODE or self.policy in (UNSPLIT, "splitwise_jsq")

    @property
    def api_model_name(self) -> str:
        """The model's name in the API."""
        return self.served_model_name or self.model

    def pool(self, role: Role) -> PoolSpec:
        return self.prefill if role is Role.PREFILL else self.decode

    def places(self) -> list[tuple[str, Role]]:
        """Instance ids in the order of their engine index."""
        return [(f"{role}-{n}", role) for role in Role for n in range(self.pool(role).count)]

    def groups(self) -> list[tuple[str, ...]]:
        """Instances that start and end together, in the order of their engine index; most are alone."""
        return [
            tuple(f"{role}-{first + rank}" for rank in range(self.pool(role).data_parallel_size))
            for role in Role
            for first in range(0, self.pool(role).count, self.pool(role).data_parallel_size)
        ]


_OURS = {
    "model": "use the top-level 'model'",
    "served_model_name": "use the top-level 'served_model_name'",
    "kv_transfer_config": "see 'transfer'",
    "tensor_parallel_size": "use 'tensor_parallel_size' of the pool",
    "pipeline_parallel_size": "use 'pipeline_parallel_size' of the pool",
    "data_parallel_size": "use 'data_parallel_size' of the pool",
    "data_parallel_rank": "it follows from 'data_parallel_size' of the pool",
    "data_parallel_address": "it follows from 'data_parallel_size' of the pool",
    "data_parallel_rpc_port": "it follows from 'data_parallel_size' of the pool",
    "data_parallel_size_local": "it follows from 'data_parallel_size' of the pool",
    "data_parallel_start_rank": "it follows from 'data_parallel_size' of the pool",
    "data_parallel_external_lb": "it follows from 'data_parallel_size' of the pool",
    "data_parallel_hybrid_lb": "it follows from 'data_parallel_size' of the pool",
    "data_parallel_backend": "it follows from 'data_parallel_size' of the pool",
    "distributed_executor_backend": "it follows from 'engine_process'",
}


def _refuse(options: EngineOptions, where: str) -> None:
    for option in options:
        if option in _OURS:
            raise ValueError(f"{where}.{option} is set by pdserve: {_OURS[option]}")


def load_spec(path: Path | str, overrides: dict[str, Any] | None = None) -> ClusterSpec:
    """Read a spec file.

    Args:
        path: YAML file.
        overrides: top-level keys that replace the file's, from the command line.

    Raises:
        SpecError: no such file, no YAML, or a key or value that is not allowed; names file, path and value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(
            file=str(path), path="", value=error.strerror or "unreadable", allowed="name a readable YAML file"
        ) from error
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(file=str(path), path="", value=str(error), allowed="the file must be YAML") from error
    if not isinstance(raw, dict):
        raise SpecError(file=str(path), path="", value=raw, allowed="the file must be a mapping of keys")
    return parse_spec({**raw, **(overrides or {})}, file=str(path))


def parse_spec(raw: dict[str, Any], *, file: str = "(spec)") -> ClusterSpec:
    """Check a spec that is already a dict; raises SpecError for the first problem."""
    try:
        return ClusterSpec.model_validate(raw)
    except ValidationError as error:
        raise _spec_error(error, file) from None


def _spec_error(error: ValidationError, file: str) -> SpecError:
    first = error.errors()[0]
    allowed = str(first["msg"]).removeprefix("Value error, ")
    location = list(first["loc"])
    if first["type"] == "extra_forbidden":
        allowed = f"no such key; the keys here are {', '.join(sorted(_keys_at(location[:-1])))}"
    value = "(missing)" if first["type"] == "missing" else first["input"]
    if isinstance(value, dict) and not location:
        value = value.get("name", "spec")
    return SpecError(file=file, path=".".join(str(part) for part in location), value=value, allowed=allowed)


def _keys_at(location: list[int | str]) -> list[str]:
    model: type[BaseModel] = ClusterSpec
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
