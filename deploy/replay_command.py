"""`pdserve replay`: a trace, from a file or synthetic, against a server, with live progress."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from cluster.request import NO_SLO
from deploy.replay import ReplayOptions, ReplayProgress, replay
from deploy.replay_report import ReplayReport, parse_goodput
from deploy.slo_classes import assign_slo_classes, parse_slo
from deploy.workload_options import require_directories, workload_from


def replay_trace(args: argparse.Namespace, say: Callable[[str], None]) -> ReplayReport:
    """Run the command. Raises ValueError (TraceError among them) for input that can't be used."""
    require_directories(args.save)
    judged_by = parse_goodput(args.goodput) if args.goodput else NO_SLO
    report = send_trace(args, args.url, args.slo, say, slo=judged_by, cancel_share=args.cancel_share)
    if args.save is not None:
        from deploy.verification.outcomes import save_outcomes

        save_outcomes(report, args.save)
        say(f"wrote {args.save}")
    return report


def send_trace(
    args: argparse.Namespace, url: str, bounds: Sequence[str], say: Callable[[str], None], **options: Any
) -> ReplayReport:
    """Send the workload of a command line.

    Args:
        args: its `trace` with `add_workload_options`, `model` and `timeout`.
        bounds: ttft:MS tpot:MS or a file of classes, which go along with requests; empty for none.
        options: further ones of `ReplayOptions`.

    Raises ValueError as `replay_trace`.
    """
    requests = workload_from(args)
    classes = assign_slo_classes(requests, parse_slo(bounds), Random(f"{args.seed}/slo")) if bounds else None
    say(f"{len(requests)} requests over {requests[-1].arrival_s:.0f} s to {url}")
    sending = ReplayOptions(
        model=args.model, classes=classes, timeout_s=args.timeout, seed=args.seed, **options
    )
    return asyncio.run(replay(url, requests, sending, progress_line()))


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
