"""A plan as one page of HTML: what to deploy, what it was chosen from, and curves of what if."""

from __future__ import annotations

from deploy.planner.plan import Plan, why_lost
from deploy.planner.sweep import Curve, Sweep, sweep_figure
from deploy.simulator.facts import Figure
from deploy.simulator.page import document, figure_html, table_html, warnings
from deploy.simulator.svg_plot import WIDE, Axis, Rows

MOST_BARS = 24


def page(plan: Plan, swept: tuple[Sweep, dict[str, Curve]] | None = None) -> str:
    """The page's text; well-formed XML too. Equal plans give equal bytes.

    Args:
        swept: a range and its curves.
    """
    figures = [_candidates(plan)]
    if swept is not None:
        figures.append(sweep_figure(plan.goal, *swept))
    said = [line for line in plan.to_text().splitlines() if not line.startswith("lost ")]
    others = [[str(one.deployment), str(one.deployment.gpus), why_lost(one)] for one in plan.others]
    others += [[str(one), str(one.gpus), "not simulated: can't be better"] for one in plan.unseen]
    return document(
        f"{plan.goal.model}: {plan.chosen.deployment}",
        plan.goal.describe_workload(),
        [
            *warnings(plan.warnings),
            table_html("what|is", ([line[:12].strip(), line[12:]] for line in said)),
            '<div class="figures">',
            *map(figure_html, figures),
            "</div>",
            "<h2>The others</h2>",
            table_html("deployment|GPUs|why it lost", others),
        ],
    )


def _candidates(plan: Plan) -> Figure:
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
    return Figure(
        title="What it was chosen from",
        note="Of the deployments that held what was asked of them.",
        legend=(("c0", "split"), ("c1", "unsplit")),
        svg=plot.svg(),
        wide=True,
    )
