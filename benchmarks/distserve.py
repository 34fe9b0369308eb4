"""DistServe's chat experiments (OSDI'24, figure 8) in the simulator, beside what the paper found (Markdown;
docs/distserve.md has the tables and what differs):

    .venv/bin/python -m benchmarks.distserve
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

from benchmarks.distserve_engine import REQUESTS, Model, Placement, Trial, Twins
from benchmarks.latency_data import TRACES
from cluster.request import Slo
from deploy.goodput_search import find_goodput
from deploy.planner.deployment import Layout

TARGET = 0.9
TOLERANCE = 0.03
# Of one phase alone: enough to choose by.
PHASE_TOLERANCE = 0.1
# Seeds over which the attainment of short runs is averaged.
SHORT_RUNS = 5
# How much wider both bounds are in the second comparison, where the paper's baseline has a goodput, too.
WIDER = 1.5
# The least rate that is looked at, requests/s and GPU.
LOWEST_RPS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One column of the paper's figure 8.

    Attributes:
        bounds: the SLO in the versions of the paper.
        paper_split: (prefill, decode), table 3; paper_unsplit: vLLM's, section 6.1.
        wider: the next larger layout that the unsplit baseline could have had.
        scale_rps, short_requests: the rate per GPU at which the artifact's ae-scripts/e2e/_plot.py draws the
            SLO scale, and the requests per GPU that all its runs send.
        most_gpus: of a placement that is searched for.
        layouts: that are searched.
    """

    model: Model
    bounds: tuple[tuple[str, Slo], ...]
    paper_split: tuple[Layout, Layout]
    paper_unsplit: Layout
    wider: Layout
    scale_rps: float
    short_requests: int
    most_gpus: int
    layouts: tuple[Layout, ...]


EXPERIMENTS = (
    Experiment(
        model="opt-13b",
        bounds=(("v1", Slo(ttft_s=0.2, tpot_s=0.1)), ("OSDI", Slo(ttft_s=0.25, tpot_s=0.1))),
        paper_split=(Layout(2, 1), Layout(1, 1)),
        paper_unsplit=Layout(1, 1),
        wider=Layout(2, 1),
        scale_rps=1.5,
        short_requests=100,
        most_gpus=8,
        layouts=(Layout(1, 1), Layout(2, 1), Layout(4, 1), Layout(1, 2)),
    ),
    Experiment(
        model="opt-66b",
        bounds=(("v1", Slo(ttft_s=0.4, tpot_s=0.1)), ("OSDI", Slo(ttft_s=2.5, tpot_s=0.15))),
        paper_split=(Layout(4, 1), Layout(2, 2)),
        paper_unsplit=Layout(4, 1),
        wider=Layout(8, 1),
        scale_rps=0.25,
        short_requests=25,
        most_gpus=16,
        layouts=(Layout(2, 1), Layout(4, 1), Layout(8, 1), Layout(2, 2)),
    ),
)

Search = Callable[[Placement, Slo], float]


def goodput_rps(runs: Sequence[Twins], placement: Placement, slo: Slo, tolerance: float = TOLERANCE) -> float:
    """Requests/s and GPU; 0 where less than 90 % meet both bounds at any rate. Averaged over the runs."""
    gpus = placement.gpus
    found = find_goodput(
        lambda rate_rps: fmean(twins.run(placement, rate_rps).attainment(slo) for twins in runs),
        target=TARGET,
        start_rps=1.0 * gpus,
        tolerance=tolerance,
        lowest_rps=LOWEST_RPS * gpus,
    )
    return found.rate_rps / gpus


