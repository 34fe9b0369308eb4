"""Plots as SVG text: axes, lines, marks and rows of bars. Colours are CSS classes of the page around them.

The same calls give the same bytes. Every text is escaped; a line carries its label and the plot its scales,
from which the page's script finds the values under the pointer.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH, WIDE = 640, 1312  # wide: two plots and the space between them, so that texts are of one size
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 12, 42
PLOT_HEIGHT = 260
ROW_LEFT, ROW_HEIGHT = 128, 22
LETTERS_IN_ROW_LABEL = 19
LABEL_HEIGHT, LABEL_LINES = 14, 8
MAX_DECADES = 6

Unit = Literal["count", "share", "seconds"]
Point = tuple[float, float | None]
# Neither XML nor UTF-8 has these.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def escape(text: str) -> str:
    """Text for an element or an attribute of HTML or XML."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", text))


def duration(time_s: float) -> str:
    """A time with three digits and its unit, for example `450 ms`."""
    if time_s and abs(time_s) < 0.9995:
        return f"{time_s * 1000:.3g} ms"
    return f"{time_s:.3g} s" if abs(time_s) < 999.5 else f"{time_s:,.0f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A scale from `low` to `high`, in seconds where the unit is seconds; `log` needs a positive `low`."""

    label: str
    low: float
    high: float
    unit: Unit = "count"
    log: bool = False

    @classmethod
    def from_zero(cls, label: str, highest: float, unit: Unit = "count") -> Axis:
        """From 0 up to the first tick that isn't below `highest`."""
        highest = highest if highest > 0 else 1.0
        scale = cls(label=label, low=0.0, high=highest, unit=unit).scale
        step = _step(highest / scale, 5) * scale
        axis = cls(label=label, low=0.0, high=math.ceil(highest / step * (1 - 1e-9)) * step, unit=unit)
        # Rounded up, it may be written in a larger unit, in which it is no tick.
        return axis if axis.scale == scale else cls.from_zero(label, axis.high, unit)

    @classmethod
    def logarithmic(cls, label: str, values: Iterable[float]) -> Axis:
        """Seconds around all positive values, at most MAX_DECADES up to the largest."""
        known = [value for value in values if 0 < value < math.inf] or [0.001, 1.0]
        high = _round_125(max(known), up=True)
        low = _round_125(max(min(known), high / 10**MAX_DECADES), up=False)
        return cls(label=label, low=low if low < high else high / 10, high=high, unit="seconds", log=True)

    def place(self, value: float) -> float:
        """Where a value is, from 0 to 1; beyond the ends it is at the end."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return min(1.0, max(0.0, share))

    @property
    def scale(self) -> float:
        """Seconds (or shares, or counts) in the unit that the ticks are written in."""
        if self.unit == "share":
            return 0.01
        if self.unit == "count":
            return 1.0
        return 0.001 if self.high < 1 else 1.0 if self.high <= 300 else 60.0 if self.high <= 10800 else 3600.0

    @property
    def title(self) -> str:
        """The label and the unit of the ticks."""
        if self.log:
            return f"{self.label} (logarithmic)"
        if self.unit == "seconds":
            return f"{self.label} ({ {0.001: 'ms', 1.0: 's', 60.0: 'min', 3600.0: 'h'}[self.scale] })"
        return f"{self.label} (%)" if self.unit == "share" else self.label

    def ticks(self) -> list[tuple[float, str]]:
        """(value, text) of the ticks."""
        if self.log:
            return self._log_ticks()
        step = _step((self.high - self.low) / self.scale, 6)
        first, last = (math.floor(end / self.scale / step + 1e-9) for end in (self.low, self.high))
        counts = range(first if first * step * self.scale >= self.low else first + 1, last + 1)
        return [(count * step * self.scale, f"{count * step:,.6g}") for count in counts]

    def _log_ticks(self) -> list[tuple[float, str]]:
        decades = math.log10(self.high / self.low)
        digits = (1, 2, 5) if decades <= 3.1 else (1,)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [float(f"{digit}e{power}") for power in powers for digit in digits]
        near = 1 + 1e-9
        return [(value, duration(value)) for value in values if self.low / near <= value <= self.high * near]


class Plot:
    """Lines and marks over two axes."""

    def __init__(self, *, x: Axis, y: Axis, about: str, labels_low: bool = False) -> None:
        """`about` is what a screen reader says; `labels_low` puts marks' labels where high curves aren't."""
        self._x, self._y, self._about, self._labels_low = x, y, about, labels_low
        self._marks: list[str] = []
        self._labels: list[str] = []

    def line(self, points: Iterable[Point], css: str, label: str) -> None:
        """A line through the points; it is broken where a value is None."""
        parts: list[list[tuple[float, float]]] = [[]]
        for x, y in points:
            if y is not None:
                parts[-1].append((x, y))
            elif parts[-1]:
                parts.append([])
        for part in filter(None, parts):
            # A single point has no length: a short stroke shows it.
            drawn = " ".join(f"{self._at_x(x):.1f},{self._at_y(y):.1f}" for x, y in part)
            if len(part) == 1:
                drawn += f" {self._at_x(part[0][0]) + 1.5:.1f},{self._at_y(part[0][1]):.1f}"
            self._marks.append(
                f'<polyline class="line {css}" data-label="{escape(label)}" points="{drawn}"/>'
            )

    def vertical(self, x: float, css: str, label: str) -> None:
        """A dashed line with its label beside it, each label in a line of its own, so that none overlap."""
        at = self._at_x(x)
        left = at > LEFT + (WIDTH - LEFT - RIGHT) * 0.6
        line = len(self._labels) % LABEL_LINES
        y = (
            PLOT_HEIGHT - BOTTOM - LABEL_HEIGHT * line - 8
            if self._labels_low
            else TOP + LABEL_HEIGHT * line + 11
        )
        self._marks.append(
            f'<line class="mark {css}" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{PLOT_HEIGHT - BOTTOM}"/>'
        )
        self._labels.append(
            f'<text class="note" x="{at + (-4 if left else 4):.1f}" y="{y}" '
            f'text-anchor="{"end" if left else "start"}">{escape(shortened(label, 44))}</text>'
        )

    def svg(self) -> str:
        """The plot as one element."""
        bottom = PLOT_HEIGHT - BOTTOM
        parts = _x_axis(self._x, (LEFT, WIDTH - RIGHT), TOP, bottom, grid=False)
        for value, text in self._y.ticks():
            y = self._at_y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        middle = (TOP + bottom) / 2
        parts.append(
            f'<text class="axis" transform="translate(13 {middle:.1f}) rotate(-90)" text-anchor="middle">'
            f"{escape(self._y.title)}</text>"
        )
        scales = {
            "x": [LEFT, WIDTH - RIGHT, self._x.low, self._x.high, int(self._x.log)],
            "y": [bottom, TOP, self._y.low, self._y.high, int(self._y.log)],
            "units": [self._x.unit, self._y.unit],
        }
        return _svg((WIDTH, PLOT_HEIGHT), self._about, [*parts, *self._marks, *self._labels], scales)

    def _at_x(self, value: float) -> float:
        return LEFT + self._x.place(value) * (WIDTH - LEFT - RIGHT)

    def _at_y(self, value: float) -> float:
        return PLOT_HEIGHT - BOTTOM - self._y.place(value) * (PLOT_HEIGHT - BOTTOM - TOP)


class Rows:
    """Bars over one axis, a row for each label."""

    def __init__(self, *, x: Axis, labels: Sequence[str], about: str, width: int = WIDTH) -> None:
        self._x, self._labels, self._about, self._width = x, labels, about, width
        self._marks: list[str] = []

    def bars(self, row: int, css: str, pieces: Iterable[tuple[float, float, float]], tip: str) -> None:
        """Bars of one colour as (from, to, height 0 to 1); the tip is shown under the pointer."""
        base, full = TOP + (row + 1) * ROW_HEIGHT - 4, ROW_HEIGHT - 7
        path = "".join(
            f"M{self._at(low):.1f} {base}V{base - height * full:.1f}H{self._at(high):.1f}V{base}Z"
            for low, high, height in pieces
            if high > low and height > 0
        )
        if path:
            self._marks.append(f'<path class="bar {css}" d="{path}"><title>{escape(tip)}</title></path>')

    def note(self, row: int, at: float, text: str) -> None:
        """A text right of a place in a row."""
        y = TOP + (row + 1) * ROW_HEIGHT - 8
        self._marks.append(f'<text class="note" x="{self._at(at) + 5:.1f}" y="{y}">{escape(text)}</text>')

    def vertical(self, x: float, css: str, label: str) -> None:
        """A dashed line through all rows; the label is shown under the pointer."""
        self._marks.append(
            f'<line class="mark {css}" x1="{self._at(x):.1f}" x2="{self._at(x):.1f}" y1="{TOP}" '
            f'y2="{self._bottom}"><title>{escape(label)}</title></line>'
        )

    def svg(self) -> str:
        """The plot as one element."""
        parts = _x_axis(self._x, (ROW_LEFT, self._width - RIGHT), TOP, self._bottom, grid=True)
        for row, label in enumerate(self._labels):
            y = TOP + (row + 1) * ROW_HEIGHT - 8
            parts.append(
                f'<text class="tick" x="{ROW_LEFT - 8}" y="{y}" text-anchor="end">'
                f"{escape(shortened(label, LETTERS_IN_ROW_LABEL))}<title>{escape(label)}</title></text>"
            )
        return _svg((self._width, self._bottom + BOTTOM), self._about, [*parts, *self._marks], None)

    @property
    def _bottom(self) -> int:
        return TOP + ROW_HEIGHT * max(1, len(self._labels))

    def _at(self, value: float) -> float:
        return ROW_LEFT + self._x.place(value) * (self._width - ROW_LEFT - RIGHT)


def shortened(text: str, letters: int) -> str:
    """At most so many letters."""
    return text if len(text) <= letters else text[: letters - 1] + "\u2026"


def _x_axis(axis: Axis, ends: tuple[int, int], top: int, bottom: int, *, grid: bool) -> list[str]:
    left, end = ends
    parts = [f'<line class="base" x1="{left}" x2="{end}" y1="{bottom}" y2="{bottom}"/>']
    for value, text in axis.ticks():
        x = left + axis.place(value) * (end - left)
        parts.append(
            f'<line class="{"grid" if grid else "base"}" x1="{x:.1f}" x2="{x:.1f}" '
            f'y1="{top if grid else bottom}" y2="{bottom + 4}"/>'
            f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{text}</text>'
        )
    middle = (left + end) / 2
    parts.append(
        f'<text class="axis" x="{middle:.1f}" y="{bottom + 35}" text-anchor="middle">'
        f"{escape(axis.title)}</text>"
    )
    return parts


def _svg(size: tuple[int, int], about: str, parts: Sequence[str], scales: dict[str, object] | None) -> str:
    plot = "" if scales is None else f' data-plot="{escape(json.dumps(scales))}"'
    head = f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(about)}"{plot}>'
    return "\n".join([head, *parts, "</svg>"])


def _step(span: float, at_most: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten with at most so many steps in the span."""
    return _round_125(span / at_most, up=True)


def _round_125(value: float, *, up: bool) -> float:
    power = math.floor(math.log10(value))
    # Written as text: 2 * 10**-3 is not 0.002.
    steps = [float(f"{digit}e{power}") for digit in (1, 2, 5, 10)]
    if up:
        return next(step for step in steps if step >= value * (1 - 1e-9))
    return max(step for step in steps if step <= value * (1 + 1e-9))
