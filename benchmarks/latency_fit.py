"""Fits the roofline's factors and the profiles to published measurements, and prints the errors on what was
held out (Markdown; docs/latency.md has the tables):

    .venv/bin/python -m benchmarks.latency_fit
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from random import Random
from statistics import median
from typing import Any

from benchmarks.factor_search import START, Loss, percent, residual_cells, search
from benchmarks.kernel_factors import kernel_samples, measured_factors
from benchmarks.latency_data import (
    TRACES,
    AllReduce,
    Case,
    all_reduces,
    distserve_cases,
    layer_cases,
    splitwise_case,
)
from cluster.latency import ProfiledLatency
from cluster.latency_fit import summarise
from cluster.roofline import Efficiency, RooflineLatency
from deploy.profiler.published import SplitwiseKey, SplitwiseRow, fit_splitwise, splitwise_rows

SEED = 0
SPLITS = 20  # seeds that the split's own luck is told from
TARGETS = (0.10, 0.08)  # of prompt and token time
FITTED_PART = 0.7

_KERNEL = ("gemm", "saturation_tokens", "weight_bandwidth", "elementwise_bandwidth", "layer_s")
# Decode attention isn't among Vidur's operators, nor are a100's small all-reduces: the engine's fit has both.
_ENGINE = ("kv_bandwidth", "iteration_s", "request_s", "layer_s", "link_s_per_gpu")
_OLD_ENGINE = ("gemm", "attention", "kv_bandwidth", "launch_s", "iteration_s", "request_s")
_LINK = ("link_bandwidth", "link_s", "link_s_per_gpu")


def case_loss(cases: Sequence[Case], *, layer: bool = False) -> Loss:
    """Mean absolute logarithm of predicted to measured time; every case weighs the same."""
    return lambda factors: (
        sum(
            sum(abs(math.log1p(error)) for error in errors(case, factors, layer=layer)) / len(case.samples)
            for case in cases
        )
        / len(cases)
    )


def errors(case: Case, factors: Efficiency, *, layer: bool = False) -> list[float]:
    """Relative errors; `layer` compares with the linear layers alone."""
    model = RooflineLatency(case.shape, case.hardware, case.ranks, efficiency=factors)
    if layer:
        return [model.linear_s(batch.prefill_tokens) / seconds - 1 for batch, seconds in case.samples]
    return [model.iteration_s(batch) / seconds - 1 for batch, seconds in case.samples]


def phase_errors(case: Case, factors: Efficiency, *, prefill: bool) -> list[float]:
    """Relative errors of one phase's iterations."""
    samples = tuple(s for s in case.samples if bool(s[0].prefill_tokens) == prefill)
    return errors(replace(case, samples=samples), factors)


def all_reduce_s(point: AllReduce, factors: Efficiency) -> float:
    """As `RooflineLatency` takes it: a latency, and a ring's bytes over the link."""
    sent = 2 * (point.ranks - 1) / point.ranks * point.size_bytes
    rate = point.hardware.link_bytes_per_s * factors.link_bandwidth
    return factors.link_s + factors.link_s_per_gpu * point.ranks + sent / rate


def fit_links(points: Sequence[AllReduce], start: Efficiency, names: Sequence[str] = _LINK) -> Efficiency:
    """The links' factors, the others as in `start`."""

    def loss(factors: Efficiency) -> float:
        return sum(abs(math.log(all_reduce_s(p, factors) / p.seconds)) for p in points) / len(points)

    return search(start, names, loss)


def kernel_fits() -> dict[str, Efficiency]:
    """Factors of kernels and links, fitted on everything there is: by hardware."""
    points = list(all_reduces())
    h100 = fit_links([p for p in points if p.source == "apex" and p.hardware.name.startswith("h100")], START)
    # Vidur's small ones on A100 are 60 us from 4 GPUs on, whatever their size: the host's time, not NCCL's.
    large = [p for p in points if p.hardware.name.startswith("a100") and p.size_bytes >= 4 * 2**20]
    a100 = fit_links(large, h100, ("link_bandwidth",))
    return {
        name: search(links, _KERNEL, case_loss([case for _, case in layer_cases(name)], layer=True))
        for name, links in (("a100", a100), ("h100", h100))
    }


