"""Iteration times of a model shape on a GPU, from what the iteration computes, reads and sends.

The linear layers take the longer of their products and of reading their weights; attention of prompts
computes, attention of decodes reads KV; tensor-parallel ranks sum up twice a layer. Every rate is a peak of
the hardware times a factor that was fitted on measurements (`Efficiency`). After DistServe (OSDI'24, appendix
A) and NanoFlow (arXiv 2408.12757, section 3); how well it fits is in docs/latency.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.expert_exchange import ExpertExchange
from cluster.hardware import Hardware
from cluster.latency import Batch
from cluster.model_shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What software makes of the hardware. Factors are of peak rates, in (0, 1].

    Attributes:
        gemm: of the products of the linear layers.
        saturation_tokens: what a product of at least as many tokens costs beside them, in tokens, because it
            fills its tiles badly; one of fewer takes twice their time.
        weight_bandwidth: of memory, reading weights.
        elementwise_bandwidth: of memory, for norms, activations and residuals.
        attention: of the products of prompts' attention.
        kv_bandwidth: of memory, reading KV.
        link_bandwidth: of the link between GPUs, as the bus bandwidth of an all-reduce.
        link_s, link_s_per_gpu: latency of an all-reduce, and what each GPU adds to it.
        layer_s: of a layer, whatever it computes: starts and ends of its kernels.
        launch_s: of the CPU, to start a layer's kernels; it hides behind the GPU's work where that is longer.
        iteration_s: of an iteration: scheduler, input, sampler.
        request_s: of each request in it.
        stage_s: of each pipeline stage after the first.
        source: what it was fitted on.
    """

    gemm: float
    saturation_tokens: float
    weight_bandwidth: float
    elementwise_bandwidth: float
    attention: float
    kv_bandwidth: float
    link_bandwidth: float
    link_s: float
    link_s_per_gpu: float
    layer_s: float
    launch_s: float
    iteration_s: float
    request_s: float
    stage_s: float
    source: str


# Fitted by `python -m benchmarks.latency_fit` on what `source` names; docs/latency.md has the errors.
# A100's `attention` is FlashAttention-2's (arXiv 2307.08691, figure 5); `stage_s` is DistServe's simulator's.
EFFICIENCIES = {
    "a100": Efficiency(
        gemm=0.753,
        saturation_tokens=67.4,
        weight_bandwidth=0.767,
        elementwise_bandwidth=0.639,
        attention=0.55,
        kv_bandwidth=0.639,
        link_bandwidth=0.432,
        link_s=4.88e-6,
        link_s_per_gpu=6.23e-6,
        layer_s=76e-6,
        launch_s=0.0,
        iteration_s=0.769e-3,
        request_s=26.8e-6,
        stage_s=1e-3,
        source="Vidur's operators and all-reduces on A100; DistServe's engine on A100",
    ),
    "h100": Efficiency(
        gemm=0.761,
        saturation_tokens=128,
        weight_bandwidth=0.861,
        elementwise_bandwidth=0.606,
        attention=0.506,
        kv_bandwidth=0.797,
        link_bandwidth=0.63,
        link_s=4.88e-6,
        link_s_per_gpu=1.84e-6,
        layer_s=69.9e-6,
        launch_s=0.0,
        iteration_s=0.769e-3,
        request_s=26.8e-6,
        stage_s=1e-3,
        source="Vidur's operators, FlashInfer timed by us, APEX' all-reduces on H100; DistServe's engine on "
        "A100, transferred",
    ),
    "h200": Efficiency(
        gemm=0.82,
        saturation_tokens=28.6,
        weight_bandwidth=0.775,
        elementwise_bandwidth=0.606,
        attention=0.511,
        kv_bandwidth=0.764,
        link_bandwidth=0.617,
        link_s=3.24e-6,
        link_s_per_gpu=1.76e-6,
        layer_s=69.9e-6,
        launch_s=0.0,
        iteration_s=0.769e-3,
        request_s=26.8e-6,
        stage_s=1e-3,
        source="products and FlashInfer timed by us and APEX' all-reduces on H200; the rest is H100's",
    ),
    # vLLM of 2023, without CUDA graphs. Tokens beyond 2,048 in a batch take it up to twice as long, which no
    # roofline has: attention and KV here absorb that, and say nothing about kernels.
    "splitwise-a100": Efficiency(
        gemm=0.671,
        saturation_tokens=67.4,
        weight_bandwidth=0.767,
        elementwise_bandwidth=0.639,
        attention=0.159,
        kv_bandwidth=0.29,
        link_bandwidth=0.432,
        link_s=4.88e-6,
        link_s_per_gpu=1.84e-6,
        layer_s=39.6e-6,
        launch_s=426e-6,
        iteration_s=10.7e-3,
        request_s=257e-6,
        stage_s=1e-3,
        source="Splitwise's engine on A100, over Vidur's kernels",
    ),
    "splitwise-h100": Efficiency(
        gemm=0.644,
        saturation_tokens=128,
        weight_bandwidth=0.861,
        elementwise_bandwidth=0.606,
        attention=0.0592,
        kv_bandwidth=0.201,
        link_bandwidth=0.63,
        link_s=4.88e-6,
        link_s_per_gpu=1.84e-6,
        layer_s=33.5e-6,
        launch_s=252e-6,
        iteration_s=9.39e-3,
        request_s=286e-6,
        stage_s=1e-3,
        source="Splitwise's engine on H100, over Vidur's kernels",
    ),
}
# The nearest that was measured: the same generation of tensor cores, or the same kind of kernels.
_NEAREST = {"h100-80gb": "h100", "h200-141gb": "h200", "b200-192gb": "h100"}


