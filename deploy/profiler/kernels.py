"""`pdserve profile --kernels`: matrix products and attention of a model's shape, one by one, on a GPU.

What each of them reaches of the GPU's peak is what a roofline needs (`cluster.roofline`): an efficiency over
tokens for the linear part, one for attention of prompts, one for reading KV.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from cluster.errors import SpecError
from cluster.hardware import Hardware
from cluster.model_shape import ModelShape
from deploy.profiler.grid import steps

KERNELS_FORMAT = 1
KernelName = Literal["gemm", "prefill_attention", "decode_attention"]
MOST_KV_TOKENS = 1 << 20
SHORTEST_CONTEXT = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmShape:
    """`tokens` x `inner` times `inner` x `outer`; `layer` says which of the model's products it is."""

    layer: str
    tokens: int
    inner: int
    outer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Attention of one layer on one GPU.

    Attributes:
        requests: in the batch, of equal context.
        context_tokens: of each, its new tokens included.
        new_tokens: queries of each request; its whole prompt or a chunk in prefill, 1 in decode.
    """

    requests: int
    context_tokens: int
    new_tokens: int
    heads: int
    kv_heads: int
    head_dim: int


KernelShape = GemmShape | AttentionShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What to time, and what it has to do at least.

    Attributes:
        flops: operations of one call.
        bytes: that must move between memory and the cores in one call.
    """

    name: KernelName
    shape: KernelShape
    flops: float
    bytes: float

    def roofline_s(self, hardware: Hardware) -> float:
        """The time below which no call can come."""
        return max(self.flops / hardware.flops, self.bytes / hardware.memory_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """A timed kernel; `efficiency` is the share of the roofline that it reaches."""

    kernel: Kernel
    time_s: float
    efficiency: float
    bound: Literal["compute", "memory"]


class KernelTimer(Protocol):
    """Runs kernels on a GPU (`kernels_flashinfer.CudaTimer`), or knows their times (a test)."""

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries whose kernels run."""
        ...

    def time_s(self, kernel: Kernel) -> float:
        """Median seconds of a call."""
        ...


def kernel_grid(
    shape: ModelShape, *, tensor_parallel_size: int, max_prompt: int, max_requests: int
) -> list[Kernel]:
    """The kernels of one rank. Raises SpecError for latent attention, and for ranks that do not divide it."""
    if shape.latent is not None:
        raise SpecError(
            file="command line",
            path="shape",
            value=shape.name,
            allowed="multi-head or grouped-query attention: FlashInfer has other wrappers for latent",
        )
    if shape.heads % tensor_parallel_size or shape.ffn % tensor_parallel_size:
        raise SpecError(
            file="command line",
            path="tensor-parallel-size",
            value=tensor_parallel_size,
            allowed=f"a divisor of the {shape.heads} heads of {shape.name}",
        )
    heads, kv_heads = shape.heads // tensor_parallel_size, max(1, shape.kv_heads // tensor_parallel_size)
    kernels = [
        _gemm(layer, tokens, inner, outer, shape.dtype_bytes)
        for tokens in steps(1, max(max_prompt, max_requests), 2)
        for layer, inner, outer in _products(shape, heads, kv_heads, tensor_parallel_size)
    ]
    attention = _Attention(heads, kv_heads, shape.head_dim, shape.dtype_bytes, shape.kv_dtype_bytes)
    for context in steps(min(SHORTEST_CONTEXT, max_prompt), max_prompt, 2):
        for requests in (1, 4):
            kernels.append(attention.kernel("prefill_attention", requests, context, context))
        if context >= 2 * SHORTEST_CONTEXT:
            # A chunk behind a context that was computed before.
            kernels.append(attention.kernel("prefill_attention", 1, context, context // 2))
        for requests in steps(1, max_requests, 4):
            if requests * context <= MOST_KV_TOKENS:
                kernels.append(attention.kernel("decode_attention", requests, context, 1))
    return kernels


def _products(shape: ModelShape, heads: int, kv_heads: int, ranks: int) -> list[tuple[str, int, int]]:
    """(layer, inner, outer) of one rank's matrix products; of a mixture of experts, one expert's."""
    ffn = (shape.experts.ffn if shape.experts else shape.ffn) // ranks
    return [
        ("qkv", shape.hidden, (heads + 2 * kv_heads) * shape.head_dim),
        ("attention output", heads * shape.head_dim, shape.hidden),
        ("mlp in", shape.hidden, ffn * (2 if shape.gated_mlp else 1)),
        ("mlp out", ffn, shape.hidden),
    ]


def _gemm(layer: str, tokens: int, inner: int, outer: int, dtype_bytes: float) -> Kernel:
    elements = tokens * inner + inner * outer + tokens * outer
    return Kernel(
        name="gemm",
        shape=GemmShape(layer=layer, tokens=tokens, inner=inner, outer=outer),
        flops=2.0 * tokens * inner * outer,
        bytes=elements * dtype_bytes,
    )


@dataclass(frozen=True, slots=True)
class _Attention:
    heads: int
    kv_heads: int
    head_dim: int
    dtype_bytes: float
    kv_dtype_bytes: float

    def kernel(self, name: KernelName, requests: int, context: int, new: int) -> Kernel:
        """Causal attention: a query meets its context and, of the new tokens, those up to itself."""
        meetings = requests * (context**2 - (context - new) ** 2 + new) / 2
        queries = 2 * requests * new * self.heads * self.head_dim * self.dtype_bytes  # in, and out
        kv = 2 * requests * context * self.kv_heads * self.head_dim * self.kv_dtype_bytes
        return Kernel(
            name=name,
            shape=AttentionShape(
                requests=requests, context_tokens=context, new_tokens=new,
                heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            ),
            flops=4.0 * meetings * self.heads * self.head_dim,
            bytes=queries + kv,
        )  # fmt: skip


def time_kernels(
    kernels: Sequence[Kernel], timer: KernelTimer, hardware: Hardware, say: Callable[[str], None]
) -> list[KernelTime]:
    """Time each. Raises ValueError for one that is done in less than half of the time it must take."""
    times = []
    for done, kernel in enumerate(kernels, 1):
        time_s = timer.time_s(kernel)
        least_s = kernel.roofline_s(hardware)
        if time_s <= 0 or kernel.flops / time_s > 2 * hardware.flops:
            raise ValueError(
                f"{kernel.name} {kernel.shape} took {time_s:.3g} s, and {hardware.name} needs at least "
                f"{least_s:.3g} s: name the GPU that is here with --hardware"
            )
        compute_s = kernel.flops / hardware.flops
        times.append(
            KernelTime(
                kernel=kernel,
                time_s=time_s,
                efficiency=least_s / time_s,
                bound="compute" if compute_s >= least_s else "memory",
            )
        )
        if done % 50 == 0 or done == len(kernels):
            say(f"{done} of {len(kernels)} kernels")
    return times


def save_kernels(
    path: Path,
    times: Sequence[KernelTime],
    *,
    shape: ModelShape,
    ranks: int,
    hardware: Hardware,
    versions: dict[str, str],
) -> None:
    """Write them as JSON: one object per kernel, beside what they were measured for and on."""
    head = {
        "format": KERNELS_FORMAT,
        "model": shape.name,
        "tensor_parallel_size": ranks,
        "hardware": hardware.name,
        "versions": versions,
    }
    rows = [
        {
            "kernel": t.kernel.name,
            "shape": asdict(t.kernel.shape),
            "time_s": t.time_s,
            "flops": t.kernel.flops,
            "bytes": t.kernel.bytes,
            "efficiency": t.efficiency,
            "bound": t.bound,
        }
        for t in times
    ]
    # A line each, so that two files can be compared.
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(head)[:-1]}, "kernels": [\n{lines}\n]}}\n', encoding="utf-8")


def kernels_table(times: Sequence[KernelTime]) -> str:
    """Efficiency by kernel, and by tokens or context, for people."""
    rows: dict[tuple[str, int], list[float]] = {}
    for time in times:
        shape = time.kernel.shape
        size = shape.tokens if isinstance(shape, GemmShape) else shape.context_tokens
        rows.setdefault((time.kernel.name, size), []).append(time.efficiency)
    lines = [
        f"{'share of the roofline':<22}{'tokens, context':>18}{'shapes':>8}{'least':>8}{'mean':>8}{'most':>8}"
    ]
    for (name, size), shares in sorted(rows.items()):
        mean = sum(shares) / len(shares)
        lines.append(
            f"{name:<22}{size:>18,}{len(shares):>8}{min(shares):>8.0%}{mean:>8.0%}{max(shares):>8.0%}"
        )
    return "\n".join(lines)
