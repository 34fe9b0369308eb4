"""`pdserve verify` and `pdserve calibrate`: parse and print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.workload_options import TRACE_HELP, add_workload_options, require_directories

Say = Callable[[str], None]


def add_verify(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the command line; returns its parser."""
    verify: argparse.ArgumentParser = commands.add_parser(
        "verify", help="a plan beside what a running cluster does, and why it differs"
    )
    verify.add_argument("--plan", type=Path, required=True, metavar="SPEC", help="what was planned")
    source = verify.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", help="send --trace there, and compare")
    source.add_argument("--replay", type=Path, metavar="FILE", help="what `pdserve replay --save` wrote")
    _add_trace(verify)
    verify.add_argument(
        "--slo", nargs="+", default=[], metavar="SLO", help="ttft:MS tpot:MS, or a file; sent with requests"
    )
    verify.add_argument("--save", type=Path, metavar="FILE", help="keep what came of each request")
    verify.add_argument("--json", action="store_true", help="print JSON")
    return verify


def add_calibrate(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the command line; returns its parser."""
    calibrate: argparse.ArgumentParser = commands.add_parser(
        "calibrate", help="write into a spec how long its engines really take"
    )
    calibrate.add_argument("spec", type=Path, metavar="SPEC", help="of the cluster that runs")
    calibrate.add_argument(
        "--metrics", required=True, metavar="URL|FILE", help="its URL, or what `pdserve status --json` wrote"
    )
    _add_trace(calibrate)
    calibrate.add_argument("--json", action="store_true", help="print JSON")
    calibrate.add_argument("-o", "--output", type=Path, metavar="SPEC", help="write the spec with new paces")
    return calibrate


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", metavar="TRACE", help=f"to send first; {TRACE_HELP}")
    parser.add_argument("--model", help="model name at the URL; default: the server's first")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="per request")
    add_workload_options(parser)


def run_verify(args: argparse.Namespace, say: Say) -> int:
    """Run the command; returns 0 where the plan holds, else 1. Raises ValueError, SpecError for input that
    can't be used."""
    from cluster.spec import load_spec
    from deploy.replay_command import send_trace
    from deploy.verification.outcomes import load_outcomes, save_outcomes
    from deploy.verification.verify import verify

    require_directories(args.save)
    spec = load_spec(args.plan)
    if args.replay is not None:
        if args.trace is not None or args.save is not None or args.slo:
            raise ValueError("--replay is what was sent already: leave --trace, --slo and --save out")
        report = load_outcomes(args.replay)
    else:
        if args.trace is None:
            raise ValueError("give --trace: what shall be sent")
        report = send_trace(args, args.url, args.slo, say)
    if args.save is not None:
        save_outcomes(report, args.save)
    found = verify(spec, report)
    print(json.dumps(found.to_json(), indent=2) if args.json else found.to_text())
    return 0 if found.holds else 1


def run_calibrate(args: argparse.Namespace, say: Say) -> int:
    """Run the command; returns 0. Raises ValueError, SpecError for input that can't be used."""
    import yaml

    from cluster.spec import load_spec, parse_spec
    from deploy.render.text import to_yaml
    from deploy.replay_command import send_trace
    from deploy.verification.calibrate import calibrate, calibrated, calibration_text, read_status

    require_directories(args.output)
    spec = load_spec(args.spec)
    if args.trace is not None:
        if not args.metrics.startswith(("http://", "https://")):
            raise ValueError("--trace is sent to a URL, and --metrics is a file")
        send_trace(args, args.metrics, [], say)
    found = calibrate(spec, read_status(args.metrics))
    if args.json:
        rows = {str(one.role): {"factor": one.factor, "seen": one.seen, "pace": one.after} for one in found}
        print(json.dumps(rows, indent=2))
    else:
        print(calibration_text(found))
    if args.output is not None:
        raw = calibrated(yaml.safe_load(args.spec.read_text(encoding="utf-8")), found)
        parse_spec(raw, file=str(args.output))
        args.output.write_text(to_yaml([raw]), encoding="utf-8")
        say(f"wrote {args.output}")
    return 0
