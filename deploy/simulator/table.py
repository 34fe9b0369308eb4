"""The report of a simulation as text: what a platform engineer reads first."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deploy.latency_table import latency_lines, milliseconds
from deploy.replay_report import MAX_ERRORS_SHOWN
from deploy.simulator.blame import Cause
from deploy.simulator.groups import PoolUse, RequestGroup
from deploy.simulator.result import STAGES

if TYPE_CHECKING:
    from deploy.simulator.report import SimulationReport

WIDTH = 100
MAX_CAUSES_SHOWN = 3
MAX_FAULTS_SHOWN = 10
MAX_CLASSES_SHOWN = 20
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def report_lines(report: SimulationReport, *, with_cost: bool) -> list[str]:
    """Lines of at most WIDTH columns; what casts doubt on the figures stands before them."""
    sections = (
        [*_wrapped("simulation", f"{report.name}, seed {report.seed}"), *_warning_lines(report.warnings)],
        _summary_lines(report),
        _class_lines(report.classes),
        _latency_lines(report.overall),
        _miss_lines(report),
        _pool_lines(report.pools),
        _error_lines(report),
        _fault_lines(report),
        _cost_lines(report) if with_cost else [],
    )
    lines: list[str] = []
    for section in filter(None, sections):
        lines += ["", *section] if lines else section
    return lines


def share(value: float | None) -> str:
    """A share (0..1) as a percentage; "-" for None."""
    return "-" if value is None else f"{value:.1%}"


def slo_bound(bound_s: float) -> str:
    """A bound in milliseconds, to four digits."""
    return f"{float(f'{bound_s * 1000:.4g}'):,g} ms" if math.isfinite(bound_s) else "none"


def amount_of_bytes(count: float) -> str:
    """Bytes with about three digits in decimal units, for example `1.53 GB`."""
    place = min(len(BYTE_UNITS) - 1, int(math.log(count, 1000)) if count >= 1 else 0)
    return f"{count / 1000**place:.3g} {BYTE_UNITS[place]}" if place else f"{count:.0f} B"


def cause_text(cause: Cause) -> tuple[str, str]:
    """The cause by name, and what it did to the requests it is blamed for."""
    if cause.excess_s is None:
        return cause.name, "no complete answer"
    unit = "ms" if cause.bound == "ttft" else "ms per output token"
    sign = "-" if cause.excess_s < 0 else "+"
    size = milliseconds(abs(cause.excess_s))
    return cause.name.replace("_", " "), f"{cause.bound.upper()} missed, median {sign}{size} {unit}"


def _wrapped(name: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH - 12, break_on_hyphens=False) or [""]
    return [f"{name if place == 0 else '':<12}{line}" for place, line in enumerate(lines)]


def _warning_lines(warnings: Sequence[str]) -> list[str]:
    if not warnings:
        return []
    plural = "WARNING" if len(warnings) == 1 else f"{len(warnings)} WARNINGS"
    lines = ["", f"*** {plural}: read before you trust the figures ".ljust(WIDTH, "*")]
    for warning in warnings:
        lines += textwrap.wrap(
            warning, WIDTH, initial_indent="  * ", subsequent_indent="    ", break_on_hyphens=False
        )
    return [*lines, "*" * WIDTH]


def _summary_lines(report: SimulationReport) -> list[str]:
    overall = report.overall
    counts = ", ".join(f"{count:,} {status}" for status, count in overall.counts.items())
    goodput = f"{report.goodput_rps:.2f} requests/s within their SLO"
    if report.goodput_rps_per_gpu is not None:
        goodput += f": {report.goodput_rps_per_gpu:.3f} for each of {report.gpus:,} GPUs"
    if report.met_per_gpu_hour is not None:
        goodput += f", {report.met_per_gpu_hour:,.0f} per GPU-hour"
    ok_rps, prompt_rate, output_rate = (
        report.per_second(count)
        for count in (overall.counts["ok"], report.input_tokens, report.output_tokens)
    )
    busy = report.busy_gpu_s / report.present_gpu_s if report.present_gpu_s else None
    moved = f"{report.kv_tokens_moved:,} tokens; {report.kv_tokens_recomputed:,} tokens recomputed instead"
    rows = (
        ("attainment", f"{share(overall.attainment)} ({overall.met:,} of {overall.judged:,} met their SLO)"),
        ("goodput", goodput),
        ("requests", f"{sum(overall.counts.values()):,} in {report.duration_s:,.1f} s: {counts}"),
        (
            "throughput",
            f"{ok_rps:.2f} requests/s, {prompt_rate:,.0f} prompt and {output_rate:,.0f} output tokens/s",
        ),
        (
            "GPU time",
            f"{report.present_gpu_s:,.0f} GPU-s present, {report.busy_gpu_s:,.0f} computing ({share(busy)})",
        ),
        ("KV", f"{amount_of_bytes(report.kv_bytes_moved)} moved: {moved}"),
        ("moves", f"{report.moved_requests:,} requests left an engine that failed them"),
    )
    return [line for name, text in rows for line in _wrapped(name, text)]


def _class_lines(classes: Sequence[RequestGroup]) -> list[str]:
    if not classes:
        return []
    widths = (16, 9, 9, 9, 9, 10, 10, 10, 16)
    rows: list[tuple[str, ...]] = [
        (
            "SLO class",
            "TTFT <=",
            "TPOT <=",
            "requests",
            "met",
            "attained",
            "TTFT p99",
            "TPOT p99",
            "TTFT/TPOT late",
        )
    ]
    for group in classes[:MAX_CLASSES_SHOWN]:
        ttft, tpot = group.latencies["ttft_s"], group.latencies["tpot_s"]
        rows.append(
            (
                _short(group.name, 15),
                slo_bound(group.slo.ttft_s if group.slo else math.inf),
                slo_bound(group.slo.tpot_s if group.slo else math.inf),
                f"{sum(group.counts.values()):,}",
                f"{group.met:,}",
                share(group.attainment),
                "-" if ttft is None else milliseconds(ttft.p99),
                "-" if tpot is None else milliseconds(tpot.p99),
                f"{group.ttft_missed:,}/{group.tpot_missed:,}",
            )
        )
    hidden = len(classes) - MAX_CLASSES_SHOWN
    return [*_table(rows, widths), *([f"and {hidden} more classes"] if hidden > 0 else [])]


def _latency_lines(overall: RequestGroup) -> list[str]:
    names = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "end to end"}
    names |= {f"{stage}_s": f"  {stage.replace('_', ' ')}" for stage in STAGES}
    return latency_lines(((names[key], row) for key, row in overall.latencies.items()), name_width=18)


def _miss_lines(report: SimulationReport) -> list[str]:
    if not report.missed:
        return []
    lines = [f"{report.missed:,} misses, by their main cause (excess over the requests that met)"]
    for cause in report.causes[:MAX_CAUSES_SHOWN]:
        name, effect = cause_text(cause)
        lines.append(f"  {name:<16}{cause.misses:>10,}{share(cause.misses / report.missed):>8}   {effect}")
    rest = sum(cause.misses for cause in report.causes[MAX_CAUSES_SHOWN:])
    return [*lines, *([f"  {'others':<16}{rest:>10,}{share(rest / report.missed):>8}"] if rest else [])]


def pool_cells(pool: PoolUse) -> tuple[str, ...]:
    """Role, instances, GPUs, busy, KV on average and at most, prefix hits, preemptions, decode batch."""
    return (
        pool.role.value,
        f"{pool.instances:,}",
        f"{pool.gpus:,}",
        share(pool.busy_share),
        share(pool.kv_mean),
        share(pool.kv_peak),
        share(pool.prefix_hit_share),
        f"{pool.preemptions:,}",
        "-" if pool.decode_batch is None else f"{pool.decode_batch:.1f}",
    )


def _pool_lines(pools: Sequence[PoolUse]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        (
            "pool",
            "instances",
            "GPUs",
            "busy",
            "KV mean",
            "KV peak",
            "prefix hits",
            "preempted",
            "decode batch",
        )
    ]
    rows += [pool_cells(pool) for pool in pools]
    return _table(rows, (10, 10, 7, 9, 10, 10, 13, 12, 14)) if pools else []


def _error_lines(report: SimulationReport) -> list[str]:
    if not report.errors:
        return []
    lines = [
        "errors",
        *(_short(f"{count:>8,} x {text}", WIDTH) for text, count in report.errors[:MAX_ERRORS_SHOWN]),
    ]
    more = sum(count for _, count in report.errors[MAX_ERRORS_SHOWN:])
    return [*lines, *([f"{more:>8,} x other errors"] if more else [])]


def _fault_lines(report: SimulationReport) -> list[str]:
    if not report.faults:
        return []
    lines = [
        "faults",
        *(_short(f"{at_s:>10,.1f} s  {text}", WIDTH) for at_s, text in report.faults[:MAX_FAULTS_SHOWN]),
    ]
    hidden = len(report.faults) - MAX_FAULTS_SHOWN
    return [*lines, *([f"  and {hidden:,} more"] if hidden > 0 else [])]


def _cost_lines(report: SimulationReport) -> list[str]:
    if not report.wall_s:
        return []
    speed = f"{report.duration_s / report.wall_s:,.0f} times as fast as real time"
    rate = f"{report.events:,} events, {report.events / report.wall_s:,.0f} per second"
    return _wrapped("simulated", f"in {report.wall_s:,.1f} s, {speed}; {rate}")


def _table(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """Lines of cells, the first column to the left; a column grows where a cell needs it."""
    needed = [max(width, *(len(row[at]) + 1 for row in rows)) for at, width in enumerate(widths)]
    return [
        f"{row[0]:<{needed[0]}}"
        + "".join(f"{cell:>{width}}" for cell, width in zip(row[1:], needed[1:], strict=True))
        for row in rows
    ]


def _short(text: str, width: int) -> str:
    """One line of at most `width` columns."""
    line = " ".join(text.split()) if "\n" in text else text
    return line if len(line) <= width else line[: width - 3] + "..."
