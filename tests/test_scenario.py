"""Scenario files: what is read, and how a mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import SpecError
from cluster.spec import parse_spec
from deploy.simulator.scenario import QUIET, Cut, Kill, Slow, load_scenario, parse_scenario

SPEC = parse_spec({"model": "m", "engine": "sim", "prefill": {"count": 1}, "decode": {"count": 2}})


def test_a_scenario_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bad-day.yaml"
    path.write_text(
        "faults:\n"
        "  - {kill: prefill-0, at_s: 3}\n"
        "  - {slow: decode-1, at_s: 0, factor: 2.5, for_s: 10}\n"
        "  - {cut: [prefill-0, decode-1], at_s: 1.5}\n"
        "cancel_share: 0.1\n",
        encoding="utf-8",
    )
    scenario = load_scenario(path, SPEC)
    assert scenario.faults == (
        Kill(kill="prefill-0", at_s=3),
        Slow(slow="decode-1", at_s=0, factor=2.5, for_s=10),
        Cut(cut=("prefill-0", "decode-1"), at_s=1.5),
    )
    assert [fault.instances for fault in scenario.faults] == [
        ("prefill-0",),
        ("decode-1",),
        ("prefill-0", "decode-1"),
    ]
    assert scenario.cancel_share == 0.1
    assert scenario.restart_s == QUIET.restart_s


def test_an_empty_file_is_a_quiet_day(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("", encoding="utf-8")
    assert load_scenario(path, SPEC) == QUIET


@pytest.mark.parametrize(
    ("raw", "path", "value", "says"),
    [
        ({"fault": []}, "fault", [], "no such key; the keys here are cancel_share"),
        ({"faults": [{"kill": "decode-0", "at": 1, "at_s": 1}]}, "faults.0.at", 1, "here are at_s, kill"),
        ({"cancel_share": 1.5}, "cancel_share", 1.5, "less than or equal to 1"),
        ({"restart_s": -1}, "restart_s", -1, "greater than or equal to 0"),
        (
            {"faults": [{"kill": "decode-2", "at_s": 1}]},
            "faults.0",
            "decode-2",
            "prefill-0, decode-0, decode-1",
        ),
        ({"faults": [{"kill": "decode-0"}]}, "faults.0.at_s", "(missing)", "required"),
        ({"faults": [{"kill": "decode-0", "at_s": -1}]}, "faults.0.at_s", -1, "greater than or equal to 0"),
        (
            {"faults": [{"kill": "decode-0", "at_s": 0}, {"slow": "decode-0", "at_s": 0, "factor": 0}]},
            "faults.1.factor",
            0,
            "greater than 0",
        ),
        ({"faults": [{"cut": ["decode-0"], "at_s": 0}]}, "faults.0.cut.1", "(missing)", "required"),
        ({"faults": [{"cut": ["prefill-0", "x"], "at_s": 0}]}, "faults.0", "x", "the instances are"),
        ({"faults": [{"pause": "decode-0", "at_s": 0}]}, "faults.0", None, "one of kill, slow, cut"),
        ({"faults": [{"kill": "decode-0", "slow": "decode-0", "at_s": 0}]}, "faults.0", None, "one of"),
        ({"faults": ["kill"]}, "faults.0", "kill", "one of kill, slow, cut"),
        ({"faults": {"kill": "decode-0"}}, "faults", None, "valid tuple"),
        ({"faults": 3}, "faults", 3, "valid tuple"),
        ([], "", [], "valid dictionary"),
    ],
)
def test_a_mistake_is_told_with_file_path_value_and_what_is_allowed(
    raw: Any, path: str, value: Any, says: str
) -> None:
    with pytest.raises(SpecError) as caught:
        parse_scenario(raw, SPEC, file="day.yaml")
    error = caught.value
    assert error.file == "day.yaml"
    assert error.path == path
    assert value is None or error.value == value
    assert says in error.allowed
    assert "\n" not in str(error)


@pytest.mark.parametrize(("text", "says"), [("faults: [", "must be YAML"), (None, "readable YAML file")])
def test_an_unreadable_file_is_told(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "day.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=says) as caught:
        load_scenario(path, SPEC)
    assert caught.value.file == str(path)


def test_of_many_instances_a_few_are_named() -> None:
    spec = parse_spec({"model": "m", "engine": "sim", "decode": {"count": 50}})
    with pytest.raises(SpecError) as caught:
        parse_scenario({"faults": [{"kill": "decode-50", "at_s": 0}]}, spec)
    assert caught.value.allowed.endswith("decode-6, ...")
