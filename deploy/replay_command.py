"""`pdserve replay`: a trace, from a file or synthetic, against a server, with live progress."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from random import Random

from cluster.request import NO_SLO
from deploy.replay import ReplayOptions, ReplayProgress, replay
from deploy.replay_report import ReplayReport, parse_goodput
from deploy.slo_classes import assign_slo_classes, parse_slo
from deploy.workload_options import workload_from


def replay_trace(args: argparse.Namespace, say: Callable[[str], None]) -> ReplayReport:
    """Run the command. Raises ValueError (TraceError among them) for input that can't be used."""
    requests = workload_from(args)
    if args.save is not None and not args.save.absolute().parent.is_dir():
        raise ValueError(f"{args.save}: there is no directory {args.save.absolute().parent}")
    classes = None
    if args.slo:
        classes = assign_slo_classes(requests, parse_slo(args.slo), Random(f"{args.seed}/slo"))
    options = ReplayOptions(
        model=args.model,
        slo=parse_goodput(args.goodput) if args.goodput else NO_SLO,
        classes=classes,
        timeout_s=args.timeout,
        cancel_share=args.cancel_share,
        seed=args.seed,
    )
    last_s = requests[-1].arrival_s
    say(f"{len(requests)} requests over {last_s:.0f} s to {args.url}")
    report = asyncio.run(replay(args.url, requests, options, progress_line()))
    if args.save is not None:
        from deploy.verification.outcomes import save_outcomes

        save_outcomes(report, args.save)
        say(f"wrote {args.save}")
    return report


def progress_line() -> Callable[[ReplayProgress], None] | None:
    """Rewrites one line of the terminal; None where standard error is none."""
    if not sys.stderr.isatty():
        return None

    def show(progress: ReplayProgress) -> None:
        ended = sum(progress.finished.values())
        counts = ", ".join(f"{count} {status}" for status, count in progress.finished.items() if count)
        line = f"{progress.elapsed_s:6.1f} s  sent {progress.sent}/{progress.total}, ended {ended}  {counts}"
        print(f"\r{line:<78}", end="\n" if ended == progress.total else "", file=sys.stderr, flush=True)

    return show
