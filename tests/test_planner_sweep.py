"""Curves of what if."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from deploy.planner.plan import Plan
from deploy.planner.report import page
from deploy.planner.search import plan
from deploy.planner.sweep import Sweep, curves_of, sweep, sweep_figure
from deploy.planner.workers import Here
from tests.plans import goal_of, short_trials

__all__ = ["short_trials"]


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan(goal_of(gpus=2, seeds=1))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("rate=1:8:2x", (1, 2, 4, 8)),
        ("isl=500:2000:500", (500, 1000, 1500, 2000)),
        ("slo_scale=0.5:2:2x", (0.5, 1, 2)),
    ],
)
def test_a_range_is_its_values(text: str, values: tuple[float, ...]) -> None:
    assert Sweep.parse(text).values == pytest.approx(values)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rate",
        "rate=1:2",
        "speed=1:2:1",
        "rate=2:1:1",
        "rate=1:2:1x",
        "rate=1:2:0",
        "rate=0:2:1",
        "isl=a:b:c",
    ],
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected one of rate, slo_scale, isl, gpus"):
        Sweep.parse(text)
    with pytest.raises(ValueError, match="larger step"):
        Sweep.parse("rate=1:100:1")


def test_attainment_falls_with_the_rate(made: Plan) -> None:
    range_, curves = sweep(made.goal, made, "rate=2:32:4x", jobs=2, say=lambda line: None)
    text = page(made, (range_, curves))
    ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    assert text.count("<polyline") == 3
    assert curves == curves_of(made.goal, made, range_, Here(made.goal), lambda line: None)
    for curve in curves.values():
        shares = [share for _, share in curve if share is not None]
        assert shares[0] > shares[-1]


def test_goodput_rises_with_looser_bounds_and_shorter_prompts(made: Plan) -> None:
    goal = made.goal
    here = Here(goal)
    (loose, *_) = curves_of(goal, made, Sweep.parse("slo_scale=1:2:2x"), here, lambda line: None).values()
    assert loose[0][1] is not None
    assert loose[1][1] is not None
    assert loose[0][1] < loose[1][1]
    (shorter, *_) = curves_of(goal, made, Sweep.parse("isl=1000:3000:2000"), here, lambda line: None).values()
    assert shorter[0][1] is not None
    assert shorter[0][1] > (shorter[1][1] or 0.0)


def test_gpus_are_planned_for_anew(made: Plan) -> None:
    goal = replace(made.goal, requests=made.goal.requests[:700])
    curves = curves_of(goal, made, Sweep.parse("gpus=1:2:1"), Here(goal), lambda line: None)
    assert curves["split"][0][1] is None  # one GPU can't be split
    assert curves["unsplit"][0][1] is not None
    assert curves["split"][1][1] is not None
    assert "goodput" in sweep_figure(goal, Sweep.parse("gpus=1:2:1"), curves).svg


def test_a_page_says_what_was_chosen_and_what_lost(made: Plan) -> None:
    text = page(made)
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    words = " ".join(root.itertext())
    assert str(made.chosen.deployment) in words
    for one in made.others:
        assert str(one.deployment) in words
        assert one.bottleneck in words
    assert text == page(made)
