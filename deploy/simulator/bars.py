"""Figures of bars: where requests spent their time, why SLOs were missed, and what the instances did."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from deploy.simulator.blame import STAGES_OF, Bound
from deploy.simulator.facts import Facts, Figure, words
from deploy.simulator.report import SimulationReport
from deploy.simulator.result import STAGES, InstanceUse, SimulatedRequest
from deploy.simulator.series import Bins, computing
from deploy.simulator.svg_plot import WIDE, Axis, Rows, duration
from deploy.simulator.table import cause_text, share

MAX_ROWS = 48
BARS_IN_ALL = 12_000
KINDS = ("prefill", "decode", "mixed")


def stages_figure(facts: Facts, bound: Bound) -> Figure | None:
    """Mean time in the stages that a bound is about, of the requests that met and of those that didn't."""
    stages, done = STAGES_OF[bound], [one for one in facts.result.requests if one.status == "ok"]
    groups = [("all", done)]
    if len(facts.report.classes) > 1:
        groups += [(group.name, [one for one in own if one.status == "ok"]) for _, group, own in facts.shown]
    rows = [row for name, group in groups for row in _mean_stages(name, group, stages)]
    highest = max((sum(means) for _, means in rows), default=0.0)
    if not highest:
        return None
    # Room for the sum that stands behind each bar.
    x = Axis.from_zero("mean time", highest * 1.15, "seconds")
    plot = Rows(x=x, labels=[label for label, _ in rows], about="Mean time in each stage")
    for row, (label, means) in enumerate(rows):
        start_s = 0.0
        for stage, mean_s in zip(stages, means, strict=True):
            tip = f"{label}: {words(stage)} {duration(mean_s)}"
            plot.bars(row, stage, [(start_s, start_s + mean_s, 1.0)], tip)
            start_s += mean_s
        plot.note(row, start_s, duration(start_s))
    sums = dict(zip(stages, _sums(done, stages), strict=True))
    largest = max(sums, key=sums.__getitem__)
    return Figure(
        title=f"{'Before' if bound == 'ttft' else 'After'} the first token: "
        f"{share(sums[largest] / math.fsum(sums.values()))} of the time is {words(largest)}",
        note="Mean time in each stage, of complete answers that met their SLO and of those that did not.",
        legend=tuple((stage, words(stage)) for stage in stages),
        svg=plot.svg(),
    )


def _mean_stages(
    name: str, group: Sequence[SimulatedRequest], stages: Sequence[str]
) -> Iterable[tuple[str, list[float]]]:
    """(label, mean seconds in each stage) of those that met and of those that missed, where there are any."""
    for verdict, met in (("met", True), ("missed", False)):
        members = [one for one in group if one.met == met]
        if members:
            yield f"{name}, {verdict}", [sum_s / len(members) for sum_s in _sums(members, stages)]


def _sums(requests: Sequence[SimulatedRequest], stages: Sequence[str]) -> list[float]:
    return [math.fsum(getattr(one.stages, stage) for one in requests) for stage in stages]


def causes_figure(report: SimulationReport) -> Figure | None:
    """Misses by their cause."""
    if not report.causes:
        return None
    plot = Rows(
        x=Axis.from_zero("requests", report.causes[0].misses * 1.7),
        labels=[words(cause.name) for cause in report.causes],
        about="Misses by cause",
    )
    for row, cause in enumerate(report.causes):
        _, effect = cause_text(cause)
        css = cause.name if cause.name in STAGES else "status"
        tip = f"{words(cause.name)}: {cause.misses:,} misses, {effect}"
        plot.bars(row, css, [(0.0, float(cause.misses), 1.0)], tip)
        plot.note(row, cause.misses, f"{share(cause.misses / report.missed)}, {effect}")
    first = report.causes[0]
    return Figure(
        title=f"Misses: {words(first.name)} cost {first.misses:,} of {report.missed:,}",
        note="Each miss has one cause: the stage furthest above the median of the requests that met, or the "
        "request's status. The time is the median excess.",
        legend=(),
        svg=plot.svg(),
    )


