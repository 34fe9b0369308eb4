"""`pdserve replay`: a trace from a file, against a server, with live progress."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable

from cluster.request import NO_SLO
from deploy.replay import ReplayOptions, ReplayProgress, replay
from deploy.replay_report import ReplayReport, parse_goodput
from deploy.workload import WorkloadRequest, fit_to_model, from_zero, load_trace, rescale


def replay_trace(args: argparse.Namespace, say: Callable[[str], None]) -> ReplayReport:
    """Run the command. Raises ValueError (TraceError among them) for input that can't be used."""
    requests = _workload(args)
    options = ReplayOptions(
        model=args.model,
        slo=parse_goodput(args.goodput) if args.goodput else NO_SLO,
        timeout_s=args.timeout,
        cancel_share=args.cancel_share,
        seed=args.seed,
    )
    last_s = requests[-1].arrival_s
    say(f"{len(requests)} requests over {last_s:.0f} s to {args.url}")
    return asyncio.run(replay(args.url, requests, options, progress_line()))


def _workload(args: argparse.Namespace) -> list[WorkloadRequest]:
    requests = load_trace(args.trace)
    if args.limit is not None:
        requests = from_zero(requests[: args.limit])
    if args.rate is not None or args.speedup is not None:
        requests = rescale(requests, rate_rps=args.rate, speedup=args.speedup)
    if args.max_model_len is not None or args.max_output is not None:
        longest_output = max(request.output_tokens for request in requests)
        longest = max(request.input_tokens for request in requests) + longest_output
        max_model_len = args.max_model_len or longest
        # Where nothing is said a quarter of the context is for the answer: in traces, prompts are longer.
        max_output = args.max_output or max(1, min(longest_output, max_model_len // 4))
        requests = fit_to_model(requests, max_model_len=max_model_len, max_output=max_output)
    return requests


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
