"""Published measurements of kernels and collectives (../shared/traces), as cases for the roofline."""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cluster.hardware import Hardware, hardware_named
from cluster.latency import Batch
from cluster.latency_fit import Sample
from cluster.model_shape import ModelShape, named_shape
from deploy.profiler.published import SplitwiseKey, SplitwiseRow, distserve_profile

TRACES = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"

# Vidur's tokens go by 8 and by 64: this many of them say it all, and a fit takes seconds.
_TOKENS = (
    1,
    2,
    4,
    8,
    16,
    32,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
    8192,
    16384,
)
_GEMMS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
# How often a layer runs each; Vidur times one.
_ELEMENTWISE = {"input_layernorm": 1, "post_attention_layernorm": 1, "attn_rope": 1, "mlp_act": 1, "add": 2}
_SPLITWISE_SHAPES = {"llama2-70b": "llama-2-70b", "bloom-176b": "bloom-176b"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Measurements of one model on one kind of GPU, laid out over `ranks`."""

    name: str
    shape: ModelShape
    hardware: Hardware
    ranks: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduce:
    """One all-reduce inside a node: bytes of one rank's operand."""

    source: str
    hardware: Hardware
    ranks: int
    size_bytes: int
    seconds: float


def layer_cases(hardware: str) -> Iterator[tuple[str, Case]]:
    """(model, case) of Vidur's operator times: the linear layers and elementwise kernels of ONE layer."""
    gpu = hardware_named(hardware)
    for path in sorted((TRACES / "vidur").glob(f"profiling__compute__{hardware}__*__mlp.csv.gz")):
        model = path.name.split("__")[4]
        times: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        with gzip.open(path, "rt") as lines:
            for row in csv.DictReader(lines):
                tokens = int(row["num_tokens"])
                if tokens in _TOKENS:
                    ranks = int(row["num_tensor_parallel_workers"])
                    times[ranks][tokens].append(_layer_ms(row) / 1e3)
                last = row
        for ranks, by_tokens in sorted(times.items()):
            samples = tuple((Batch(prefill_tokens=t), median(ms)) for t, ms in sorted(by_tokens.items()))
            yield (
                model,
                Case(
                    name=f"{model} TP{ranks}",
                    shape=_one_layer(model, last),
                    hardware=gpu,
                    ranks=ranks,
                    samples=samples,
                ),
            )


def all_reduces() -> Iterator[AllReduce]:
    """APEX' NCCL tests on H100 and H200, Vidur's on A100 and H100."""
    for name, hardware in (("H100-SXM-80GB", "h100"), ("H200-SXM-141GB", "h200")):
        with (TRACES / "apex" / "profile_comm" / f"{name}__all_reduce.csv").open(encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if int(row["num_nodes"]) == 1 and int(row["size(kb)"]):
                    yield AllReduce(
                        source="apex",
                        hardware=hardware_named(hardware),
                        ranks=int(row["num_gpus_per_node"]),
                        size_bytes=int(row["size(kb)"]) * 1024,
                        seconds=float(row["time(us)"]) / 1e6,
                    )
    for hardware in ("a100", "h100"):
        path = TRACES / "vidur" / f"profiling__network__{hardware}_dgx__all_reduce.csv.gz"
        times: dict[tuple[int, int], list[float]] = defaultdict(list)
        with gzip.open(path, "rt") as lines:
            for row in csv.DictReader(lines):
                if row["num_workers"] == row["devices_per_node"]:
                    key = int(row["num_workers"]), int(row["size"])
                    times[key].append(float(row["time_stats.all_reduce.median"]) / 1e3)
        for (ranks, size), seconds in times.items():
            yield AllReduce(
                source="vidur",
                hardware=hardware_named(hardware),
                ranks=ranks,
                size_bytes=size,
                seconds=median(seconds),
            )


def distserve_cases() -> Iterator[tuple[str, Case]]:
    """(model, case) of DistServe's own engine on A100: its fits, at points of the grid they were made on."""
    path = TRACES / "distserve" / "profiler-a100-80g.distserve.json"
    for model, sizes in (("opt-13b", (1, 2, 4)), ("opt-66b", (2, 3, 4, 8))):
        for ranks in sizes:
            profile = distserve_profile(path, model, ranks)
            prefill, (small, large) = profile.prefill[0], profile.decode
            samples = []
            for prompt in (128, 256, 512, 1024, 1536, 2020):
                for requests in (1, 2, 4):
                    if requests * prompt <= 4096:
                        batch = Batch(requests * prompt, requests * prompt**2, requests)
                        seconds = prefill.base_s + prefill.token_s * batch.prefill_tokens
                        samples.append((batch, seconds + prefill.attention_s * batch.prefill_attention))
            for requests in (1, 4, 16, 64, 128):
                for context in (128, 512, 1024):
                    if requests * context <= min(40_000, profile.region["decode_context_tokens"]):
                        batch = Batch(decode_requests=requests, decode_context_tokens=requests * context)
                        cost = small if requests <= (small.up_to_requests or 0) else large
                        seconds = cost.base_s + cost.request_s * requests
                        samples.append((batch, seconds + cost.context_s * requests * context))
            case = Case(
                name=f"{model} TP{ranks}",
                shape=named_shape(model),
                hardware=hardware_named("a100"),
                ranks=ranks,
                samples=tuple(samples),
            )
            yield model, case


def splitwise_case(key: SplitwiseKey, rows: list[SplitwiseRow]) -> Case:
    """Both phases of Splitwise's measurements."""
    return Case(
        name=f"{key.model} TP{key.tensor_parallel_size}",
        shape=named_shape(_SPLITWISE_SHAPES[key.model]),
        hardware=hardware_named(key.hardware),
        ranks=key.tensor_parallel_size,
        samples=tuple(sample for row in rows for sample in (row.prefill(), row.decode())),
    )


def _layer_ms(row: dict[str, str]) -> float:
    """phi-2 has one norm for both halves of its layer, and an empty cell."""
    gemms = sum(float(row[f"time_stats.{name}.median"]) for name in _GEMMS)
    return gemms + sum(
        count * float(row.get(f"time_stats.{name}.median") or 0) for name, count in _ELEMENTWISE.items()
    )


def _one_layer(model: str, row: dict[str, str]) -> ModelShape:
    heads, hidden = int(row["n_head"]), int(row["n_embd"])
    return ModelShape(
        name=model,
        layers=1,
        hidden=hidden,
        heads=heads,
        kv_heads=int(row["n_kv_head"]),
        head_dim=hidden // heads,
        ffn=int(row["n_expanded_embd"]),
        vocab=int(row["vocab_size"]),
        max_positions=4096,
        gated_mlp=row["use_gated_mlp"] == "True",
    )
