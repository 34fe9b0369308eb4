"""What the figures of a simulation's page are made of, and what each of them is."""

from __future__ import annotations

from dataclasses import dataclass

from deploy.simulator.groups import RequestGroup
from deploy.simulator.report import SimulationReport
from deploy.simulator.result import SimulatedRequest, SimulationResult
from deploy.simulator.series import Bins
from deploy.simulator.svg_plot import Axis, Plot, Rows

MAX_CLASSES = 6  # as many as there are colours that are easily told apart
MAX_MARKS = 8
CLASS_COLOURS = tuple(f"c{place}" for place in range(MAX_CLASSES))
Legend = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A plot with what it says.

    Attributes:
        title: the finding, in a line; note: how to read it.
        legend: (CSS class, label) of the colours.
        svg: the plot.
        lines: the legend is about lines, not about areas.
        wide: over the whole page.
    """

    title: str
    note: str
    legend: Legend
    svg: str
    lines: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the figures are made of.

    `shown` are the SLO classes that are drawn, as (CSS class, group, its requests).
    """

    result: SimulationResult
    report: SimulationReport
    bins: Bins
    shown: tuple[tuple[str, RequestGroup, tuple[SimulatedRequest, ...]], ...]

    @classmethod
    def of(cls, result: SimulationResult, report: SimulationReport) -> Facts:
        members: dict[tuple[str, object], list[SimulatedRequest]] = {}
        for request in result.requests:
            members.setdefault((request.slo_class, request.slo), []).append(request)
        largest = sorted(report.classes, key=lambda group: -sum(group.counts.values()))[:MAX_CLASSES]
        shown = [group for group in report.classes if any(group is one for one in largest)]
        return cls(
            result=result,
            report=report,
            bins=Bins.of(result),
            shown=tuple(
                (css, group, tuple(members[group.name, group.slo]))
                for css, group in zip(CLASS_COLOURS, shown, strict=False)
            ),
        )

    @property
    def legend(self) -> Legend:
        """The classes, and all requests where there is more than one class."""
        every = (("all", "all requests"),) if len(self.report.classes) > 1 else ()
        return (*((css, group.name) for css, group, _ in self.shown), *every)

    @property
    def hidden_classes(self) -> str:
        """A sentence about the classes that are not drawn."""
        hidden = len(self.report.classes) - len(self.shown)
        return f" {hidden} smaller SLO classes are only in the line of all requests." if hidden > 0 else ""

    def time_axis(self) -> Axis:
        bins = self.bins
        low_s = 0.0 if bins.start_s < bins.width_s else bins.start_s  # a tick at 0 is worth an empty pixel
        return Axis(label="virtual time", low=low_s, high=bins.end_s, unit="seconds")

    def mark_faults(self, plot: Plot | Rows) -> None:
        """A line at each of the first faults."""
        for mark in self.result.faults[:MAX_MARKS]:
            if self.bins.start_s <= mark.at_s <= self.bins.end_s:
                plot.vertical(mark.at_s, "fault", mark.text)


def words(name: str) -> str:
    """The name of a stage or a status for people."""
    return name.replace("_", " ")
