"""The planner against every candidate there is, on random small clusters (Markdown):

python -m benchmarks.planner_optimality                 # 50 cases, about an hour of CPU time
python -m benchmarks.planner_optimality --cases 10 --jobs 2

A case is a model, two to four GPUs, a workload and bounds, all drawn; each candidate's goodput is looked for
on its own. A case in which nothing keeps the bounds is drawn again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean

from cluster.hardware import hardware_named
from cluster.model_shape import named_shape
from cluster.request import Slo
from deploy.planner.capacity import Capacity
from deploy.planner.deployment import Deployment, Layout
from deploy.planner.goal import Goal, Infeasible
from deploy.planner.search import plan
from deploy.planner.trial import goodput
from deploy.slo_classes import SloClass
from deploy.workload_grammar import make_workload

AIM = 0.98
MODELS = {"llama-3-8b": ("h100", "a100", "l40s"), "opt-13b": ("h100", "a100"), "qwen3-32b": ("h100", "h200")}
LONGEST = 16_384
SIGMA = 0.8
# Prompts and answers of chat, of code, of summaries, of reasoning; mean tokens.
LENGTHS = ((500, 150), (2000, 30), (4000, 200), (200, 600))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What came of one; goodputs in requests/s and GPU, of the same part of the workload."""

    about: str
    planned: Deployment
    planned_rps: float
    best: Deployment
    best_rps: float
    candidates: int
    simulated: int
    plan_s: float

    @property
    def share(self) -> float:
        return self.planned_rps / self.best_rps


def spread(random: Random, mean: int, most: int) -> int:
    """A length, log-normal as those of real traces are."""
    return max(1, min(most, round(mean * random.lognormvariate(-(SIGMA**2) / 2, SIGMA))))


def goal_of(seed: int) -> Goal:
    """A case, drawn."""
    random = Random(f"{seed}/planner")
    model = random.choice(list(MODELS))
    gpu = random.choice(MODELS[model])
    prompt, answer = random.choice(LENGTHS)
    cv = random.choice((1.0, 1.0, 2.0))
    requests = make_workload(f"gamma:rate=1,count=4000,cv={cv:g},input={prompt},output={answer}", seed)
    return Goal(
        model=model,
        shape=named_shape(model),
        hardware=hardware_named(gpu),
        gpus=random.randint(2, 4),
        requests=[
            replace(
                request,
                input_tokens=spread(random, prompt, LONGEST // 2),
                output_tokens=spread(random, answer, LONGEST // 2),
            )
            for request in requests
        ],
        classes=(
            SloClass(
                name="all",
                slo=Slo(ttft_s=random.choice((0.3, 0.6, 1.5)), tpot_s=random.choice((0.03, 0.05, 0.1))),
                share=1.0,
            ),
        ),
        seeds=1,
        max_model_len=LONGEST,
    )


def candidates(layouts: tuple[Layout, ...], gpus: int) -> Iterator[Deployment]:
    """All that fit, of any number of GPUs."""
    for decode in layouts:
        for decodes in range(1, gpus // decode.gpus + 1):
            yield Deployment(prefill=None, prefill_count=0, decode=decode, decode_count=decodes)
            left = gpus - decodes * decode.gpus
            for prefill in layouts:
                for prefills in range(1, left // prefill.gpus + 1):
                    yield Deployment(
                        prefill=prefill, prefill_count=prefills, decode=decode, decode_count=decodes
                    )


def run(seed: int) -> Case | None:
    """None where nothing keeps the bounds."""
    goal = goal_of(seed)
    began_s = time.perf_counter()
    try:
        made = plan(goal, must_hold=False)
    except Infeasible:
        return None
    plan_s = time.perf_counter() - began_s
    capacity = Capacity(goal)
    start_rps = made.chosen.per_gpu_rps
    found = {
        one: goodput(goal, one, 0, start_rps * one.gpus).per_gpu_rps
        for one in candidates(capacity.layouts(), goal.gpus)
    }
    best = max(found, key=lambda one: found[one])
    slo = goal.classes[0].slo
    assert goal.hardware is not None
    return Case(
        about=f"{goal.model}, {goal.gpus} {goal.hardware.name}, {goal.describe_workload()}; "
        f"{slo.ttft_s * 1e3:g}, {slo.tpot_s * 1e3:g} ms",
        planned=made.chosen.deployment,
        planned_rps=found[made.chosen.deployment],
        best=best,
        best_rps=found[best],
        candidates=len(found),
        simulated=1 + len(made.others),
        plan_s=plan_s,
    )


def main() -> None:
    """Print the table and its summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    print("| case | planned | best | of the best | candidates, simulated | plan |\n|---|---|---|---|---|---|")
    cases: list[Case] = []
    seeds = range(args.first, args.first + 3 * args.cases)
    with ProcessPoolExecutor(args.jobs) as pool:
        for case in pool.map(run, seeds):
            if case is None or len(cases) == args.cases:
                continue
            cases.append(case)
            print(
                f"| {case.about} | {case.planned} | {case.best} | {case.share:.3f} | "
                f"{case.candidates}, {case.simulated} | {case.plan_s:.0f} s |",
                flush=True,
            )
            if len(cases) == args.cases:
                pool.shutdown(cancel_futures=True)
                break
    shares = sorted(case.share for case in cases)
    within = sum(share >= AIM for share in shares)
    print(
        f"\n{within} of {len(shares)} within {1 - AIM:.0%} of the best; mean {fmean(shares):.3f}, "
        f"lowest {', '.join(f'{share:.3f}' for share in shares[:5])}; "
        f"the plan simulated {fmean(one.simulated / one.candidates for one in cases):.0%} of the candidates"
    )


if __name__ == "__main__":
    main()
