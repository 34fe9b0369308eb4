"""The page of a simulation: well-formed, self-contained, and drawn where the values are."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings

from cluster.instance import Role
from cluster.request import NO_SLO
from deploy.simulator.bars import MAX_ROWS
from deploy.simulator.facts import Figure
from deploy.simulator.figures import all_figures
from deploy.simulator.page import SCRIPT, STYLE, page, write_page
from deploy.simulator.report import SimulationReport
from deploy.simulator.result import FaultMark, IterationSpan, SimulationResult
from tests import simulated
from tests.simulated import request, result, use
from tests.test_simulation_report import MIXED

SPANS = (
    IterationSpan("prefill-0", 0.0, 40.0, "prefill", 9, 64, 0),
    IterationSpan("decode-0", 20.0, 100.0, "decode", 99, 0, 4),
)


def figures(found: SimulationResult) -> list[Figure]:
    return all_figures(found, SimulationReport.of(found))


def titled(found: SimulationResult, start: str) -> Figure:
    (figure,) = [figure for figure in figures(found) if figure.title.startswith(start)]
    return figure


def coordinates(svg: ET.Element) -> Iterator[tuple[float, float]]:
    """Every point of every mark."""
    for mark in svg.iter():
        for pair in mark.get("points", "").split():
            x, y = pair.split(",")
            yield float(x), float(y)
        for at in ("", "1", "2"):
            if mark.get(f"x{at}") and mark.get(f"y{at}"):
                yield float(mark.attrib[f"x{at}"]), float(mark.attrib[f"y{at}"])
        for bar in re.findall(r"M(\S+) (\S+?)V(\S+?)H(\S+?)V", mark.get("d", "")):
            left, base, top, right = map(float, bar)
            yield from ((left, base), (right, top))


def test_the_titles_say_what_is_seen() -> None:
    titles = [figure.title for figure in figures(MIXED)]
    assert titles == [
        "TTFT: 1 of 4 complete answers (25.0%) were beyond their bound",
        "TPOT: 1 of 4 complete answers (25.0%) were beyond their bound",
        "Attainment: 60.0% overall, 0.0% at its lowest (about 18.8 s)",
        "Load: 0.06 requests/s on average, 0.4 at the peak",
        "Queues: up to 0.808 requests wait at once (about 6.25 s)",
        "Work: up to 1.15 requests are in work at once (about 18.8 s)",
        "Before the first token: 84.9% of the time is prefill queue",
        "After the first token: 99.4% of the time is decode",
        "Misses: rejected cost 1 of 2",
        "KV cache: prefill-0 was the fullest with 90.0%; 3 preemptions",
        "Instances: busy from 40.0% of the time (decode-0) to 100.0% (prefill-1)",
    ]


def test_a_bound_is_drawn_where_it_is() -> None:
    # Two requests of 0.5 s and 2 s: the axis goes from 0.5 s to 2 s, and the bound of 1 s is in its middle.
    figure = titled(result(request((0.1, 0.4)), request((1.6, 0.4))), "TTFT")
    assert re.search(r'class="mark c0" x1="340.0" x2="340.0"', figure.svg)
    assert "chat: 1 s" in figure.svg
    assert 'points="58.0,115.0 622.0,12.0"' in figure.svg, "half of the answers left, all right"


def test_iterations_are_drawn_where_they_were() -> None:
    ran = titled(result(request((100.0,)), spans=SPANS), "Instances")
    # 128 to 1294 is 0 to 100 s: from 20 s on is from 361.2 on.
    assert "M128.0 30V15.0H594.4V30Z" in ran.svg
    assert "M361.2 52V37.0H1294.0V52Z" in ran.svg


def test_without_iterations_the_busy_shares_are_drawn() -> None:
    busy = titled(result(request((1.0,))), "Instances")
    assert "prefill-0: 40.0% busy" in busy.svg
    assert "not recorded" in busy.note


def test_many_instances_and_classes_are_cut_and_it_is_said() -> None:
    many = result(
        *[request((0.1,), slo_class=f"class {number}") for number in range(9)],
        instances=tuple(use(Role.DECODE, number) for number in range(MAX_ROWS + 2)),
    )
    assert "2 more instances are not drawn" in titled(many, "Instances").note
    assert "3 smaller SLO classes" in titled(many, "TTFT").note
    assert len(titled(many, "TTFT").legend) == 7


def test_warnings_and_faults_are_on_the_page() -> None:
    text = page(MIXED)
    assert "<li>decode_requests reached 512, measured up to 256</li>" in text
    assert text.index("Read before you trust") < text.index("SLO attainment")
    assert text.count(">decode-0 killed</text>") == 4


def test_names_are_escaped() -> None:
    evil = "</script><script>alert(1)</script>"
    found = result(
        request((9.0,), slo_class=evil, error=evil),
        name=evil,
        warnings=(evil,),
        faults=(FaultMark(0.5, evil),),
        instances=(use(instance_id=evil),),
    )
    assert page(found).count("<script>") == 1


def test_the_page_needs_nothing_else() -> None:
    text = page(MIXED)
    assert not re.search(r"(?:src|href)=|url\(|@import|https?:", text)


def test_a_large_page_is_small(tmp_path: Path) -> None:
    requests = [
        request((0.1 + number % 97 / 50, 0.2, 0.01, 0.02, 0.1, 2.0), arrival_s=number / 40, slo=NO_SLO)
        for number in range(4000)
    ]
    spans = tuple(
        IterationSpan(f"{role}-0", at / 50, at / 50 + 0.001 * (at * at % 19), role, 1, 1, 1)
        for role in ("prefill", "decode")
        for at in range(5000)
    )
    path = tmp_path / "page.html"
    write_page(result(*requests, spans=spans), path)
    assert path.stat().st_size < 200_000


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, WCAG 2.2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_are_seen_in_both_modes(mode: int) -> None:
    block = re.findall(r":root \{(.*?)\}", STYLE.read_text(encoding="utf-8"), flags=re.S)[mode]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    for name in ("ink", "quiet"):
        assert contrast(colours[name], colours["card"]) >= 4.5, "WCAG 1.4.3, text"
    assert contrast(colours["warn-ink"], colours["warn"]) >= 4.5
    for name in ("blue", "green", "orange", "purple", "pink", "olive", "fault", "status"):
        assert contrast(colours[name], colours["card"]) >= 3, f"WCAG 1.4.11, graphics: {name}"


def test_every_colour_of_a_figure_is_in_the_style() -> None:
    style = STYLE.read_text(encoding="utf-8")
    used = {css for figure in figures(MIXED) for css, _ in figure.legend}
    assert used
    assert {css for css in used if not re.search(rf"\.{css}\b", style)} == set()


def test_style_and_script_can_stand_in_xml() -> None:
    for path in (STYLE, SCRIPT):
        assert not set("<&") & set(path.read_text(encoding="utf-8")), path.name


@settings(max_examples=60, deadline=None)
@given(simulated.results())
def test_any_result_is_a_page_with_everything_inside_its_plots(found: SimulationResult) -> None:
    text = page(found)
    assert text == page(found)
    root = ET.fromstring(text.encode())
    for svg in root.iter("svg"):
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        for x, y in coordinates(svg):
            assert -0.1 <= x <= width + 0.1
            assert -0.1 <= y <= height + 0.1
