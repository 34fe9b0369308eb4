"""A plan as one page of HTML: what to deploy, what it was chosen from, and curves of what if."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from deploy.planner.plan import Candidate, Plan, why_lost
from deploy.planner.sweep import Curve, Sweep, sweep_figure
from deploy.simulator.page import SCRIPT, STYLE
from deploy.simulator.svg_plot import WIDE, Axis, Rows

MOST_BARS = 24


def page(plan: Plan, swept: tuple[Sweep, dict[str, Curve]] | None = None) -> str:
    """The page's text; well-formed XML too. Equal plans give equal bytes.

    Args:
        swept: a range and its curves.
    """
    chosen = plan.chosen
    title = f"{plan.goal.model}: {chosen.deployment}"
    figures = [_candidates(plan)]
    if swept is not None:
        figures.append(sweep_figure(plan.goal, *swept))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8"/>',
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
            f"<title>{escape(title)}</title>",
            f"<style>\n{STYLE.read_text(encoding='utf-8')}</style></head><body><main>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="sub">{escape(plan.goal.describe_workload())}</p>',
            *(f'<p class="warning">{escape(warning)}</p>' for warning in plan.warnings),
            _facts(plan),
            '<div class="figures">',
            *figures,
            "</div>",
            _alternatives(plan),
            '</main><div id="tip" hidden="hidden"></div>',
            f"<script>\n{SCRIPT.read_text(encoding='utf-8')}</script></body></html>\n",
        ]
    )


def _facts(plan: Plan) -> str:
    """The text's lines as a table."""
    rows = []
    for line in plan.to_text().splitlines():
        if not line.startswith("lost "):
            name, text = line[:12].strip(), line[12:]
            rows.append(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>")
    return f'<table class="facts">{"".join(rows)}</table>'


def _candidates(plan: Plan) -> str:
    """Goodput per GPU of those for which it was looked for, the best first."""
    known = [plan.chosen, *(one for one in plan.others if one.rates_rps)][:MOST_BARS]
    highest = max(one.per_gpu_rps for one in known) or 1.0
    plot = Rows(
        x=Axis.from_zero("goodput, requests/s and GPU", highest * 1.1),
        labels=[str(one.deployment) for one in known],
        about="Goodput per GPU by deployment",
        width=WIDE,
    )
    for row, one in enumerate(known):
        css = "c0" if one.deployment.is_split else "c1"
        plot.bars(row, css, [(0.0, one.per_gpu_rps, 1.0)], f"{one.deployment}: {why_lost(one)}")
        plot.note(row, one.per_gpu_rps, f"{one.per_gpu_rps:.3g}")
    legend = '<li><i class="c0"></i>split</li><li><i class="c1"></i>unsplit</li>'
    return (
        '<figure class="wide"><figcaption>What it was chosen from</figcaption>'
        f'<ul class="legend">{legend}</ul>{plot.svg()}</figure>'
    )


def _alternatives(plan: Plan) -> str:
    rows: Sequence[Candidate] = plan.others
    cells = "".join(
        f"<tr><td>{escape(str(one.deployment))}</td><td>{one.deployment.gpus}</td>"
        f"<td>{escape(why_lost(one))}</td></tr>"
        for one in rows
    )
    unseen = "".join(
        f"<tr><td>{escape(str(one))}</td><td>{one.gpus}</td><td>not simulated: can't be better</td></tr>"
        for one in plan.unseen
    )
    head = "<tr><th>deployment</th><th>GPUs</th><th>why it lost</th></tr>"
    return f"<h2>The others</h2><table>{head}{cells}{unseen}</table>"
