"""The figures of a simulation's page in their order, and those of curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from deploy.simulator.bars import causes_figure, instances_figure, kv_figure, stages_figure
from deploy.simulator.blame import Bound
from deploy.simulator.facts import Facts, Figure, words
from deploy.simulator.groups import RequestGroup
from deploy.simulator.report import SimulationReport
from deploy.simulator.result import SimulatedRequest, SimulationResult
from deploy.simulator.series import (
    Bins,
    arrival_rates,
    attainment_over_time,
    cumulative,
    requests_in_stages,
)
from deploy.simulator.svg_plot import Axis, Plot, duration
from deploy.simulator.table import share


def all_figures(result: SimulationResult, report: SimulationReport) -> list[Figure]:
    """Every figure for which there is something to draw, in the order of the page."""
    facts = Facts.of(result, report)
    figures = [
        _latency(facts, "ttft"),
        _latency(facts, "tpot"),
        _attainment(facts),
        _arrivals(facts),
        *_occupancy(facts),
        stages_figure(facts, "ttft"),
        stages_figure(facts, "tpot"),
        causes_figure(report),
        kv_figure(report.instances),
        instances_figure(facts),
    ]
    return [figure for figure in figures if figure is not None]


def _latency(facts: Facts, bound: Bound) -> Figure | None:
    """How the TTFT or the TPOT of complete answers is distributed."""
    name = bound.upper()
    curves = []
    for css, group, requests in facts.shown:
        values = _latencies(requests, bound)
        curves.append((css, group.name, _slo_s(group, bound), values))
    if len(facts.report.classes) > 1:
        curves.append(("all", "all requests", math.inf, _latencies(facts.result.requests, bound)))
    every = [value for *_, values in curves for value in values]
    if not every:
        return None
    x = Axis.logarithmic(name, [*every, *(slo_s for _, _, slo_s, _ in curves)])
    y = Axis.from_zero("complete answers", 1.0, "share")
    plot = Plot(x=x, y=y, about=f"Distribution of the {name}", labels_low=True)
    drawn_bounds = set()
    for css, label, slo_s, values in curves:
        plot.line(((max(x.low, value), part) for value, part in cumulative(values)), css, label)
        if math.isfinite(slo_s) and slo_s not in drawn_bounds:
            same = [other for _, other, other_s, _ in curves if other_s == slo_s]
            plot.vertical(slo_s, css, f"{', '.join(same)}: {duration(slo_s)}")
            drawn_bounds.add(slo_s)
    late, done = _late(facts.report.overall, bound), facts.report.overall.counts["ok"]
    return Figure(
        title=f"{name}: {late:,} of {done:,} complete answers ({share(late / done)}) were beyond their bound",
        note="Share of complete answers that were at least as fast. Dashed: the bound of a class."
        + facts.hidden_classes,
        legend=facts.legend,
        svg=plot.svg(),
        lines=True,
    )


def _attainment(facts: Facts) -> Figure | None:
    bins, report = facts.bins, facts.report
    overall = attainment_over_time(facts.result.requests, bins)
    known = [(value, at_s) for value, at_s in zip(overall, bins.middles_s, strict=True) if value is not None]
    if not known:
        return None
    y = Axis.from_zero("met their SLO", 1.0, "share")
    plot = Plot(x=facts.time_axis(), y=y, about="SLO attainment over time", labels_low=True)
    facts.mark_faults(plot)
    for css, group, requests in facts.shown:
        plot.line(_over_time(bins, attainment_over_time(requests, bins)), css, group.name)
    if len(report.classes) > 1:
        plot.line(_over_time(bins, overall), "all", "all requests")
    lowest, at_s = min(known)
    return Figure(
        title=f"Attainment: {share(report.overall.attainment)} overall, {share(lowest)} at its lowest "
        f"(about {duration(at_s)})",
        note=f"Share of the requests that met their SLO, by their arrival, in stretches of "
        f"{duration(bins.width_s)}.{facts.hidden_classes}",
        legend=facts.legend,
        svg=plot.svg(),
        lines=True,
    )


def _arrivals(facts: Facts) -> Figure | None:
    bins = facts.bins
    rates = arrival_rates(facts.result.requests, bins)
    if not any(rates):
        return None
    plot = Plot(
        x=facts.time_axis(), y=Axis.from_zero("requests per second", max(rates)), about="Arrivals over time"
    )
    facts.mark_faults(plot)
    for css, group, requests in facts.shown:
        plot.line(_over_time(bins, arrival_rates(requests, bins)), css, group.name)
    if len(facts.report.classes) > 1:
        plot.line(_over_time(bins, rates), "all", "all requests")
    mean_rps = facts.report.per_second(len(facts.result.requests))
    return Figure(
        title=f"Load: {mean_rps:.3g} requests/s on average, {max(rates):.3g} at the peak",
        note=f"Arrivals per second, in stretches of {duration(bins.width_s)}.{facts.hidden_classes}",
        legend=facts.legend,
        svg=plot.svg(),
        lines=True,
    )


def _occupancy(facts: Facts) -> list[Figure | None]:
    stages = requests_in_stages(facts.result.requests, facts.bins)
    queues = {stage: counts for stage, counts in stages.items() if stage.endswith("_queue")}
    work = {stage: counts for stage, counts in stages.items() if not stage.endswith("_queue")}
    return [
        _in_stages(facts, queues, "Queues", "wait", "waiting requests"),
        _in_stages(facts, work, "Work", "are in work", "running requests"),
    ]


def _in_stages(
    facts: Facts, stages: dict[str, list[float]], title: str, verb: str, label: str
) -> Figure | None:
    totals = [sum(counts) for counts in zip(*stages.values(), strict=True)]
    highest = max(totals)
    if not highest:
        return None
    plot = Plot(
        x=facts.time_axis(),
        y=Axis.from_zero(label, max(map(max, stages.values()))),
        about=f"{title} over time",
    )
    facts.mark_faults(plot)
    for stage, counts in stages.items():
        plot.line(_over_time(facts.bins, counts), stage, words(stage))
    at_s = facts.bins.middles_s[totals.index(highest)]
    return Figure(
        title=f"{title}: up to {highest:.3g} requests {verb} at once (about {duration(at_s)})",
        note=f"Requests in each stage, averaged over stretches of {duration(facts.bins.width_s)}.",
        legend=tuple((stage, words(stage)) for stage in stages),
        svg=plot.svg(),
        lines=True,
    )


def _latencies(requests: Iterable[SimulatedRequest], bound: Bound) -> list[float]:
    done = (request for request in requests if request.status == "ok")
    values = (request.ttft_s if bound == "ttft" else request.tpot_s for request in done)
    return [value for value in values if value is not None]


def _slo_s(group: RequestGroup, bound: Bound) -> float:
    if group.slo is None:
        return math.inf
    return group.slo.ttft_s if bound == "ttft" else group.slo.tpot_s


def _late(group: RequestGroup, bound: Bound) -> int:
    return group.ttft_missed if bound == "ttft" else group.tpot_missed


def _over_time(bins: Bins, values: Sequence[float | None]) -> Iterable[tuple[float, float | None]]:
    return zip(bins.middles_s, values, strict=True)