def balanced(
    prefill_rps: float, decode_rps: float, prefill_gpus: int, decode_gpus: int, most: int
) -> tuple[int, int]:
    """Instances of each phase, on at most `most` GPUs in all, for the most requests/s and GPU where one
    instance serves so many requests/s; the fewest GPUs of equal ones."""
    counts = [
        (n, m)
        for n in range(1, most // prefill_gpus + 1)
        for m in range(1, (most - n * prefill_gpus) // decode_gpus + 1)
    ]

    def rank(count: tuple[int, int]) -> tuple[float, int]:
        gpus = count[0] * prefill_gpus + count[1] * decode_gpus
        return min(count[0] * prefill_rps, count[1] * decode_rps) / gpus, -gpus

    return max(counts, key=rank)


def phase_goodputs(
    search: Search, case: Experiment, slo: Slo
) -> tuple[dict[Layout, float], dict[Layout, float]]:
    """Requests/s and GPU of prefill alone within the TTFT, and of decode alone within the TPOT, by layout:
    the inner loop of the paper's algorithm 1."""
    prefill = Slo(ttft_s=slo.ttft_s, tpot_s=math.inf)
    decode = Slo(ttft_s=math.inf, tpot_s=slo.tpot_s)
    return (
        {layout: search(Placement.prefill_alone(case.model, layout), prefill) for layout in case.layouts},
        {layout: search(Placement.decode_alone(case.model, layout), decode) for layout in case.layouts},
    )


def splits(search: Search, case: Experiment, slo: Slo) -> tuple[Placement, Placement, list[str]]:
    """The paper's layouts with balanced counts, the best layouts with balanced counts, and a table row for
    each layout."""
    prefill, decode = phase_goodputs(search, case, slo)
    best = max(prefill, key=lambda p: prefill[p]), max(decode, key=lambda d: decode[d])

    def placed(p: Layout, d: Layout) -> Placement:
        n, m = balanced(p.gpus * prefill[p], d.gpus * decode[d], p.gpus, d.gpus, case.most_gpus)
        return Placement.split(case.model, p, d, n, m)

    rows = [f"| {layout} | {rps(prefill[layout])} | {rps(decode[layout])} |" for layout in case.layouts]
    return placed(*case.paper_split), placed(*best), rows


def unsplits(case: Experiment) -> Iterator[tuple[str, Placement]]:
    """The baselines: the paper's first."""
    gpus = sum(layout.gpus for layout in case.paper_split)

    def on(layout: Layout) -> int:
        return max(1, gpus // layout.gpus)

    plain, wide = case.paper_unsplit, case.wider
    make = partial(Placement.unsplit, case.model)
    yield "vLLM, its profile", make("vllm", plain, on(plain), "separate")
    yield f"vLLM, its profile, {wide}", make("vllm", wide, on(wide), "separate")
    yield "DistServe's profile, prompts alone", make("distserve", plain, on(plain), "separate")
    yield "DistServe's profile, prompts alone, " + str(wide), make("distserve", wide, on(wide), "separate")
    yield "DistServe's profile, prompts among decodes", make("distserve", plain, on(plain), "whole")
    yield "DistServe's profile, chunks of 512", make("distserve", plain, on(plain), "chunked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One placement under one SLO.

    Attributes:
        idle: share that met both bounds with next to no load.
        goodput: requests/s and GPU, 0 for none; wider: with both bounds `WIDER` times as large.
        slo_scale: factor on both bounds with which 90 % meet them at the artifact's rate.
    """

    name: str
    placement: Placement
    idle: float
    goodput: float
    wider: float
    slo_scale: float

    @property
    def is_split(self) -> bool:
        return self.placement.kind == "split"


def measure(twins: Twins, case: Experiment, slo: Slo, name: str, placement: Placement) -> Row:
    wider = Slo(ttft_s=WIDER * slo.ttft_s, tpot_s=WIDER * slo.tpot_s)
    return Row(
        name=name,
        placement=placement,
        idle=twins.run(placement, LOWEST_RPS * placement.gpus).attainment(slo),
        goodput=goodput_rps([twins], placement, slo),
        wider=goodput_rps([twins], placement, wider),
        slo_scale=twins.run(placement, case.scale_rps * placement.gpus).slo_scale(slo, TARGET),
    )


def rps(value: float) -> str:
    return f"{value:.2f}" if value else "none"


def ratio(value: float, by: float) -> str:
    return f"{value / by:.2f}" if by else "-"


def table(case: Experiment, rows: Sequence[Row]) -> Iterator[str]:
    """Gains are of the first row, the paper's split, over each other."""
    yield (
        f"| what | instances | met when idle | goodput, req/s/GPU | gain | with {WIDER:g} x SLO "
        f"| gain | SLO scale at {case.scale_rps:g} req/s/GPU | tighter by |"
    )
    yield "|" + "---|" * 9
    first = rows[0]
    for row in rows:
        yield (
            f"| {row.name} | {row.placement} | {100 * row.idle:.0f} % "
            f"| {rps(row.goodput)} | {ratio(first.goodput, row.goodput)} "
            f"| {rps(row.wider)} | {ratio(first.wider, row.wider)} "
            f"| {row.slo_scale:.2f} | {ratio(row.slo_scale, first.slo_scale)} |"
        )


def summary(rows: Sequence[Row]) -> str:
    """The best split against the best unsplit placement of each engine: goodput, then the SLO scale."""
    split = [row for row in rows if row.is_split]
    goodput = max(row.goodput for row in split)
    scale = min(row.slo_scale for row in split)
    cells = [rps(goodput)]
    for engine in ("vllm", "distserve"):
        others = [row for row in rows if not row.is_split and row.placement.engine == engine]
        best = max(row.goodput for row in others)
        cells += [rps(best), ratio(goodput, best), ratio(min(row.slo_scale for row in others), scale)]
    return " | ".join(cells)


def short_rows(folder: Path, case: Experiment, slo: Slo) -> Iterator[str]:
    """The goodputs of runs as short as the artifact's, each with as many requests per GPU."""
    plain, split = case.paper_unsplit, Placement.split(case.model, *case.paper_split, 1, 1)
    first = 0.0
    for name, placement in (
        ("split, as the paper's", split),
        ("vLLM, its profile", Placement.unsplit(case.model, "vllm", plain, 1, "separate")),
        (
            "DistServe's profile, prompts alone",
            Placement.unsplit(case.model, "distserve", plain, 1, "separate"),
        ),
    ):
        requests = case.short_requests * placement.gpus
        runs = [Twins(folder, TRACES, Trial(requests, seed)) for seed in range(SHORT_RUNS)]
        found = goodput_rps(runs, placement, slo)
        first = first or found
        yield f"| {name} | {placement} | {requests} | {rps(found)} | {ratio(first, found)} |"


def report(twins: Twins, folder: Path) -> Iterator[str]:
    search = partial(goodput_rps, [twins], tolerance=PHASE_TOLERANCE)
    summaries = []
    for case in EXPERIMENTS:
        for version, slo in case.bounds:
            began_s = time.process_time()
            balanced_paper, best, layouts = splits(search, case, slo)
            paper = Placement.split(case.model, *case.paper_split, 1, 1)
            named = {
                "split, as the paper's": paper,
                "... one prompt at a time": replace(paper, prompts_at_once=1),
                "split, the paper's layouts": balanced_paper,
                "split, best of algorithm 1": best,
                **dict(unsplits(case)),
            }
            seen: dict[Placement, str] = {}
            for name, placement in named.items():
                seen.setdefault(placement, name)
            rows = [measure(twins, case, slo, name, placement) for placement, name in seen.items()]
            title = f"{case.model.upper()}, {version}: TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s"
            summaries.append(f"| {title} | {summary(rows)} |")
            yield f"### {title}\n"
            yield from table(case, rows)
            yield "\n| layout | prefill alone, req/s/GPU | decode alone, req/s/GPU |\n|---|---|---|"
            yield from layouts
            yield f"\n| {SHORT_RUNS} short runs | instances | requests | goodput, req/s/GPU | gain |"
            yield "|---|---|---|---|---|"
            yield from short_rows(folder, case, slo)
            yield f"\n({time.process_time() - began_s:.0f} s of CPU time)\n"
    yield "### Best placement of each\n"
    yield (
        "| | split | unsplit, vLLM's profile | gain | tighter by | unsplit, DistServe's profile | gain "
        "| tighter by |\n|---|---|---|---|---|---|---|---|"
    )
    yield from summaries


def main() -> None:
    if not TRACES.is_dir():
        sys.exit(f"{TRACES.name}: the shared traces are needed beside the checkout")
    with tempfile.TemporaryDirectory() as folder:
        twins = Twins(Path(folder), TRACES, Trial(requests=REQUESTS, seed=0))
        for line in report(twins, Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
