"""`pdserve simulate`: a spec, a workload and a scenario in; what the cluster would do out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from deploy.workload_options import TRACE_HELP, add_workload_options, require_directories, workload_from

if TYPE_CHECKING:  # made by every command, most of which simulate nothing
    from cluster.spec import ClusterSpec
    from deploy.simulator.report import SimulationReport
    from deploy.simulator.result import SimulationResult

UNSPLIT_KINDS = ("chunked", "whole")


def add_simulate(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the command line; returns its parser."""
    simulate: argparse.ArgumentParser = commands.add_parser(
        "simulate", help="what a spec would do under a workload, without a GPU"
    )
    simulate.add_argument("spec", type=Path, metavar="SPEC", help="spec file; its engines are twins here")
    simulate.add_argument("--trace", required=True, metavar="TRACE", help=TRACE_HELP)
    add_workload_options(simulate)
    simulate.add_argument(
        "--slo", nargs="+", default=[], metavar="SLO", help="ttft:MS tpot:MS, or a YAML file of SLO classes"
    )
    simulate.add_argument("--scenario", type=Path, metavar="FILE", help="YAML: faults, cancels, stale state")
    simulate.add_argument(
        "--unsplit",
        choices=UNSPLIT_KINDS,
        nargs="?",
        const="chunked",
        help="the same GPUs without the split: every instance like decode's, prompts in chunks or whole",
    )
    simulate.add_argument(
        "--strict", action="store_true", help="fail where a profile would have to be extrapolated"
    )
    simulate.add_argument("--timeline", type=Path, metavar="FILE", help="write a Perfetto trace")
    simulate.add_argument("--html", type=Path, metavar="FILE", help="write a page with the plots")
    simulate.add_argument("--json", action="store_true", help="print JSON")
    return simulate


def run_simulate(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[SimulationReport, bool]:
    """Run the command; returns the report and whether it may be trusted (`--strict`).

    Raises ValueError, SpecError for input that can't be used.
    """
    from cluster.spec import load_spec
    from deploy.simulator.report import SimulationReport
    from deploy.simulator.run import Simulation
    from deploy.simulator.scenario import QUIET, load_scenario
    from deploy.slo_classes import assign_slo_classes, parse_slo

    spec = load_spec(args.spec)
    if args.unsplit:
        spec = unsplit(spec, chunked=args.unsplit == "chunked")
    require_directories(args.timeline, args.html)
    scenario = load_scenario(args.scenario, spec) if args.scenario else QUIET
    requests = workload_from(args)
    classes = assign_slo_classes(requests, parse_slo(args.slo), Random(f"{args.seed}/slo"))
    instances = f"{spec.prefill.count} prefill, {spec.decode.count} decode"
    say(f"{len(requests):,} requests over {requests[-1].arrival_s:,.0f} s on {instances}")
    simulation = Simulation(
        spec,
        requests,
        classes,
        scenario=scenario,
        seed=args.seed,
        with_spans=args.timeline is not None or args.html is not None,
        on_progress=_progress(len(requests)),
    )
    result = simulation.run()
    _write(result, args, say)
    return SimulationReport.of(result), not (args.strict and result.warnings)


def unsplit(spec: ClusterSpec, *, chunked: bool) -> ClusterSpec:
    """The same number of GPUs, every instance as the decode pool's are and serving both phases.

    Args:
        chunked: prompts in chunks beside decodes (Sarathi-Serve, FastGen), or whole (Orca).

    Raises SpecError when the GPUs can't be divided into such instances.
    """
    from cluster.errors import SpecError
    from cluster.spec import UNSPLIT

    gpus = spec.prefill.count * spec.prefill.ranks + spec.decode.count * spec.decode.ranks
    together = spec.decode.data_parallel_size
    groups, left = divmod(gpus, spec.decode.ranks * together)
    if left:
        raise SpecError(
            file="(spec)",
            path=f"decode.{'data' if together > 1 else 'tensor'}_parallel_size",
            value=together if together > 1 else spec.decode.ranks,
            allowed=f"to compare without the split, the {gpus} GPUs of both pools must be a multiple of it",
        )
    options = {**spec.decode.engine_options, "enable_chunked_prefill": chunked}
    pool = spec.decode.model_copy(update={"engine_options": options})
    return spec.model_copy(
        update={
            "policy": UNSPLIT,
            "prefill": pool.model_copy(update={"count": 0}),
            "decode": pool.model_copy(update={"count": groups * together}),
        }
    )


def _write(result: SimulationResult, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    if args.timeline is not None:
        from deploy.simulator.timeline import write_timeline

        write_timeline(result, args.timeline)
        say(f"wrote {args.timeline}: open it at ui.perfetto.dev or in chrome://tracing")
    if args.html is not None:
        from deploy.simulator.page import write_page

        write_page(result, args.html)
        say(f"wrote {args.html}")


def _progress(total: int) -> Callable[[float, int], None] | None:
    """Rewrites one line of the terminal; None where standard error is none."""
    if not sys.stderr.isatty():
        return None

    def show(now_s: float, ended: int) -> None:
        line = f"{now_s:10,.0f} s of virtual time, {ended:,} of {total:,} requests ended"
        print(f"\r{line:<78}", end="\n" if ended == total else "", file=sys.stderr, flush=True)

    return show
