"""Axes, ticks and marks."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deploy.simulator.svg_plot import Axis, Plot, Rows, duration, escape, shortened

AXIS = Axis.from_zero("load", 10.0)


@pytest.mark.parametrize(
    ("highest", "unit", "end", "texts"),
    [
        (10.0, "count", 10.0, ["0", "2", "4", "6", "8", "10"]),
        (9.1, "count", 10.0, ["0", "2", "4", "6", "8", "10"]),
        (0.0, "count", 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (1.0, "share", 1.0, ["0", "20", "40", "60", "80", "100"]),
        (0.3, "seconds", 0.3, ["0", "50", "100", "150", "200", "250", "300"]),
        (24_000.0, "count", 25_000.0, ["0", "5,000", "10,000", "15,000", "20,000", "25,000"]),
    ],
)
def test_axes_from_zero_end_at_a_tick(highest: float, unit: str, end: float, texts: list[str]) -> None:
    axis = Axis.from_zero("x", highest, unit)  # type: ignore[arg-type]
    assert axis.high == pytest.approx(end)
    assert [text for _, text in axis.ticks()] == texts


@pytest.mark.parametrize(
    ("high_s", "title"),
    [(0.5, "time (ms)"), (200.0, "time (s)"), (3600.0, "time (min)"), (86_400.0, "time (h)")],
)
def test_time_has_the_unit_that_fits(high_s: float, title: str) -> None:
    axis = Axis(label="time", low=0.0, high=high_s, unit="seconds")
    assert axis.title == title
    assert 3 <= len(axis.ticks()) <= 8


def test_a_time_axis_may_start_later() -> None:
    axis = Axis(label="time", low=95.0, high=205.0, unit="seconds")
    assert axis.ticks() == [
        (100.0, "100"),
        (120.0, "120"),
        (140.0, "140"),
        (160.0, "160"),
        (180.0, "180"),
        (200.0, "200"),
    ]


def test_logarithmic_axes_end_at_round_values_around_all() -> None:
    axis = Axis.logarithmic("TTFT", [0.013, 0.7, math.inf, 0.0])
    assert (axis.low, axis.high) == (0.01, 1.0)
    assert [text for _, text in axis.ticks()] == [
        "10 ms",
        "20 ms",
        "50 ms",
        "100 ms",
        "200 ms",
        "500 ms",
        "1 s",
    ]
    assert axis.place(0.1) == pytest.approx(0.5)
    assert (axis.place(0.0), axis.place(5.0)) == (0.0, 1.0)
    assert Axis.logarithmic("x", [1e-12, 1.0]).low == pytest.approx(1e-6), (
        "one outlier doesn't squeeze the rest"
    )
    assert Axis.logarithmic("x", []).ticks()
    assert Axis.logarithmic("x", [1.0]).low < 1.0


@settings(deadline=None)
@given(st.floats(min_value=1e-6, max_value=1e9), st.sampled_from(["count", "share", "seconds"]))
@example(9001.0, "seconds")  # rounded up it is written in hours, not minutes
def test_ticks_are_few_and_inside(highest: float, unit: str) -> None:
    axis = Axis.from_zero("x", highest, unit)  # type: ignore[arg-type]
    ticks = [value for value, _ in axis.ticks()]
    assert axis.high >= highest * (1 - 1e-6)
    assert 3 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    assert ticks[0] == 0.0
    assert ticks[-1] == pytest.approx(axis.high)


@settings(deadline=None)
@given(st.lists(st.floats(min_value=1e-9, max_value=1e6), min_size=1, max_size=9))
def test_logarithmic_ticks_are_few_and_inside(values: list[float]) -> None:
    axis = Axis.logarithmic("x", values)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12
    assert all(-1e-9 <= axis.place(value) <= 1 for value, _ in ticks)
    assert axis.high >= max(values) * (1 - 1e-6)


def test_a_line_is_where_its_values_are() -> None:
    plot = Plot(x=AXIS, y=AXIS, about="a plot")
    plot.line([(0.0, 0.0), (10.0, 10.0)], "c0", "all")
    assert 'points="58.0,218.0 622.0,12.0"' in plot.svg()


def test_a_line_is_broken_where_a_value_is_missing() -> None:
    plot = Plot(x=AXIS, y=AXIS, about="a plot")
    plot.line([(0.0, None), (1.0, 1.0), (2.0, 2.0), (3.0, None), (4.0, 4.0)], "c0", "all")
    points = re.findall(r'points="([^"]*)"', plot.svg())
    assert [len(part.split()) for part in points] == [2, 2], "a single point is drawn as a short stroke"


def test_bars_are_where_their_values_are() -> None:
    rows = Rows(x=AXIS, labels=["first", "second"], about="bars")
    rows.bars(1, "decode", [(0.0, 5.0, 1.0), (5.0, 5.0, 1.0), (6.0, 7.0, 0.0)], "half")
    assert re.findall(r' d="([^"]*)"', rows.svg()) == ["M128.0 52V37.0H375.0V52Z"], "nothing without an area"
    rows.bars(0, "decode", [], "nothing")
    assert rows.svg().count("<path") == 1


def test_labels_of_marks_do_not_overlap() -> None:
    plot = Plot(x=AXIS, y=AXIS, about="a plot")
    for at in (1.0, 1.01, 9.9):
        plot.vertical(at, "fault", "a long label")
    notes = [text for text in ET.fromstring(plot.svg()) if text.get("class") == "note"]
    assert len({note.get("y") for note in notes}) == 3
    assert [note.get("text-anchor") for note in notes] == ["start", "start", "end"], "none leaves the plot"


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_text_is_escaped(label: str, about: str) -> None:
    plot = Plot(x=Axis(label=label, low=0.0, high=1.0), y=AXIS, about=about)
    plot.line([(0.0, 1.0)], "c0", label)
    plot.vertical(0.5, "fault", label)
    rows = Rows(x=AXIS, labels=[label], about=about)
    rows.bars(0, "c0", [(0.0, 1.0, 1.0)], label)
    rows.note(0, 1.0, label)
    for svg in (plot.svg(), rows.svg()):
        ET.fromstring(svg.encode())


def test_texts() -> None:
    assert escape("<a b='\"'>&\x00\ud800") == "&lt;a b=&#x27;&quot;&#x27;&gt;&amp;\ufffd\ufffd"
    assert [duration(time_s) for time_s in (0.0, 0.0005, 0.45, 0.9999, 2.5, 1234.0)] == [
        "0 s", "0.5 ms", "450 ms", "1 s", "2.5 s", "1,234 s",
    ]  # fmt: skip
    assert (shortened("decode-0", 8), shortened("decode-10", 8)) == ("decode-0", "decode-\u2026")