def efficiency_for(hardware: Hardware) -> Efficiency:
    """The factors that were fitted on this GPU; else, transferred, those of the nearest: H100's for B200,
    A100's for all others."""
    return EFFICIENCIES[_NEAREST.get(hardware.name, "a100")]


class RooflineLatency:
    """Iteration times of `shape`, laid out over `tensor_parallel_size` x `pipeline_parallel_size` GPUs.

    Of a group of `data_parallel_size` such instances, `iteration_s` is what each takes where all of them have
    as much to do. Never decreases when a component of the batch grows. An empty batch takes no time. Raises
    ValueError for sizes below 1, for more pipeline stages than layers, and for a group without experts.
    """

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        tensor_parallel_size: int,
        pipeline_parallel_size: int = 1,
        efficiency: Efficiency | None = None,
        data_parallel_size: int = 1,
    ) -> None:
        if tensor_parallel_size < 1 or not 1 <= pipeline_parallel_size <= shape.layers:
            raise ValueError(
                f"tensor and pipeline parallel sizes are {tensor_parallel_size} and "
                f"{pipeline_parallel_size}, expected at least 1, and at most {shape.layers} stages"
            )
        if data_parallel_size < 1 or (data_parallel_size > 1 and shape.experts is None):
            raise ValueError(
                f"data parallel size is {data_parallel_size}, expected at least 1, and 1 without experts"
            )
        self._group = data_parallel_size
        self._exchange = (
            ExpertExchange(shape, hardware, tensor_parallel_size, data_parallel_size)
            if data_parallel_size > 1
            else None
        )
        self.shape, self.hardware = shape, hardware
        self.efficiency = efficiency or efficiency_for(hardware)
        self._set_linear(tensor_parallel_size)
        self._set_attention(tensor_parallel_size)
        self._set_links(tensor_parallel_size, pipeline_parallel_size)

    @property
    def region(self) -> Batch | None:
        return None

    def iteration_s(self, batch: Batch, routed: int = 0) -> float:
        """Of one instance; `routed` are the tokens of its group, 0 for as many in each of its instances."""
        tokens, attention, prompts, decodes, context = batch
        requests = prompts + decodes
        tokens += decodes
        if not tokens:
            return 0.0
        head_s = requests * self._head_s
        work_s = (
            self.linear_s(tokens, routed)
            + (head_s if head_s > self._head_read_s else self._head_read_s)
            + attention * self._attention_s
            + context * self._context_s
            + tokens * self._link_token_s
            + self._link_fixed_s
        )
        launch_s = self._launch_s
        return (work_s if work_s > launch_s else launch_s) + requests * self._request_s + self._fixed_s

    def group_s(self, batches: Sequence[Batch]) -> float:
        """Of an iteration of the group, one batch for each of its instances: the experts compute the tokens
        of all, and nobody is ready before the slowest is."""
        routed = sum(batch.prefill_tokens + batch.decode_requests for batch in batches)
        return max(self.iteration_s(batch, routed) for batch in batches)

    def linear_s(self, tokens: int, routed: int = 0) -> float:
        """Seconds of the linear layers and what is elementwise between them, for at least one token.

        Args:
            routed: tokens that the experts of its group compute, 0 for as many in each of its instances.
        """
        saturation = self._saturation
        compute_s = (tokens + (tokens if tokens < saturation else saturation)) * self._token_s
        time = compute_s if compute_s > self._weights_read_s else self._weights_read_s
        if self._experts:
            # Experts that some token goes to, when each draws at random; each expert fills its own tiles.
            routed = routed or tokens * self._group
            touched = self._experts * (1.0 - math.exp(routed * self._log_untouched))
            tokens_s, tiles_s = routed * self._expert_token_s, touched * self._expert_tile_s
            compute_s = tokens_s + (tokens_s if tokens_s < tiles_s else tiles_s)
            read_s = touched * self._expert_read_s
            time += compute_s if compute_s > read_s else read_s
            if self._exchange is not None:
                time += self._exchange.seconds(tokens)
        return time + tokens * self._elementwise_s + self._layers_s

    def _set_linear(self, ranks: int) -> None:
        shape, factor = self.shape, self.efficiency
        flops = self.hardware.flops * factor.gemm * ranks
        read = self.hardware.memory_bytes_per_s * factor.weight_bandwidth * ranks
        self._saturation = factor.saturation_tokens
        self._token_s = 2.0 * shape.shared_parameters / flops
        self._weights_read_s = shape.shared_parameters * shape.dtype_bytes / read
        self._head_s = 2.0 * shape.head_parameters / flops
        self._head_read_s = shape.head_parameters * shape.dtype_bytes / read
        self._layers_s = shape.layers * factor.layer_s
        self._elementwise_s = (
            shape.layers
            * _elementwise_bytes(shape, ranks)
            / (self.hardware.memory_bytes_per_s * factor.elementwise_bandwidth)
        )
        experts = shape.experts
        self._experts = experts.count if experts else 0
        if experts:
            expert_flops = 2.0 * shape.moe_layers * shape.expert_parameters
            self._log_untouched = (
                math.log1p(-experts.active / experts.count) if experts.active < experts.count else -math.inf
            )
            flops, read = flops * self._group, read * self._group  # each instance has its part of them
            self._expert_token_s = experts.active * expert_flops / flops
            self._expert_tile_s = factor.saturation_tokens * expert_flops / flops
            self._expert_read_s = shape.moe_layers * shape.expert_parameters * shape.dtype_bytes / read

    def _set_attention(self, ranks: int) -> None:
        shape, factor = self.shape, self.efficiency
        # Fewer heads than ranks: some ranks repeat the work of others.
        flops = self.hardware.flops * factor.attention * min(ranks, shape.heads)
        self._attention_s = shape.attention_flops_per_square_token / flops
        read_s = shape.kv_bytes_per_token_and_rank(ranks) / (
            self.hardware.memory_bytes_per_s * factor.kv_bandwidth
        )
        self._context_s = max(read_s, shape.decode_flops_per_context_token / flops)

    def _set_links(self, ranks: int, stages: int) -> None:
        shape, factor, hardware = self.shape, self.efficiency, self.hardware
        hidden_bytes = shape.hidden * ACTIVATION_BYTES
        self._link_token_s = self._link_fixed_s = 0.0
        if ranks > 1:
            inside = ranks <= hardware.gpus_per_node
            rate = (hardware.link_bytes_per_s if inside else hardware.nic_bytes_per_s) * factor.link_bandwidth
            sums = 2 * shape.layers
            self._link_token_s = sums * hidden_bytes * 2 * (ranks - 1) / ranks / rate
            self._link_fixed_s = sums * (factor.link_s + factor.link_s_per_gpu * ranks)
        if stages > 1:
            inside = ranks * stages <= hardware.gpus_per_node
            rate = (hardware.link_bytes_per_s if inside else hardware.nic_bytes_per_s) * factor.link_bandwidth
            self._link_token_s += (stages - 1) * hidden_bytes / rate
        self._launch_s = shape.layers * factor.launch_s
        self._fixed_s = factor.iteration_s + (stages - 1) * factor.stage_s
        self._request_s = factor.request_s


ACTIVATION_BYTES = 2  # bfloat16, whatever the weights are


def _elementwise_bytes(shape: ModelShape, ranks: int) -> float:
    """Bytes that a token moves through a layer's elementwise kernels on one rank.

    Two norms read and write the hidden state, two residual sums read two and write one, on every rank; rotary
    embedding and activation read and write a rank's own part of queries, keys and MLP.
    """
    ffn = shape.ffn
    if shape.experts:
        ffn = shape.experts.active * shape.experts.ffn + shape.experts.shared_ffn
    rotary = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    activation = (3 if shape.gated_mlp else 2) * ffn
    return ACTIVATION_BYTES * (10 * shape.hidden + (rotary + activation) / ranks)
