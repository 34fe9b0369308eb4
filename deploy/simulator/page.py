"""A simulation as one page of HTML: no network, no library, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from deploy.latency_table import Distribution, milliseconds
from deploy.simulator.facts import Figure
from deploy.simulator.figures import all_figures
from deploy.simulator.groups import RequestGroup
from deploy.simulator.report import SimulationReport
from deploy.simulator.result import STAGES, SimulationResult
from deploy.simulator.svg_plot import escape
from deploy.simulator.table import amount_of_bytes, pool_cells, share, slo_bound

STYLE = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")
MAX_FAULTS = 100
AREA_KEY = '<i class="{}"></i>'
LINE_KEY = '<svg class="key" viewBox="0 0 30 10"><line class="line {}" x1="0" x2="30" y1="5" y2="5"/></svg>'
_Rows = Iterable[Sequence[str]]


def write_page(result: SimulationResult, path: Path | str) -> None:
    """Write the page. Equal results give equal bytes; what the simulation itself cost is not in it.

    The page is well-formed XML too. Raises OSError for a path that can't be written.
    """
    Path(path).write_text(page(result), encoding="utf-8", newline="\n")


def page(result: SimulationResult) -> str:
    """The page's text."""
    report = SimulationReport.of(result)
    return document(
        f"Simulation: {report.name}",
        _subtitle(report),
        [
            *warnings(report.warnings),
            *_tiles(report),
            "<h2>What happened</h2>",
            '<div class="figures">',
            *(figure_html(figure) for figure in all_figures(result, report)),
            "</div>",
            *_tables(report),
        ],
    )


def document(title: str, subtitle: str, body: Iterable[str]) -> str:
    """A page of HTML, well-formed XML too, that needs nothing else; `body` is HTML, the others are text."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8"/>',
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
            f"<title>{escape(title)}</title>",
            f"<style>\n{STYLE.read_text(encoding='utf-8')}</style></head><body><main>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="sub">{escape(subtitle)}</p>',
            *body,
            '</main><div id="tip" hidden="hidden"></div>',
            f"<script>\n{SCRIPT.read_text(encoding='utf-8')}</script></body></html>\n",
        ]
    )


def _subtitle(report: SimulationReport) -> str:
    pools = ", ".join(
        f"{pool.instances} {pool.role.value} ({pool.gpus} GPU{'s' if pool.gpus != 1 else ''})"
        for pool in report.pools
    )
    requests = sum(report.overall.counts.values())
    return (
        f"{requests:,} requests in {report.duration_s:,.1f} s of virtual time; {pools or 'no instance'}; "
        + (f"seed {report.seed}")
    )


def warnings(found: Sequence[str]) -> list[str]:
    """What must be read first, as HTML; nothing for none."""
    if not found:
        return []
    items = "".join(f"<li>{escape(warning)}</li>" for warning in found)
    return [
        '<div class="warnings" role="alert"><strong>Read before you trust the figures</strong>'
        f"<ul>{items}</ul></div>"
    ]


def _tiles(report: SimulationReport) -> list[str]:
    overall = report.overall
    per_gpu = report.goodput_rps_per_gpu
    ttft, tpot = overall.latencies["ttft_s"], overall.latencies["tpot_s"]
    busy = report.busy_gpu_s / report.present_gpu_s if report.present_gpu_s else None
    tiles = (
        ("SLO attainment", share(overall.attainment), f"{overall.met:,} of {overall.judged:,} requests"),
        ("Goodput", f"{report.goodput_rps:.2f}", "requests/s within their SLO"),
        (
            "Goodput per GPU",
            "-" if per_gpu is None else f"{per_gpu:.3f}",
            f"requests/s, {report.gpus:,} GPUs",
        ),
        ("TTFT p99", "-" if ttft is None else f"{milliseconds(ttft.p99)} ms", "of complete answers"),
        ("TPOT p99", "-" if tpot is None else f"{milliseconds(tpot.p99)} ms", "of complete answers"),
        ("GPU time used", share(busy), f"of {report.present_gpu_s:,.0f} GPU-s present"),
        ("KV moved", amount_of_bytes(report.kv_bytes_moved), f"{report.kv_tokens_moved:,} tokens"),
    )
    cells = (
        f"<div><span>{name}</span><b>{value}</b><span>{note}</span></div>" for name, value, note in tiles
    )
    return ['<div class="tiles">', *cells, "</div>"]


def figure_html(figure: Figure) -> str:
    """A figure with its finding and its legend."""
    key = LINE_KEY if figure.lines else AREA_KEY
    legend = "".join(f"<li>{key.format(css)}{escape(label)}</li>" for css, label in figure.legend)
    wide = ' class="wide"' if figure.wide else ""
    return (
        f"<figure{wide}><figcaption><h3>{escape(figure.title)}</h3>"
        f"<p>{escape(figure.note)}</p></figcaption>"
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + figure.svg
        + "</figure>"
    )


def _tables(report: SimulationReport) -> list[str]:
    overall = report.overall
    times = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "end to end"}
    times |= {f"{stage}_s": stage.replace("_", " ") for stage in STAGES}
    return [
        "<h2>Requests by SLO class</h2>",
        table_html(
            "SLO class|TTFT bound|TPOT bound|requests|met|attainment|TTFT late|TPOT late|TTFT p99|TPOT p99",
            (_class_row(group) for group in report.classes),
        ),
        "<h2>Requests by outcome</h2>",
        table_html("|".join(overall.counts), [[f"{count:,}" for count in overall.counts.values()]]),
        "<h2>Times of complete answers, in ms</h2>",
        table_html(
            "time|" + "|".join(Distribution.__slots__),
            ([times[key], *_cells(row)] for key, row in overall.latencies.items()),
        ),
        "<h2>Pools</h2>",
        table_html(
            "pool|instances|GPUs|busy|KV mean|KV peak|prefix hits|preemptions|decode batch|starts",
            _pool_rows(report),
        ),
        *_optional("Errors", "error|requests", ([text, f"{count:,}"] for text, count in report.errors[:20])),
        *_optional(
            "Faults", "what|at", ([mark.text, f"{mark.at_s:,.1f} s"] for mark in report.faults[:MAX_FAULTS])
        ),
    ]


def _class_row(group: RequestGroup) -> list[str]:
    bounds = ("-", "-") if group.slo is None else (slo_bound(group.slo.ttft_s), slo_bound(group.slo.tpot_s))
    return [
        group.name,
        *bounds,
        f"{sum(group.counts.values()):,}",
        f"{group.met:,}",
        share(group.attainment),
        f"{group.ttft_missed:,}",
        f"{group.tpot_missed:,}",
        *(
            "-" if row is None else milliseconds(row.p99)
            for row in (group.latencies["ttft_s"], group.latencies["tpot_s"])
        ),
    ]


def _pool_rows(report: SimulationReport) -> list[list[str]]:
    return [[*pool_cells(pool), f"{pool.starts:,}"] for pool in report.pools]


def _cells(row: Distribution | None) -> list[str]:
    return ["-" if row is None else milliseconds(getattr(row, column)) for column in Distribution.__slots__]


def _optional(title: str, header: str, rows: _Rows) -> list[str]:
    """A heading and its table; nothing without a row."""
    known = list(rows)
    return [f"<h2>{title}</h2>", table_html(header, known)] if known else []


def table_html(header: str, rows: _Rows) -> str:
    """A table; the header's cells are parted by `|`."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header.split("|"))
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