def split(rows: Sequence[SplitwiseRow], seed: int = SEED) -> tuple[list[SplitwiseRow], list[SplitwiseRow]]:
    """(to fit, held out): by configuration, so that a repetition never helps to predict another."""
    configurations = sorted({row[:3] for row in rows})
    Random(seed).shuffle(configurations)
    fitted = set(configurations[: round(FITTED_PART * len(configurations))])
    return [row for row in rows if row[:3] in fitted], [row for row in rows if row[:3] not in fitted]


def splitwise_groups() -> dict[SplitwiseKey, list[SplitwiseRow]]:
    """Splitwise's rows, without the hardware that wasn't measured."""
    found = splitwise_rows(TRACES / "splitwise" / "perf_model.csv")
    return {key: rows for key, rows in found.items() if not key.hardware.endswith("pcap")}


def profile_errors(
    key: SplitwiseKey, fitted: Sequence[SplitwiseRow], held: Iterable[SplitwiseRow]
) -> tuple[list[float], list[float]]:
    """Relative errors on held-out (prompts, tokens) of a profile of the fitted rows."""
    model = ProfiledLatency(fit_splitwise(key, fitted))
    prefill: list[float] = []
    decode: list[float] = []
    for row in held:
        for found, (batch, seconds) in ((prefill, row.prefill()), (decode, row.decode())):
            found.append(model.iteration_s(batch) / seconds - 1)
    return prefill, decode


def profile_table() -> Iterator[str]:
    """Held out: seed 0, then over all seeds the median, the worst, and how many met the target. Size: each
    (prompt, batch) left out in turn, with all its repetitions. Largest: only the largest left out."""
    columns = "held out | 20 splits: median | worst | met | each size | largest"
    yield f"| model, GPU | prompt: {columns} | token: {columns} |"
    yield "|" + "---|" * 13
    for key, rows in splitwise_groups().items():
        sizes = sorted({row[:2] for row in rows}, key=lambda size: size[0] * size[1])
        held = profile_errors(key, *split(rows))
        left_out = [
            profile_errors(key, [r for r in rows if r[:2] != size], [r for r in rows if r[:2] == size])
            for size in sizes
        ]
        seeds = [profile_errors(key, *split(rows, seed)) for seed in range(SPLITS)]
        medians = [[median(map(abs, found[phase])) for found in seeds] for phase in (0, 1)]
        cells = [
            cell
            for phase in (0, 1)
            for cell in (
                percent(held[phase]),
                percent(medians[phase]),
                f"{100 * max(medians[phase]):.1f} %",
                str(sum(error < TARGETS[phase] for error in medians[phase])),
                percent([median(map(abs, found[phase])) for found in left_out]),
                percent(left_out[-1][phase]),
            )
        ]
        name = f"{key.model}, {key.tensor_parallel_size} x {key.hardware}"
        yield f"| {name} | {' | '.join(cells)} |"


def kernel_table(fits: dict[str, Efficiency]) -> Iterator[str]:
    """Vidur's layers: each model predicted by factors that were fitted on the others."""
    yield "| model left out | A100: median | p90 | bias | H100: median | p90 | bias |"
    yield "|---|---|---|---|---|---|---|"
    rows: dict[str, list[str]] = defaultdict(list)
    for hardware, start in fits.items():
        cases = list(layer_cases(hardware))
        for model in sorted({name for name, _ in cases}):
            others = [case for name, case in cases if name != model]
            factors = search(start, _KERNEL, case_loss(others, layer=True))
            found = [e for name, case in cases if name == model for e in errors(case, factors, layer=True)]
            rows[model].append(residual_cells(found))
    for model, cells in rows.items():
        yield f"| {model} | {' | '.join(cells + ['- | - | -'] * (2 - len(cells)))} |"


def link_table(fits: dict[str, Efficiency]) -> Iterator[str]:
    yield "| source | GPU | ranks | up to 256 KiB: median | above: median | p90 |"
    yield "|---|---|---|---|---|---|"
    found: dict[tuple[str, str, int], list[AllReduce]] = defaultdict(list)
    for point in all_reduces():
        found[point.source, point.hardware.name, point.ranks].append(point)
    for (source, hardware, ranks), points in sorted(found.items()):
        factors = fits["a100" if hardware.startswith("a100") else "h100"]
        parts: tuple[list[float], list[float]] = ([], [])
        for point in points:
            error = all_reduce_s(point, factors) / point.seconds - 1
            parts[point.size_bytes > 2**18].append(error)
        small, large = parts
        p90 = summarise(large).p90
        yield f"| {source} | {hardware} | {ranks} | {percent(small)} | {percent(large)} | {100 * p90:.0f} % |"


