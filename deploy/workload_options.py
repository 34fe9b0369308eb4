"""The options of a workload, the same for every command that takes one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line is made by every command, most of which have no workload
    from deploy.workload import WorkloadRequest

TRACE_HELP = (
    "Azure CSV, Mooncake JSONL, BurstGPT CSV or plain CSV; or a synthetic one such as "
    "poisson:rate=4,count=1000,input=512,output=128 (also gamma, fixed, servegen, trace)"
)


def count_from(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def require_directories(*files: Path | None) -> None:
    """Raises ValueError for a file that is to be written, before hours of work, and has no place."""
    for path in files:
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no directory {path.absolute().parent}")


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Add --limit, --rate or --speedup, --max-model-len, --max-output and --seed.

    The trace itself (`trace`, a text, with `TRACE_HELP`) is for the command to place.
    """
    parser.add_argument("--limit", type=count_from, metavar="N", help="only the first N requests")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--rate", type=float, metavar="RPS", help="scale arrival times to this mean rate")
    pace.add_argument("--speedup", type=float, metavar="X", help="divide arrival times by this")
    parser.add_argument(
        "--max-model-len", type=count_from, metavar="N", help="scale lengths down to fit this context"
    )
    parser.add_argument(
        "--max-output", type=count_from, metavar="N", help="scale outputs down to at most this"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default %(default)s)")


def workload_from(args: argparse.Namespace) -> list[WorkloadRequest]:
    """The workload that `trace` and the options of `add_workload_options` say: made, cut, paced, fitted.

    Raises ValueError (TraceError among them) for input that can't be used, OSError for an unreadable file.
    """
    from deploy.workload import fit_to_model, from_zero, rescale
    from deploy.workload_grammar import make_workload

    requests = make_workload(args.trace, args.seed)
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
