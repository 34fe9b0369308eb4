"""`pdserve plan`: parses and prints."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.workload_options import (
    TRACE_HELP,
    add_workload_options,
    count_from,
    require_directories,
    workload_from,
)

if TYPE_CHECKING:  # made by every command, most of which plan nothing
    from cluster.hardware import Hardware
    from deploy.planner.deployment import Layout
    from deploy.planner.goal import Goal

EXIT_INFEASIBLE = 3
OBJECTIVES = ("goodput_per_gpu", "min_gpus", "cost", "energy")
# Of a synthetic workload.
COUNT = 4000


def add_plan(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the command line; returns its parser."""
    plan: argparse.ArgumentParser = commands.add_parser(
        "plan", help="which deployment holds an SLO under a workload, by simulating the live code"
    )
    plan.add_argument(
        "--model", required=True, metavar="NAME", help="shape by name (llama-3-70b, ...), or a checkpoint"
    )
    plan.add_argument(
        "--gpu",
        nargs="+",
        default=[],
        metavar="GPU",
        help="h100, h200, b200, a100, l40s, ...; or several with how many there are, as in h100=16 a100=16",
    )
    plan.add_argument(
        "--profile",
        nargs="+",
        default=[],
        metavar="FILE",
        help="what `pdserve profile` measured, one for each layout; with --gpu that says memory and price",
    )
    plan.add_argument("--nodes", type=count_from, default=1, metavar="N", help="default %(default)s")
    plan.add_argument("--gpus-per-node", type=count_from, default=8, metavar="N", help="default %(default)s")
    plan.add_argument(
        "--gpus-total", type=count_from, metavar="G", help="at most so many; of CPU engines, so many ranks"
    )
    plan.add_argument("--node-gbps", type=float, metavar="G", help="network between nodes, per GPU")
    plan.add_argument("--trace", metavar="TRACE", help=TRACE_HELP)
    plan.add_argument("--isl", type=count_from, metavar="N", help="prompt tokens, without a trace")
    plan.add_argument("--osl", type=count_from, metavar="N", help="answer tokens, without a trace")
    plan.add_argument(
        "--cv", type=float, default=1.0, metavar="X", help="of gaps between arrivals, without a trace"
    )
    add_workload_options(plan)
    plan.add_argument("--ttft", type=float, metavar="MS", help="bound on the time to first token")
    plan.add_argument("--tpot", type=float, metavar="MS", help="bound on the time per output token")
    plan.add_argument(
        "--slo", nargs="+", default=[], metavar="SLO", help="a YAML file of SLO classes, instead"
    )
    plan.add_argument("--attainment", type=float, default=0.9, metavar="X", help="default %(default)s")
    plan.add_argument("--objective", choices=OBJECTIVES, default="goodput_per_gpu")
    plan.add_argument(
        "--max-kw",
        nargs="+",
        default=[],
        metavar="KW",
        help="most power, as in 20, or prefill=12 decode=8 for the pools",
    )
    plan.add_argument(
        "--pipeline", action="store_true", help="also pipeline stages; in decode only twins serve them yet"
    )
    plan.add_argument(
        "--parts", type=count_from, default=3, metavar="N", help="of the workload, for the band"
    )
    plan.add_argument("--jobs", type=count_from, default=os.cpu_count() or 1, metavar="N", help="processes")
    plan.add_argument(
        "--by-class", action="store_true", help="also a cluster for each SLO class, and which takes less"
    )
    plan.add_argument("--ray", metavar="ADDRESS", help="simulate on a Ray cluster ('auto' or host:port)")
    plan.add_argument("--compare", action="store_true", help="print every candidate that was simulated")
    plan.add_argument("--sweep", metavar="WHAT=FROM:TO:STEP", help="rate=1:50:2x, slo_scale=, isl= or gpus=")
    plan.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--base", type=Path, metavar="SPEC", help="whose other keys the plan's spec has")
    plan.add_argument("-o", "--output", type=Path, metavar="SPEC", help="write the spec")
    return plan


