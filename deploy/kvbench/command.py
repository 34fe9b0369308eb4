"""`pdserve kvbench`: parse, measure, hand back the report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cluster.errors import EnvironmentProblem
from cluster.model_shape import shape_of
from cluster.spec import PoolSpec, TransportName, load_spec
from deploy.workload_options import count_from, require_directories

if TYPE_CHECKING:  # the command line works without numpy and torch
    from deploy.kvbench.cases import Bench
    from deploy.kvbench.report import KvBenchReport, Row

DEFAULT_BLOCK_TOKENS = 16
NAMES: tuple[TransportName, ...] = get_args(TransportName)


def add_kvbench(commands: Any) -> Any:
    """Add the command to a parser's subcommands; returns its parser."""
    bench = commands.add_parser(
        "kvbench", help="measure how fast KV moves between two processes, or machines"
    )
    where = bench.add_mutually_exclusive_group()
    where.add_argument("--serve", metavar="HOST:PORT", help="let another machine read this one's memory")
    where.add_argument(
        "--from", dest="source", metavar="HOST:PORT", help="read of the machine that serves there"
    )
    whose = bench.add_mutually_exclusive_group()
    whose.add_argument(
        "--spec",
        type=Path,
        metavar="SPEC",
        help="also as this spec's prefill and decode instances lay it out",
    )
    whose.add_argument("--shape", metavar="NAME", help="also as this model's, by name or config.json")
    bench.add_argument(
        "--transport",
        nargs="+",
        choices=NAMES,
        default=list(NAMES),
        help="nixl: as engines use it; torch: gloo, on GPUs NCCL; local: process_vm_readv (default all)",
    )
    bench.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="whose memory (default cpu)")
    bench.add_argument(
        "--tokens",
        type=count_from,
        default=1024,
        metavar="N",
        help="of the request that is moved (default 1024)",
    )
    bench.add_argument("--rounds", type=count_from, default=7, metavar="N", help="(default 7)")
    bench.add_argument("--out", type=Path, metavar="FILE.json", help="keep rows and links")
    bench.add_argument("--json", action="store_true", help="print JSON")
    return bench


def run_kvbench(args: argparse.Namespace, say: Callable[[str], None]) -> KvBenchReport | None:
    """Measure; or let another machine measure, which gives no report. Raises ValueError and SpecError for bad
    input, EnvironmentProblem for what is not here."""
    require_directories(args.out)
    try:
        from deploy.kvbench.cases import flat_bench
        from deploy.kvbench.measure_torch import measure, own_memory
        from deploy.kvbench.remote import address_of, serve, source_at
        from deploy.kvbench.report import KvBenchReport, fit_link
    except ImportError as error:
        raise EnvironmentProblem(
            problem=f"{error.name} is not there", remedy="install pdserve's 'gpu' or 'cpu' extra"
        ) from error
    if args.serve is not None:
        serve(address_of(args.serve), own_memory, say)
        return None
    source = source_at(address_of(args.source)) if args.source is not None else None
    benches = [flat_bench(), *_layout_benches(args)]
    names = list(dict.fromkeys(args.transport))
    if args.device == "cuda":
        names = [name for name in names if name != "local"]
        if not names:
            raise ValueError(
                "--transport local reads main memory only: give --transport nixl or torch for --device cuda"
            )
    if source is not None:
        names = [name for name in names if name != "local"]
        if not names:
            raise ValueError(
                "--transport local reads this machine's memory only: give nixl or torch with --from"
            )
    rows: list[Row] = []
    for bench in benches:
        for name in names:
            rows += measure(
                bench, transport=name, device=args.device, rounds=args.rounds, say=say, source=source
            )
    links = tuple(fit_link(name, rows) for name in names)
    report = KvBenchReport(
        device=args.device, rows=tuple(rows), links=links, between_nodes=source is not None
    )
    if args.out is not None:
        report.save(args.out)
    return report


def _layout_benches(args: argparse.Namespace) -> list[Bench]:
    from deploy.kvbench.cases import layout_bench, layout_of

    if args.shape is not None:
        layout = layout_of(
            shape_of(args.shape), block_tokens=DEFAULT_BLOCK_TOKENS, tokens=args.tokens, ranks=(1, 1)
        )
        return [layout_bench(f"{args.shape}, {args.tokens} tokens", layout, layout, args.tokens)]
    if args.spec is None:
        return []
    spec = load_spec(args.spec)
    shape = shape_of(spec.sim.shape or spec.model)

    def of(pool: PoolSpec) -> Any:
        block = int(
            pool.engine_options.get("block_size")
            or spec.engine_options.get("block_size")
            or DEFAULT_BLOCK_TOKENS
        )
        ranks = pool.tensor_parallel_size, pool.pipeline_parallel_size
        return layout_of(shape, block_tokens=block, tokens=args.tokens, ranks=ranks)

    name = f"{spec.name}, {args.tokens} tokens"
    return [layout_bench(name, of(spec.prefill), of(spec.decode), args.tokens)]
