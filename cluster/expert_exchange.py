"""What it costs a data-parallel group that each rank has a part of the experts: every token goes to those
that it chose, and what they make of it comes back.

After DeepEP's two kinds of kernels, and the times that its authors measured on H800s with 400 Gbit/s per GPU
(DeepEP, docs/legacy.md): a few tokens go directly to each expert; many go once to each node, and from there
over its links. Experts are chosen at random here, and all are as popular: neither hot experts nor routing
that is limited to some nodes is in it.
"""

from __future__ import annotations

import math

from cluster.hardware import Hardware
from cluster.model_shape import ModelShape

# Of a link's or NIC's peak: the published times of direct sends within 17 % for 8 to 256 GPUs, of 128 tokens.
BANDWIDTH = 0.75
# Tokens of a GPU that go directly: what the buffers of those kernels are made for.
MOST_DIRECT = 256
# What comes back is bfloat16; what goes out is as wide as the weights, so that 8-bit models send 8 bits.
BACK_BYTES = 2


class ExpertExchange:
    """Of a group of `groups` instances of `ranks` GPUs, which fill nodes one after the other."""

    def __init__(self, shape: ModelShape, hardware: Hardware, ranks: int, groups: int) -> None:
        assert shape.experts is not None
        gpus = ranks * groups
        in_node = min(gpus, hardware.gpus_per_node)
        nodes = math.ceil(gpus / hardware.gpus_per_node)
        link, nic = hardware.link_bytes_per_s * BANDWIDTH, hardware.nic_bytes_per_s * BANDWIDTH
        active = shape.experts.active
        token_bytes = shape.moe_layers * shape.hidden * (min(shape.dtype_bytes, BACK_BYTES) + BACK_BYTES)
        to_link, to_nic = (in_node - 1) / gpus, (gpus - in_node) / gpus
        self._direct_s = token_bytes * active * max(to_link / link, to_nic / nic) / ranks
        # So many different nodes and GPUs have one of its experts.
        on_nodes = nodes * (1 - (1 - 1 / nodes) ** active)
        on_gpus = gpus * (1 - (1 - 1 / gpus) ** active)
        over_link, over_nic = on_gpus * (in_node - 1) / in_node, on_nodes * (nodes - 1) / nodes
        self._forwarded_s = token_bytes * max(over_link / link, over_nic / nic) / ranks
        self._most_direct = MOST_DIRECT * ranks

    def seconds(self, tokens: int) -> float:
        """Of all layers, there and back, for an instance that has so many tokens. Never decreases."""
        if tokens <= self._most_direct:
            return tokens * self._direct_s
        return max(self._most_direct * self._direct_s, tokens * self._forwarded_s)
