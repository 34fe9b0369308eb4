"""What the planner chooses in DistServe's setting (OSDI'24, figure 8), beside the paper's (Markdown):

python -m benchmarks.planner_distserve [--jobs 2]

OPT-13B and OPT-66B on A100-80GB with the authors' published iteration times, ShareGPT's lengths, Poisson.
Needs the shared traces. The policy is pdserve's own, with admission; `benchmarks.distserve` has the paper's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.distserve import EXPERIMENTS, Experiment
from benchmarks.distserve_engine import with_overheads
from benchmarks.latency_data import TRACES
from cluster.hardware import hardware_named
from cluster.model_shape import named_shape
from cluster.request import Slo
from deploy.planner.deployment import Deployment, Layout
from deploy.planner.goal import Goal
from deploy.planner.search import plan
from deploy.planner.trial import goodput
from deploy.profiler.published import distserve_profile
from deploy.slo_classes import SloClass
from deploy.workload_grammar import make_workload

LENGTHS = TRACES / "sharegpt" / "distserve_sharegpt_opt_lengths.csv.gz"
# OPT's positions.
LONGEST = 2048
GPUS = {"opt-13b": 8, "opt-66b": 16}


def goal_of(case: Experiment, slo: Slo, engine: str, folder: Path) -> Goal:
    """With the times that were published for an engine."""
    files: dict[Layout, str] = {}
    for layout in {*case.layouts, *case.paper_split}:
        path = folder / f"{case.model}-{engine}-{layout.tensor}-{layout.pipeline}.json"
        source = TRACES / "distserve" / f"profiler-a100-80g.{engine}.json"
        measured = distserve_profile(source, case.model, layout.tensor)
        with_overheads(measured, layout.pipeline).save(path)
        files[layout] = str(path)
    return Goal(
        model=case.model,
        shape=named_shape(case.model),
        hardware=hardware_named("a100"),
        profiles=files,
        gpus=GPUS[case.model],
        requests=make_workload(f"poisson:rate=1,count=4000,lengths={LENGTHS}", 0),
        classes=(SloClass(name="all", slo=slo, share=1.0),),
        max_model_len=LONGEST,
        pipeline=True,
    )


def rows(case: Experiment, jobs: int, folder: Path) -> Iterator[str]:
    """Of both versions of the bounds."""
    prefill, decode = case.paper_split
    paper = Deployment(prefill=prefill, prefill_count=1, decode=decode, decode_count=1)
    for version, slo in case.bounds:
        goal = goal_of(case, slo, "distserve", folder)
        made = plan(goal, jobs=jobs, must_hold=False)
        published = goodput(goal, paper, 0, made.chosen.per_gpu_rps * paper.gpus).per_gpu_rps
        vllm = plan(goal_of(case, slo, "vllm", folder), jobs=jobs, must_hold=False).best_unsplit
        best, unsplit = made.best_split, made.best_unsplit
        assert best is not None
        cells = [f"{case.model}, {version}", f"{best.deployment}", f"{best.per_gpu_rps:.3g}"]
        cells += [f"{paper}: {published:.3g}"]
        for other in (unsplit, vllm):
            if other is None or not other.goodput_rps:
                cells += ["none", "-"]
            else:
                gain = best.per_gpu_rps / other.per_gpu_rps
                cells += [f"{other.deployment}: {other.per_gpu_rps:.3g}", f"{gain:.2f}"]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    print(
        "| | planned split | req/s and GPU | the paper's placement | unsplit, same times | gain | "
        "unsplit, vLLM's times | gain |\n|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for case in EXPERIMENTS:
            for row in rows(case, args.jobs, Path(folder)):
                print(row, flush=True)


if __name__ == "__main__":
    main()
