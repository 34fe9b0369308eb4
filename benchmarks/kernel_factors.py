"""The roofline's factors from kernels that were timed on real GPUs, and their errors on the model left out
(Markdown):

    python -m benchmarks.kernel_factors

Reads what `pdserve profile --kernels` wrote on them (`benchmarks/gpu/kernels-*.json`). A layer's four
products are one sample for each number of tokens, as the roofline sees them; attention's are one each.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.factor_search import START, residual_cells, search
from cluster.hardware import Hardware, hardware_named
from cluster.roofline import Efficiency

MEASURED = Path(__file__).resolve().parent / "gpu"
# Each with its own fixed costs, which `layer_s` stands for here.
FACTORS = {
    "gemm": ("gemm", "saturation_tokens", "weight_bandwidth", "layer_s"),
    "prefill_attention": ("attention", "layer_s"),
    "decode_attention": ("kv_bandwidth", "layer_s"),
}


class KernelSample(NamedTuple):
    """What was timed: once, or a layer's products together. `tokens` of products only."""

    kind: str
    model: str
    tokens: int
    flops: float
    bytes: float
    seconds: float


def kernel_samples() -> dict[str, list[KernelSample]]:
    """All that was timed, by GPU."""
    found: dict[str, list[KernelSample]] = defaultdict(list)
    for path in sorted(MEASURED.glob("kernels-*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        model = f"{document['model']} TP{document['tensor_parallel_size']}"
        found[document["hardware"]] += [*_layers(document["kernels"], model), *_attention(document, model)]
    return found


def _layers(kernels: Sequence[dict[str, Any]], model: str) -> Iterator[KernelSample]:
    by_tokens: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for kernel in kernels:
        if kernel["kernel"] == "gemm":
            by_tokens[kernel["shape"]["tokens"]].append(kernel)
    for tokens, products in by_tokens.items():
        flops, moved, seconds = (sum(p[key] for p in products) for key in ("flops", "bytes", "time_s"))
        yield KernelSample("gemm", model, tokens, flops, moved, seconds)


def _attention(document: dict[str, Any], model: str) -> Iterator[KernelSample]:
    for kernel in document["kernels"]:
        if kernel["kernel"] != "gemm":
            yield KernelSample(kernel["kernel"], model, 0, kernel["flops"], kernel["bytes"], kernel["time_s"])


def predicted_s(sample: KernelSample, hardware: Hardware, factors: Efficiency) -> float:
    """As `RooflineLatency` takes it."""
    if sample.kind == "gemm":
        padded = 1 + min(1.0, factors.saturation_tokens / sample.tokens)
        compute_s = padded * sample.flops / (factors.gemm * hardware.flops)
        read_s = sample.bytes / (factors.weight_bandwidth * hardware.memory_bytes_per_s)
        return max(compute_s, read_s) + factors.layer_s
    compute_s = sample.flops / (factors.attention * hardware.flops)
    if sample.kind == "prefill_attention":
        return compute_s + factors.layer_s
    return sample.bytes / (factors.kv_bandwidth * hardware.memory_bytes_per_s) + factors.layer_s


def errors(found: Sequence[KernelSample], hardware: Hardware, factors: Efficiency) -> list[float]:
    """Relative, one by one."""
    return [predicted_s(sample, hardware, factors) / sample.seconds - 1 for sample in found]


def fit(found: Sequence[KernelSample], hardware: Hardware) -> Efficiency:
    """Factors of one kind of kernel, the others as they were."""

    def loss(factors: Efficiency) -> float:
        return sum(abs(math.log1p(error)) for error in errors(found, hardware, factors)) / len(found)

    return search(replace(START, saturation_tokens=100.0), FACTORS[found[0].kind], loss)


def measured_factors(found: dict[str, list[KernelSample]]) -> dict[str, dict[str, float]]:
    """Factors by GPU, without the fixed costs, which are an engine's to tell."""
    factors: dict[str, dict[str, float]] = {}
    for name, everything in found.items():
        factors[name] = {}
        for kind, names in FACTORS.items():
            fitted = fit([sample for sample in everything if sample.kind == kind], hardware_named(name))
            factors[name] |= {factor: getattr(fitted, factor) for factor in names if factor != "layer_s"}
    return factors


def tables(found: dict[str, list[KernelSample]]) -> Iterator[str]:
    """Factors by GPU, then errors of each model by factors that were fitted on the others."""
    yield "| GPU | kernels | factors | samples | model left out: median | p90 | bias |\n" + "|---" * 7 + "|"
    for name, everything in found.items():
        hardware = hardware_named(name)
        for kind, names in FACTORS.items():
            of_kind = [sample for sample in everything if sample.kind == kind]
            factors = fit(of_kind, hardware)
            left_out: list[float] = []
            for model in sorted({sample.model for sample in of_kind}):
                others = fit([sample for sample in of_kind if sample.model != model], hardware)
                left_out += errors([s for s in of_kind if s.model == model], hardware, others)
            values = ", ".join(f"`{factor}` {getattr(factors, factor):.3g}" for factor in names)
            yield f"| {name} | {kind} | {values} | {len(of_kind)} | {residual_cells(left_out)} |"


def main(write: Callable[[str], None] = print) -> None:
    for line in tables(kernel_samples()):
        write(line)


if __name__ == "__main__":
    main()
