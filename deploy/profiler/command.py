"""`pdserve profile`: measure an engine, a server or a GPU's kernels, and write what a simulation needs."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.instance import Role
from cluster.latency import LatencyProfile

DEFAULT_SECONDS = 60.0
DEFAULT_CONCURRENCY = 32
DEFAULT_KERNEL_PROMPT = 8192
DEFAULT_KERNEL_CONCURRENCY = 256


def add_profile(commands: Any) -> None:
    """Add the command to a parser's subcommands; it runs as `args.run(args)` and returns the exit code."""
    profile = commands.add_parser("profile", help="measure iteration times, for simulate and plan")
    what = profile.add_mutually_exclusive_group(required=True)
    what.add_argument("--url", help="measure a running OpenAI server from outside")
    what.add_argument("--spec", type=Path, metavar="SPEC", help="measure one engine of a spec, started here")
    what.add_argument(
        "--kernels", action="store_true", help="measure attention and matrix products on this GPU"
    )
    profile.add_argument(
        "--out", type=Path, required=True, metavar="FILE.json", help="where to write the result"
    )
    profile.add_argument("--role", choices=[role.value for role in Role], help="whose engine; --spec only")
    profile.add_argument("--model", help="name at --url, or checkpoint instead of the --spec's")
    profile.add_argument("--shape", metavar="NAME", help="model name or config.json; --kernels only")
    profile.add_argument(
        "--hardware", metavar="NAME", help="the GPU that is here, for example h100; --kernels only"
    )
    profile.add_argument("--tensor-parallel-size", type=_count, metavar="N", help="ranks; --kernels only")
    profile.add_argument("--max-prompt", type=_count, metavar="N", help="longest prompt, in tokens")
    profile.add_argument("--max-concurrency", type=_count, metavar="N", help="requests at once")
    profile.add_argument(
        "--seconds", type=_seconds, metavar="S", help=f"time to measure for (default {DEFAULT_SECONDS:g})"
    )
    profile.add_argument(
        "--seed", type=int, default=0, help="of prompts and of the order (default %(default)s)"
    )
    profile.set_defaults(run=run_profile)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return value


_ONLY = {
    "role": ("spec",),
    "model": ("spec", "url"),
    "seconds": ("spec", "url"),
    "shape": ("kernels",),
    "hardware": ("kernels",),
    "tensor_parallel_size": ("kernels",),
}


def run_profile(args: argparse.Namespace) -> int:
    """Measure, write `args.out`, print the table; progress goes to standard error.

    Raises ServingError and ValueError, with what to do, for what can't be measured.
    """
    kind = "url" if args.url else "spec" if args.spec else "kernels"
    for option, kinds in _ONLY.items():
        if getattr(args, option) is not None and kind not in kinds:
            flag = option.replace("_", "-")
            raise ValueError(f"--{flag} goes with --{' or --'.join(kinds)}, not with --{kind}: leave it out")
    _check_writable(args.out)
    if kind == "kernels":
        table = _kernels(args)
    else:
        profile, table = _of_url(args) if kind == "url" else _of_spec(args)
        profile.save(args.out)
    print(table)
    _say(f"written to {args.out}")
    return 0


def _check_writable(path: Path) -> None:
    """Before minutes of measuring, not after."""
    if path.is_dir():
        raise ValueError(f"--out {path} is a directory: name a file in it")
    directory = path.parent
    if not directory.is_dir():
        raise ValueError(f"--out {path}: there is no directory {directory}: create it first")
    if not os.access(path if path.exists() else directory, os.W_OK):
        raise ValueError(f"--out {path} can't be written: name another file")


def _of_spec(args: argparse.Namespace) -> tuple[LatencyProfile, str]:
    from cluster.spec import load_spec
    from deploy.profiler.engine import engine_limits, make_engine, measure_engine
    from deploy.profiler.fit import averages, fit_costs, table
    from deploy.profiler.machine import machine, versions

    spec = load_spec(args.spec, {} if args.model is None else {"model": args.model})
    role = Role(args.role or Role.DECODE)

    async def measure() -> tuple[Any, list[Any]]:
        engine = make_engine(spec, role)
        try:
            facts = await engine.start(_say)
            limits = engine_limits(facts, max_prompt=args.max_prompt, max_requests=args.max_concurrency)
            return facts, await measure_engine(
                engine,
                limits,
                max_model_len=facts.max_model_len,
                seconds=args.seconds or DEFAULT_SECONDS,
                seed=args.seed,
                say=_say,
            )
        finally:
            await engine.stop()

    with _engine_prints_to_stderr():
        facts, measured = asyncio.run(measure())
    samples = averages(measured)
    fit = fit_costs(samples)
    profile = LatencyProfile(
        model=f"{spec.api_model_name} ({facts.fingerprint.dtype.removeprefix('torch.')})",
        tensor_parallel_size=facts.tensor_parallel_size,
        pipeline_parallel_size=facts.pipeline_parallel_size,
        machine=machine(),
        versions=versions(),
        source=f"pdserve profile --spec {args.spec.name} --role {role}: {len(measured):,} iterations",
        prefill=fit.prefill,
        decode=fit.decode,
        region=fit.region._asdict(),
        residuals=fit.residuals,
    )
    return profile, table(profile, samples, {})


def _of_url(args: argparse.Namespace) -> tuple[LatencyProfile, str]:
    from deploy.profiler.url import measure_url
    from deploy.profiler.url_fit import fit_streams, profile_of, table_of

    url = args.url.rstrip("/").removesuffix("/v1")
    served, visits = asyncio.run(
        measure_url(
            url,
            model=args.model,
            max_prompt=args.max_prompt,
            max_requests=args.max_concurrency or DEFAULT_CONCURRENCY,
            seconds=args.seconds or DEFAULT_SECONDS,
            seed=args.seed,
            say=_say,
        )
    )
    found = fit_streams(visits)
    profile = profile_of(found, served.name, url, visits)
    return profile, table_of(found, profile)


def _kernels(args: argparse.Namespace) -> str:
    if args.shape is None or args.hardware is None:
        raise ValueError(
            "--kernels needs --shape and --hardware, for example --shape llama-3-8b --hardware h100"
        )
    from cluster.hardware import hardware_named
    from cluster.model_shape import shape_of
    from deploy.profiler.kernels import kernel_grid, kernels_table, save_kernels, time_kernels
    from deploy.profiler.kernels_flashinfer import CudaTimer

    shape, hardware = shape_of(args.shape), hardware_named(args.hardware)
    ranks = args.tensor_parallel_size or 1
    kernels = kernel_grid(
        shape,
        tensor_parallel_size=ranks,
        max_prompt=args.max_prompt or DEFAULT_KERNEL_PROMPT,
        max_requests=args.max_concurrency or DEFAULT_KERNEL_CONCURRENCY,
    )
    timer = CudaTimer()
    _say(f"{len(kernels)} kernels of {shape.name} on {timer.gpu}")
    times = time_kernels(kernels, timer, hardware, _say)
    save_kernels(args.out, times, shape=shape, ranks=ranks, hardware=hardware, versions=timer.versions)
    return kernels_table(times)


@contextmanager
def _engine_prints_to_stderr() -> Iterator[None]:
    """vLLM prints to standard output as it likes; there, only the table is wanted."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
