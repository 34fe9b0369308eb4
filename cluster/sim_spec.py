"""What a spec says of twins: how fast they are, how much they hold, what is between them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from cluster.frozen import Frozen
from cluster.hardware import Hardware, hardware_named
from cluster.instance import Role

_BYTES_PER_S_OF_GBPS = 1e9 / 8
# Where nothing says what the links are: fast enough to be no matter.
_UNKNOWN_BYTES_PER_S = 1e15
_UNKNOWN = Hardware(
    name="unknown",
    flops=0.0,
    memory_bytes=0,
    memory_bytes_per_s=0.0,
    nvlink_bytes_per_s=_UNKNOWN_BYTES_PER_S,
    pcie_bytes_per_s=_UNKNOWN_BYTES_PER_S,
    nic_bytes_per_s=_UNKNOWN_BYTES_PER_S,
    gpus_per_node=8,
)


class NetworkSpec(Frozen):
    """The links that the twins' KV moves over; what is not given is the hardware's.

    Attributes:
        gpus_per_node: instances are packed onto nodes in the order of the spec.
        nic_gbps: between nodes, per GPU and direction, in gigabits per second.
        nvlink_gbps: within a node, per GPU and direction, in gigabits per second; 0 for none (PCIe then).
        latency_s: from asking for KV until its first byte.
    """

    gpus_per_node: PositiveInt | None = None
    nic_gbps: PositiveFloat | None = None
    nvlink_gbps: float | None = Field(default=None, ge=0)
    latency_s: float = Field(default=0.001, ge=0)

    def joining(self, hardware: Hardware) -> Hardware:
        """GPUs of that kind, with these links between them."""
        links: dict[str, Any] = {}
        if self.gpus_per_node:
            links["gpus_per_node"] = self.gpus_per_node
        if self.nic_gbps:
            links["nic_bytes_per_s"] = self.nic_gbps * _BYTES_PER_S_OF_GBPS
        if self.nvlink_gbps is not None:
            links["nvlink_bytes_per_s"] = self.nvlink_gbps * _BYTES_PER_S_OF_GBPS
        return replace(hardware, **links)


class SimEngineSpec(Frozen):
    """How fast and how large the twins are: after a profile, after a model shape on a GPU, or by fixed costs.

    Batching limits, block size and cache switches are vLLM's own keys in `engine_options`.

    Attributes:
        profile: file that `pdserve profile` wrote; one for both roles, or one for each.
        hardware: name of a GPU (`cluster.hardware`), one for both roles, or one for each; iteration times are
            then the roofline's.
        shape: name of a model shape or a `config.json` (`cluster.model_shape`); default: the spec's model.
        step_s, prefill_s_per_token: fixed costs, where neither of these is given.
        block_size: tokens in a KV block, where `engine_options` has none.
        kv_capacity_tokens: tokens in the KV cache of an instance; default: what the hardware's memory leaves
            beside the weights, else 1,000,000.
        max_model_len: where `engine_options` has none; default: the shape's, else 32,768.
        hop_s: simulated time between a router and an engine, there and back together, where no profile has it
            (frontend_s, handoff_s). Served live, a hop takes what it takes.
        separate_prefill: whether an iteration with prompts holds no decodes and goes first, as in vLLM up to
            0.3; for policy `unsplit`, as on a decode instance every hand-over would stop the others.
        adapter_load_s: what loading a LoRA adapter takes; also what a policy that predicts expects at first.
        pace: by role, how many times as long its iterations take as the model says (`pdserve calibrate`).
    """

    profile: str | dict[Role, str] | None = None
    hardware: str | dict[Role, str] | None = None
    shape: str | None = None
    prefill_s_per_token: float = Field(default=0.0, ge=0)
    step_s: float = Field(default=0.0, ge=0)
    block_size: PositiveInt = 16
    kv_capacity_tokens: PositiveInt | None = None
    max_model_len: PositiveInt | None = None
    hop_s: float = Field(default=0.0, ge=0)
    separate_prefill: bool = False
    adapter_load_s: float = Field(default=0.1, ge=0)
    pace: dict[Role, PositiveFloat] = Field(default_factory=dict)
    network: NetworkSpec = Field(default_factory=NetworkSpec)

    def hardware_of(self, role: Role) -> Hardware | None:
        """The GPUs of a pool, where they are named. Raises SpecError for unknown ones."""
        name = self.hardware[role] if isinstance(self.hardware, dict) else self.hardware
        return hardware_named(name) if name else None

    def links_of(self, role: Role) -> Hardware:
        """The links of the GPUs of a pool; of the rest nothing is known where they are not named."""
        return self.network.joining(self.hardware_of(role) or _UNKNOWN)

    @property
    def is_mixed(self) -> bool:
        """Whether the pools have different GPUs."""
        return isinstance(self.hardware, dict) and len(set(self.hardware.values())) > 1

    @model_validator(mode="after")
    def _check(self) -> SimEngineSpec:
        if isinstance(self.hardware, dict) and (missing := set(Role) - set(self.hardware)):
            raise ValueError(f"hardware names none for {', '.join(sorted(missing))}")
        return self