def distserve_table(start: Efficiency) -> Iterator[str]:
    """DistServe's engine: each model predicted by factors that were fitted on the other."""
    yield "| OPT on A100 | prefill: median | p90 | bias | decode: median | p90 | bias |"
    yield "|---|---|---|---|---|---|---|"
    cases = list(distserve_cases())
    for model in dict.fromkeys(name for name, _ in cases):
        factors = search(start, _ENGINE, case_loss([case for name, case in cases if name != model]))
        for name, case in cases:
            if name == model:
                cells = [residual_cells(phase_errors(case, factors, prefill=p)) for p in (True, False)]
                yield f"| {case.name} | {' | '.join(cells)} |"


def splitwise_table(kernels: dict[str, Efficiency]) -> Iterator[str]:
    """Splitwise's engine by the roofline: one set of factors for all models and layouts of a GPU."""
    yield "| model, GPU | prompt: median | p90 | bias | token: median | p90 | bias |"
    yield "|---|---|---|---|---|---|---|"
    groups = splitwise_groups()
    for hardware, start in kernels.items():
        chosen = {key: split(rows) for key, rows in groups.items() if key.hardware.startswith(hardware)}
        factors = fit_old_engine(start, [splitwise_case(key, fitted) for key, (fitted, _) in chosen.items()])
        for key, (_, held) in chosen.items():
            case = splitwise_case(key, held)
            cells = [residual_cells(phase_errors(case, factors, prefill=p)) for p in (True, False)]
            yield f"| {case.name} x {key.hardware} | {' | '.join(cells)} |"


def fit_old_engine(start: Efficiency, cases: Sequence[Case]) -> Efficiency:
    """Factors of an engine that starts every kernel from Python, without CUDA graphs."""
    return search(replace(start, launch_s=200e-6), _OLD_ENGINE, case_loss(cases))


def factor_sets(kernels: dict[str, Efficiency]) -> dict[str, Efficiency]:
    """What `cluster.roofline` ships: fitted on everything, nothing held out."""
    distserve = search(kernels["a100"], _ENGINE, case_loss([case for _, case in distserve_cases()]))
    # No engine was measured on H100 without the host in the way: what A100's adds to its kernels is added.
    h100 = replace(
        kernels["h100"],
        kv_bandwidth=distserve.kv_bandwidth,
        iteration_s=distserve.iteration_s,
        request_s=distserve.request_s,
        layer_s=kernels["h100"].layer_s + distserve.layer_s - kernels["a100"].layer_s,
    )
    ours: dict[str, dict[str, Any]] = {
        name.partition("-")[0]: factors for name, factors in measured_factors(kernel_samples()).items()
    }
    h100 = replace(h100, attention=ours["h100"]["attention"], kv_bandwidth=ours["h100"]["kv_bandwidth"])
    links = fit_links([p for p in all_reduces() if p.hardware.name.startswith("h200")], h100)
    sets = {"a100": distserve, "h100": h100, "h200": replace(links, **ours["h200"])}
    for name, factors in kernels.items():
        groups = splitwise_groups().items()
        cases = [splitwise_case(key, rows) for key, rows in groups if key.hardware.startswith(name)]
        sets[f"splitwise-{name}"] = fit_old_engine(factors, cases)
    return sets


def factor_table(sets: dict[str, Efficiency]) -> Iterator[str]:
    names = [field.name for field in fields(Efficiency) if field.name != "source"]
    yield f"| factor | {' | '.join(sets)} |"
    yield "|---|" + "---|" * len(sets)
    for name in names:
        yield f"| `{name}` | {' | '.join(f'{getattr(factors, name):.3g}' for factors in sets.values())} |"


def main() -> None:
    kernels = kernel_fits()
    sets = factor_sets(kernels)
    for title, lines in (
        ("Profiles of Splitwise's measurements: median errors", profile_table()),
        ("Factors of the roofline", factor_table(sets)),
        ("Linear layers: median errors on a model that the fit has not seen", kernel_table(kernels)),
        ("All-reduces", link_table(kernels)),
        ("DistServe's engine, by factors from the other model", distserve_table(kernels["a100"])),
        ("Splitwise's engine by the roofline, held out", splitwise_table(kernels)),
    ):
        print(f"### {title}\n")
        print("\n".join(lines), "\n", flush=True)


if __name__ == "__main__":
    main()
