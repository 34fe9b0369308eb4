"""SLO classes: the command line, the file and its errors, who gets which class."""

import math
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from cluster.errors import SpecError
from cluster.request import NO_SLO, Slo
from deploy.slo_classes import SloClass, assign_slo_classes, load_slo_classes, parse_slo
from deploy.workload import WorkloadRequest


def request(input_tokens: int, session_id: str | None = None) -> WorkloadRequest:
    return WorkloadRequest(arrival_s=0.0, input_tokens=input_tokens, output_tokens=1, session_id=session_id)


def classes(tmp_path: Path, text: str) -> tuple[SloClass, ...]:
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    return load_slo_classes(path)


def test_bounds_on_the_command_line_are_one_class() -> None:
    assert parse_slo(["ttft:300", "tpot:50"]) == (
        SloClass(name="all", slo=Slo(ttft_s=0.3, tpot_s=0.05), share=1.0),
    )
    assert parse_slo(["tpot:50"])[0].slo == Slo(tpot_s=0.05)
    assert [one.slo for one in parse_slo([])] == [NO_SLO]


@pytest.mark.parametrize("words", [["ttft:x"], ["ttft:1", "e2e:3"], ["ttft:1", "ttft:2"], ["tpot:-1"]])
def test_bad_bounds_name_the_option(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^slo: .*one file of classes"):
        parse_slo(words)


def test_a_file_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(
        "classes:\n"
        "  - {name: chat, ttft_ms: 300, tpot_ms: 50, input_below: 4000}\n"
        "  - {name: paid, ttft_ms: 1000, share: 0.25}\n"
        "  - {name: batch}\n"
    )
    assert parse_slo([str(path)]) == (
        SloClass(name="chat", slo=Slo(ttft_s=0.3, tpot_s=0.05), input_below=4000),
        SloClass(name="paid", slo=Slo(ttft_s=1.0), share=0.25),
        SloClass(name="batch", slo=NO_SLO, share=0.75),
    )


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("classes: []", "classes", "at least 1"),
        ("clases: []", "classes", "(missing)"),
        ("- 1", "", "expected a mapping"),
        ("", "", "expected a mapping"),
        ("classes: [3]", "classes.0", "expected a mapping"),
        ("classes: [{name: a, ttft: 3}]", "classes.0.ttft", "ttft_ms"),
        ("classes: [{name: a, ttft_ms: 0}]", "classes.0.ttft_ms", "greater than 0"),
        ("classes: [{name: a, tpot_ms: .inf}]", "classes.0.tpot_ms", "finite"),
        ("classes: [{name: a, tpot_ms: soon}]", "classes.0.tpot_ms", "'soon'"),
        ("classes: [{name: a, share: 1.5}]", "classes.0.share", "less than or equal to 1"),
        ("classes: [{ttft_ms: 3}]", "classes.0.name", "(missing)"),
        ("classes: [{name: a}, {name: a, share: 0.1}]", "classes.1.name", "a name of its own"),
        ("classes: [{name: a, share: 0.5, input_below: 9}, {name: b}]", "classes.0", "'share' or"),
        ("classes: [{name: a}, {name: b}]", "classes.1", "'a' does"),
        ("classes: [{name: a, share: 0.5}, {name: b, share: 0.4}]", "classes", "shares of 0.9"),
        ("classes: [{name: a, share: 0.5}, {name: b, share: 0.6}]", "classes", "shares of 1.1"),
        ("classes: [{name: a, share: 1}, {name: b}]", "classes.1", "leave nothing"),
        ("classes: [{name: a, input_below: 9}]", "classes", "for the rest"),
        (
            "classes: [{name: a, input_below: 9}, {name: b, input_below: 9}, {name: c}]",
            "classes.1.input_below",
            "all prompts below 9",
        ),
        ("classes: [", "", "must be YAML"),
    ],
)
def test_a_bad_file_says_where_and_what(tmp_path: Path, text: str, where: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        classes(tmp_path, text)
    assert caught.value.facts["path"] == where
    assert caught.value.facts["file"] == str(tmp_path / "classes.yaml")
    assert said in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"ttft:300 tpot:50"):
        parse_slo([str(tmp_path / "none.yaml")])


def test_thirds_make_a_whole(tmp_path: Path) -> None:
    third = 1 / 3
    text = f"classes: [{{name: a, share: {third}}}, {{name: b, share: {third}}}, {{name: c, share: {third}}}]"
    assert len(classes(tmp_path, text)) == 3


def test_length_first_then_shares(tmp_path: Path) -> None:
    rules = classes(
        tmp_path,
        "classes: [{name: s, input_below: 10}, {name: paid, share: 0.25}, {name: m, input_below: 20},"
        " {name: rest}]",
    )
    requests = [request(n % 40 + 1) for n in range(40_000)]
    assigned = assign_slo_classes(requests, rules, Random(1))
    for one, chosen in zip(requests, assigned, strict=True):
        expected = {"s"} if one.input_tokens < 10 else {"m"} if one.input_tokens < 20 else {"paid", "rest"}
        assert chosen.name in expected
    counts = Counter(chosen.name for chosen in assigned)
    assert counts["paid"] / (counts["paid"] + counts["rest"]) == pytest.approx(0.25, abs=0.015)
    assert assigned == assign_slo_classes(requests, rules, Random(1))
    assert assigned != assign_slo_classes(requests, rules, Random(2))


def test_a_session_keeps_its_class() -> None:
    rules = (SloClass(name="a", share=0.5), SloClass(name="b", share=0.5))
    requests = [request(5, f"session-{n % 50}") for n in range(500)]
    assigned = assign_slo_classes(requests, rules, Random(3))
    of_session = {(r.session_id, chosen.name) for r, chosen in zip(requests, assigned, strict=True)}
    assert len(of_session) == 50
    assert {name for _, name in of_session} == {"a", "b"}


def test_one_class_takes_all() -> None:
    assigned = assign_slo_classes([request(1), request(10**6)], parse_slo(["ttft:1"]), Random(0))
    assert [chosen.name for chosen in assigned] == ["all", "all"]
    assert assigned[0].slo.tpot_s == math.inf
