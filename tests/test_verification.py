"""A plan beside what came of it; "what came" is a simulation whose engines are not those of the plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import SpecError
from cluster.instance import Role
from cluster.request import NO_SLO, Slo
from cluster.spec import ClusterSpec, parse_spec
from deploy.cli import main
from deploy.replay_report import ReplayReport, RequestOutcome
from deploy.simulator.run import Simulation
from deploy.slo_classes import SloClass
from deploy.verification.calibrate import calibrate, calibrated, read_status
from deploy.verification.outcomes import load_outcomes, save_outcomes
from deploy.verification.verify import at_pace, verify
from deploy.workload_grammar import make_workload

SLO = Slo(ttft_s=0.08, tpot_s=0.012)
RAW: dict[str, Any] = {
    "model": "llama-3-8b",
    "engine_options": {"max_model_len": 8192},
    "policy": "least_tokens",  # lets everybody in
    "sim": {"hardware": "h100"},
}
SPEC = parse_spec(RAW)


def came(spec: ClusterSpec, slo: Slo | None = SLO) -> ReplayReport:
    """What a client would have seen of that cluster."""
    requests = make_workload("poisson:rate=6,count=400,input=1500,output=60", 0)
    classes = [SloClass(name="all", slo=slo or NO_SLO)] * len(requests)
    return ReplayReport(
        url="http://there",
        model="m",
        slo=SLO if slo is None else NO_SLO,
        duration_s=100.0,
        outcomes=tuple(
            RequestOutcome(
                index=one.index,
                status=one.status,
                input_tokens=one.input_tokens,
                output_tokens=one.output_tokens,
                sent_s=one.arrival_s,
                lag_s=0.0,
                end_s=one.end_s,
                ttft_s=one.ttft_s,
                tpot_s=one.tpot_s,
                e2e_s=None,
                max_gap_s=None,
                error=one.error,
                slo_class="all",
                slo=slo,
                asked_tokens=60,
            )
            for one in Simulation(spec, requests, classes).run().requests
        ),
    )


def test_a_cluster_that_does_what_was_planned() -> None:
    found = verify(SPEC, came(SPEC))
    assert found.holds
    assert found.predicted == found.measured
    assert not found.cause
    assert found.pace == {Role.PREFILL: pytest.approx(1.0), Role.DECODE: pytest.approx(1.0)}
    assert 0 < found.busy[Role.PREFILL] < 1
    assert "the plan holds" in found.to_text()


@pytest.mark.parametrize(
    ("pace", "said"),
    [
        ({Role.PREFILL: 1.6}, "prompts take 1.60 times as long as the model says"),
        ({Role.DECODE: 2.5}, "decodes take 2.50 times as long as the model says"),
        (
            {Role.PREFILL: 1.6, Role.DECODE: 2.5},
            "prompts take 1.60 times as long and decodes take 2.50 times",
        ),
    ],
)
def test_engines_that_are_slower_than_the_model_says(pace: dict[Role, float], said: str) -> None:
    found = verify(SPEC, came(at_pace(SPEC, pace)))
    assert not found.holds
    for role, factor in pace.items():
        assert found.pace[role] == pytest.approx(factor, rel=0.03)
    assert said in found.cause
    text = json.loads(json.dumps(found.to_json()))
    assert text["figures"]["attainment"]["error"] > 0.05
    assert text["cause"] == found.cause


def test_a_cluster_that_does_better_holds_and_is_told_why() -> None:
    found = verify(at_pace(SPEC, {Role.PREFILL: 1.6}), came(SPEC))
    assert found.holds
    assert "prompts take 0.6" in found.cause


def test_failures_and_a_late_client_are_named_first() -> None:
    report = came(SPEC)
    broken = tuple(
        replace(one, status="failed", error="503 nobody", output_tokens=0) if one.index % 5 == 0 else one
        for one in report.outcomes
    )  # fmt: skip
    found = verify(SPEC, replace(report, outcomes=broken))
    assert "80 of 400 requests failed; most often (80): 503 nobody" in found.cause
    late = tuple(replace(one, lag_s=0.2, ttft_s=(one.ttft_s or 0) + 0.2) for one in report.outcomes)
    assert "the client was late" in verify(SPEC, replace(report, outcomes=late)).cause


def test_what_no_pace_explains_is_not_explained_by_one() -> None:
    """Half of the requests are slow whatever their neighbours do."""
    report = came(SPEC)
    odd = tuple(
        replace(one, ttft_s=(one.ttft_s or 0) * (6 if one.index % 2 else 1)) for one in report.outcomes
    )
    assert "not the engines' speed" in verify(SPEC, replace(report, outcomes=odd)).cause


def test_bounds_that_were_not_sent_are_those_it_is_judged_by() -> None:
    found = verify(SPEC, came(SPEC, slo=None))
    # Nobody was refused, as nobody said what they need.
    assert found.measured.answered == 1.0
    spec = parse_spec(RAW | {"slo": {"default": "a", "classes": {"a": {"ttft_ms": 1, "tpot_ms": 1}}}})
    report = replace(came(SPEC, slo=None), slo=NO_SLO)
    assert verify(spec, report).measured.attainment == 0.0


def test_without_an_answer_there_is_nothing_to_compare() -> None:
    report = came(SPEC)
    none = tuple(replace(one, status="failed", error="x") for one in report.outcomes)
    with pytest.raises(ValueError, match="nothing to compare"):
        verify(SPEC, replace(report, outcomes=none))


def test_outcomes_are_read_as_they_were_written(tmp_path: Path) -> None:
    report = came(SPEC, slo=None)
    save_outcomes(report, tmp_path / "run.jsonl")
    assert load_outcomes(tmp_path / "run.jsonl") == report
    save_outcomes(came(SPEC), tmp_path / "run.jsonl")
    assert load_outcomes(tmp_path / "run.jsonl") == came(SPEC)


@pytest.mark.parametrize(
    ("text", "where"),
    [("", "line 1"), ("{}", "line 1"), ('{"format": 9}', "line 1"), ("[]", "line 1")],
)
def test_a_file_that_is_none_is_refused_with_its_line(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(SpecError, match=where):
        load_outcomes(path)
    save_outcomes(came(SPEC), path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], '{"index": 1}']))
    with pytest.raises(SpecError, match="line 4"):
        load_outcomes(path)
    with pytest.raises(SpecError, match=r"none\.jsonl"):
        load_outcomes(tmp_path / "none.jsonl")


def status(prefill: tuple[float, int], *decodes: tuple[float, int]) -> dict[str, Any]:
    def row(role: str, factor: float, seen: int) -> dict[str, Any]:
        other = "decode" if role == "prefill" else "prefill"
        pace = {role: {"factor": factor, "seen": seen}, other: {"factor": 1.0, "seen": 0}}
        return {"instance_id": f"{role}-0", "role": role, "pace": pace}

    return {"instances": [row("prefill", *prefill), *(row("decode", *one) for one in decodes)]}


def test_paces_go_back_to_the_spec() -> None:
    spec = parse_spec(RAW | {"sim": {"hardware": "h100", "pace": {"prefill": 1.1}}})
    prefill, decode = calibrate(spec, status((1.2, 50), (0.9, 30), (1.1, 10)))
    assert (prefill.factor, prefill.after) == (pytest.approx(1.2), pytest.approx(1.32))
    # By how much each has seen, in logarithms.
    assert decode.factor == pytest.approx((0.9**30 * 1.1**10) ** (1 / 40))
    assert decode.spread == pytest.approx(1.1 / 0.9)
    raw = calibrated(RAW, [prefill, decode])
    assert parse_spec(raw).sim.pace == {Role.PREFILL: 1.32, Role.DECODE: round(decode.after, 4)}


def test_too_little_or_nothing_to_compare_is_no_calibration() -> None:
    with pytest.raises(ValueError, match="decode instances were compared 12 times"):
        calibrate(SPEC, status((1.2, 50), (0.9, 12)))
    with pytest.raises(ValueError, match="says nothing of its engines' speed"):
        calibrate(parse_spec({"model": "m"}), status((1.2, 50), (0.9, 50)))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, run, seen, out = (tmp_path / name for name in ("p.yaml", "r.jsonl", "s.json", "o.yaml"))
    plan.write_text(yaml.safe_dump(RAW))
    save_outcomes(came(at_pace(SPEC, {Role.PREFILL: 1.6})), run)
    assert main(["verify", "--plan", str(plan), "--replay", str(run)]) == 1
    assert "prompts take 1.60 times" in capsys.readouterr().out
    seen.write_text(json.dumps(status((1.6, 50), (1.0, 50))))
    assert main(["calibrate", str(plan), "--metrics", str(seen), "-o", str(out)]) == 0
    assert "1.600 times" in capsys.readouterr().out
    assert main(["verify", "--plan", str(out), "--replay", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cause"] == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify", "--plan", "{plan}", "--url", "http://127.0.0.1:9"], "give --trace"),
        (["verify", "--plan", "{plan}", "--replay", "x", "--slo", "ttft:3"], "leave --trace, --slo"),
        (["verify", "--plan", "{plan}", "--replay", "none.jsonl"], "none.jsonl"),
        (["calibrate", "{plan}", "--metrics", "none.json"], "none.json"),
        (["calibrate", "{plan}", "--metrics", "none.json", "--trace", "x.csv"], "--metrics is a file"),
        (["calibrate", "{plan}", "--metrics", "http://127.0.0.1:9"], "no pdserve cluster answers"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "p.yaml"
    plan.write_text(yaml.safe_dump(RAW))
    assert main([word.replace("{plan}", str(plan)) for word in words]) != 0
    out, err = capsys.readouterr()
    assert not out
    assert said in err


def test_a_status_is_one(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text("[]")
    with pytest.raises(SpecError, match="no instances in it"):
        read_status(str(path))