def run_plan(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Run the command; returns the exit code.

    Raises ValueError, SpecError for input that can't be used.
    """
    from deploy.planner.goal import Infeasible
    from deploy.planner.plan import why_lost
    from deploy.planner.search import plan

    require_directories(args.output, args.html)
    if args.sweep is not None and args.html is None:
        raise ValueError("--sweep draws into a page: give --html")
    goal = goal_from(args)
    if args.sweep is not None:
        from deploy.planner.sweep import Sweep

        Sweep.of(goal, args.sweep)
    try:
        if args.by_class:
            return _by_class(args, goal, say)
        made = plan(goal, jobs=args.jobs, workers=_on_ray(args.ray, goal), say=say)
    except Infeasible as error:
        say(f"pdserve: infeasible: {error.why}")
        for remedy in error.remedies:
            say(f"  {remedy}")
        return EXIT_INFEASIBLE
    print(json.dumps(made.to_json(), indent=2) if args.json else made.to_text())
    if args.compare and not args.json:
        for one in made.others:
            print(f"{one.deployment!s:<44} {why_lost(one)}")
        for unseen in made.unseen:
            print(f"{unseen!s:<44} not simulated: can't be better by what it could do at most")
    if args.html is not None:
        from deploy.planner.report import page
        from deploy.planner.sweep import sweep

        swept = sweep(goal, made, args.sweep, jobs=args.jobs, say=say) if args.sweep else None
        args.html.write_text(page(made, swept), encoding="utf-8")
        say(f"wrote {args.html}")
    if args.output is not None:
        args.output.write_text(made.to_yaml(), encoding="utf-8")
        say(_next(args))
    return 0


def _by_class(args: argparse.Namespace, goal: Goal, say: Callable[[str], None]) -> int:
    """A cluster for all beside one for each class. Raises ValueError, Infeasible."""
    from deploy.planner.by_class import plan_by_class

    if args.ray or args.html or args.sweep:
        raise ValueError("--by-class goes without --ray, --html and --sweep")
    made = plan_by_class(goal, jobs=args.jobs, say=say)
    print(json.dumps(made.to_json(), indent=2) if args.json else made.to_text())
    if args.output is not None:
        args.output.write_text(made.together.to_yaml(), encoding="utf-8")
        say(f"wrote {args.output}")
        for name, one in (made.apart or {}).items() if made.pays else ():
            path = args.output.with_name(f"{args.output.stem}-{name}{args.output.suffix}")
            path.write_text(one.to_yaml(), encoding="utf-8")
            say(f"wrote {path}, for the requests of class {name}")
    return 0


def goal_from(args: argparse.Namespace) -> Goal:
    """What the command line asks for. Raises ValueError, SpecError."""
    from cluster.model_shape import shape_of
    from deploy.planner.goal import Goal
    from deploy.slo_classes import parse_slo

    if not 0 < args.attainment < 1:
        raise ValueError(f"--attainment is {args.attainment:g}, expected a share between 0 and 1")
    if not args.gpu and not args.profile:
        raise ValueError("give --gpu, or --profile with what `pdserve profile` measured")
    if args.slo and (args.ttft or args.tpot):
        raise ValueError("give --slo, or --ttft and --tpot")
    slo = _slo_words(args)
    classes = parse_slo(slo)
    if not slo:
        raise ValueError("without a bound every deployment is good: give --ttft and --tpot, or --slo")
    if all(one.slo.ttft_s == math.inf for one in classes):
        raise ValueError(
            "without a bound on the time to first token any rate is held, by waiting: give --ttft"
        )
    requests = _workload(args)
    hardware, fleet = _gpus(args.gpu)
    if fleet and (args.profile or args.gpus_total):
        raise ValueError("--gpu with several types says how many there are, and takes no --profile")
    longest = max(request.input_tokens + request.output_tokens for request in requests)
    return Goal(
        model=args.model,
        shape=shape_of(args.model) if args.gpu else None,
        hardware=hardware,
        profiles=_profiles(args.profile),
        fleet=fleet,
        gpus=args.gpus_total or sum(fleet.values()) or args.nodes * args.gpus_per_node,
        gpus_per_node=args.gpus_per_node,
        requests=requests,
        classes=classes,
        attainment=args.attainment,
        objective=args.objective,
        pipeline=args.pipeline,
        seeds=args.parts,
        max_model_len=args.max_model_len or -(-longest // 1024) * 1024,
        node_gbps=args.node_gbps,
        max_watts=_watts(args.max_kw),
        base=_base(args.base),
    )


def _slo_words(args: argparse.Namespace) -> list[str]:
    """The bounds as other commands take them."""
    bounds = {"ttft": args.ttft, "tpot": args.tpot}
    return args.slo or [f"{name}:{value:g}" for name, value in bounds.items() if value is not None]


def _gpus(words: Sequence[str]) -> tuple[Hardware | None, dict[str, int]]:
    """The type that all have; or how many there are of each."""
    from cluster.hardware import hardware_named

    if len(words) == 1 and "=" not in words[0]:
        return hardware_named(words[0]), {}
    fleet: dict[str, int] = {}
    for word in words:
        name, sign, number = word.partition("=")
        hardware = hardware_named(name)
        if not sign or not number.isdecimal() or not int(number) or hardware.name in fleet:
            raise ValueError(f"--gpu: {word!r}, expected each type once with a number, as in h100=16 a100=16")
        fleet[hardware.name] = int(number)
    return None, fleet


def _watts(words: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for word in words:
        pool, sign, number = word.rpartition("=")
        try:
            kilowatts = float(number)
            if pool not in (("prefill", "decode") if sign else ("",)) or not 0 < kilowatts < math.inf:
                raise ValueError
        except ValueError:
            raise ValueError(f"--max-kw: {word!r}, expected 20, or prefill=12 decode=8") from None
        found[pool or "all"] = 1e3 * kilowatts
    return found


def _base(path: Path | None) -> dict[str, Any]:
    import yaml

    from cluster.spec import load_spec

    if path is None:
        return {}
    load_spec(path)  # says what is wrong with it
    raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return raw


def _profiles(files: Sequence[str]) -> dict[Layout, str]:
    from cluster.latency import load_profile
    from deploy.planner.deployment import Layout

    found: dict[Layout, str] = {}
    for file in files:
        profile = load_profile(file)
        layout = Layout(profile.tensor_parallel_size, profile.pipeline_parallel_size)
        if layout in found:
            raise ValueError(f"--profile: {found[layout]} and {file} are both of {layout}")
        found[layout] = file
    return found


def _workload(args: argparse.Namespace) -> list[Any]:
    if args.trace is None:
        if args.isl is None or args.osl is None or args.rate is None:
            raise ValueError("give --trace, or --isl, --osl and --rate")
        kind = "fixed" if args.cv == 0 else "gamma"
        cv = "" if args.cv == 0 else f",cv={args.cv:g}"
        args.trace = f"{kind}:rate={args.rate:g},count={COUNT},input={args.isl},output={args.osl}{cv}"
    elif args.isl is not None or args.osl is not None:
        raise ValueError("--isl and --osl say the lengths where there is no --trace")
    return workload_from(args)


def _on_ray(address: str | None, goal: Goal) -> Any:
    if address is None:
        return None
    from deploy.planner.ray_workers import RayWorkers

    return RayWorkers(goal, address)


def _next(args: argparse.Namespace) -> str:
    workload = f"--trace {args.trace}" + (f" --rate {args.rate:g}" if args.rate else "")
    return (
        f"wrote {args.output}. Next:\n  pdserve up {args.output} --model CHECKPOINT\n"
        f"  pdserve simulate {args.output} {workload} --slo {' '.join(_slo_words(args))}"
    )