def kv_figure(instances: Sequence[InstanceUse]) -> Figure | None:
    """Mean and peak use of each instance's KV cache."""
    if not instances:
        return None
    shown = instances[:MAX_ROWS]
    plot = Rows(
        x=Axis.from_zero("KV cache in use", 1.0, "share"),
        labels=[use.instance_id for use in shown],
        about="KV cache in use by instance",
    )
    for row, use in enumerate(shown):
        tip = f"{use.instance_id}: mean {share(use.kv_mean)}, peak {share(use.kv_peak)}"
        plot.bars(row, f"{use.role.value} soft", [(0.0, use.kv_peak, 1.0)], tip)
        plot.bars(row, use.role.value, [(0.0, use.kv_mean, 1.0)], tip)
    fullest = max(instances, key=lambda use: use.kv_peak)
    preemptions = sum(use.preemptions for use in instances)
    return Figure(
        title=f"KV cache: {fullest.instance_id} was the fullest with {share(fullest.kv_peak)}; "
        f"{preemptions:,} preemptions",
        note="Share of each instance's KV cache: strong the mean, pale the peak." + _hidden_rows(instances),
        legend=(("prefill", "prefill instance"), ("decode", "decode instance")),
        svg=plot.svg(),
    )


def instances_figure(facts: Facts) -> Figure | None:
    """What each instance computed when, or its busy share where iterations were not recorded."""
    instances = facts.result.instances
    if not instances:
        return None
    rates = [(use.busy_s / use.present_s, use.instance_id) for use in instances if use.present_s > 0]
    title = "Instances: none was ever ready"
    if rates:
        (most, busiest), (least, idlest) = max(rates), min(rates)
        title = f"Instances: busy from {share(least)} of the time ({idlest}) to {share(most)} ({busiest})"
    draw = _iterations if facts.result.spans else _busy_shares
    svg, note = draw(facts, instances[:MAX_ROWS])
    return Figure(
        title=title,
        note=note + _hidden_rows(instances),
        legend=tuple((kind, kind) for kind in (KINDS if facts.result.spans else KINDS[:2])),
        svg=svg,
        wide=True,
    )


def _busy_shares(facts: Facts, shown: Sequence[InstanceUse]) -> tuple[str, str]:
    """The plot without recorded iterations, and how to read it."""
    x = Axis.from_zero("busy share of the time present", 1.0, "share")
    plot = Rows(x=x, labels=[use.instance_id for use in shown], about="Busy share by instance", width=WIDE)
    for row, use in enumerate(shown):
        busy = use.busy_s / use.present_s if use.present_s > 0 else 0.0
        plot.bars(row, use.role.value, [(0.0, busy, 1.0)], f"{use.instance_id}: {share(busy)} busy")
    return plot.svg(), "Iterations were not recorded; a run with a timeline shows here what ran when."


def _iterations(facts: Facts, shown: Sequence[InstanceUse]) -> tuple[str, str]:
    """The plot of recorded iterations, and how to read it."""
    labels = [use.instance_id for use in shown]
    plot = Rows(x=facts.time_axis(), labels=labels, about="Iterations by instance over time", width=WIDE)
    facts.mark_faults(plot)
    bins = Bins.of(facts.result, max(40, min(400, BARS_IN_ALL // len(shown))))
    ran = computing(facts.result.spans, bins)
    for row, instance_id in enumerate(labels):
        for kind, bars in _row_of_iterations(ran.get(instance_id, {}), bins).items():
            plot.bars(row, kind if kind in KINDS else "status", bars, f"{instance_id}: {kind}")
    return plot.svg(), f"What ran when; the height is the share of {duration(bins.width_s)} that it took."


def _row_of_iterations(
    kinds: dict[str, list[float]], bins: Bins
) -> dict[str, list[tuple[float, float, float]]]:
    """Bars by kind of iteration; kinds that share a stretch stand side by side in it."""
    pieces: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    for place in range(bins.count):
        shares = {kind: ran[place] for kind, ran in kinds.items() if ran[place] > 0.005}
        height = min(1.0, sum(shares.values()))
        start_s = bins.start_s + place * bins.width_s
        for kind, ran in shares.items():
            end_s = start_s + bins.width_s * ran / sum(shares.values())
            last = pieces[kind][-1] if pieces[kind] else None
            # Equal neighbours are one bar, which is half of the page's size for a steady load.
            if last and math.isclose(last[1], start_s) and abs(last[2] - height) < 0.02:
                pieces[kind][-1] = (last[0], end_s, last[2])
            else:
                pieces[kind].append((start_s, end_s, height))
            start_s = end_s
    return pieces


def _hidden_rows(instances: Sequence[InstanceUse]) -> str:
    hidden = len(instances) - MAX_ROWS
    return f" {hidden} more instances are not drawn." if hidden > 0 else ""
