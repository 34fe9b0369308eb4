"""How long planning takes (Markdown), with Azure 2023's conversations:

python -m benchmarks.planner_speed [--jobs 2] [--nodes 2 4 8 16 32]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from benchmarks.policies import CONVERSATION
from cluster.hardware import hardware_named
from cluster.model_shape import named_shape
from cluster.request import Slo
from deploy.planner.goal import Goal
from deploy.planner.search import plan
from deploy.slo_classes import SloClass
from deploy.trace_files import load_trace
from deploy.workload import from_zero

LONGEST = 16_384


def goal_of(model: str, gpu: str, nodes: int, slo: Slo) -> Goal:
    """Any rate will do: the question is what the GPUs hold."""
    trace = load_trace(Path(CONVERSATION))
    return Goal(
        model=model,
        shape=named_shape(model),
        hardware=hardware_named(gpu),
        gpus=8 * nodes,
        requests=from_zero([r for r in trace if r.input_tokens + r.output_tokens <= LONGEST]),
        classes=(SloClass(name="all", slo=slo, share=1.0),),
        max_model_len=LONGEST,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--nodes", type=int, nargs="*", default=[2, 4, 8, 16, 32])
    args = parser.parse_args()
    usual = Slo(ttft_s=1.0, tpot_s=0.04)
    cases = [("llama-3-70b", "h100", nodes, usual) for nodes in args.nodes]
    cases.append(("deepseek-v3", "h200", 32, Slo(ttft_s=2.0, tpot_s=0.05)))
    print("| model | nodes of 8 | plan | req/s and GPU | times unsplit | simulated | took |")
    print("|---|---|---|---|---|---|---|")
    for model, gpu, nodes, slo in cases:
        began_s = time.perf_counter()
        made = plan(goal_of(model, gpu, nodes, slo), jobs=args.jobs, must_hold=False)
        took_s = time.perf_counter() - began_s
        best, unsplit = made.chosen, made.best_unsplit
        gain = f"{best.per_gpu_rps / unsplit.per_gpu_rps:.2f}" if unsplit and unsplit.goodput_rps else "-"
        print(
            f"| {model} | {nodes} {gpu} | {best.deployment} | {best.per_gpu_rps:.3g} | {gain} | "
            f"{1 + len(made.others)} | {took_s:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
