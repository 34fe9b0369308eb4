"""`pdserve plan` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.spec import load_spec
from deploy.cli import main
from tests.plans import short_trials

__all__ = ["short_trials"]

WORK = ["--isl", "2000", "--osl", "8", "--rate", "5", "--parts", "1", "--jobs", "1"]
SMALL = ["plan", "--model", "llama-3-8b", "--gpu", "h100", "--gpus-total", "2", *WORK]


def test_a_plan_is_printed_and_its_spec_is_what_the_others_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "plan.yaml"
    assert main([*SMALL, "--ttft", "500", "--tpot", "50", "-o", str(spec)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("deployment  ")
    assert f"pdserve up {spec}" in err
    loaded = load_spec(spec)
    assert loaded.slo.classes["all"].ttft_ms == 500
    assert spec.read_text().startswith("# Planned for 4,000 requests at ")
    trace = ["--trace", "gamma:rate=5,count=200,input=2000,output=20,cv=1"]
    assert main(["simulate", str(spec), *trace, "--slo", "ttft:500", "tpot:50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_base_keeps_what_is_no_matter_of_the_plan(tmp_path: Path) -> None:
    base, out = tmp_path / "base.yaml", tmp_path / "plan.yaml"
    base.write_text(
        "name: chat\nmodel: /models/llama\nprefill: {count: 9, env: {A: b}}\ningress: {replicas: 3}\n"
        "engine_options: {dtype: bfloat16, max_model_len: 5}\n"
    )
    words = ["--ttft", "500", "--tpot", "50", "--base", str(base), "-o", str(out)]
    assert main([*SMALL, *words]) == 0
    spec = load_spec(out)
    assert (spec.name, spec.model, spec.ingress.replicas) == ("chat", "/models/llama", 3)
    assert spec.prefill.env == {"A": "b"}
    assert spec.prefill.count + spec.decode.count <= 2
    assert spec.engine_options["dtype"] == "bfloat16"
    assert spec.engine_options["max_model_len"] > 2000


def test_json_is_the_whole_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--ttft", "500", "--tpot", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["goodput_rps"] > 5
    assert found["others"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--ttft", "500", "--tpot", "0.01"], 3, "infeasible: 0.0% of the requests could"),
        (["--ttft", "500", "--tpot", "50", "--attainment", "2"], 2, "--attainment is 2"),
        ([], 2, "give --ttft and --tpot"),
        (["--tpot", "50"], 2, "give --ttft"),
        (["--ttft", "5", "--tpot", "5", "--max-kw", "all=5"], 2, "expected 20, or prefill=12"),
        (["--ttft", "5", "--slo", "x.yaml"], 2, "give --slo, or"),
        (["--ttft", "5", "--tpot", "5", "--sweep", "rate=1:2:1"], 2, "give --html"),
        (["--ttft", "5", "--tpot", "5", "-o", "/no/such/place/plan.yaml"], 2, "there is no directory"),
        (["--ttft", "5", "--trace", "fixed:rate=1,count=9,input=9,output=9"], 2, "where there is no --trace"),
    ],
)
def test_bad_input_is_one_clear_line(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *words]) == code
    out, err = capsys.readouterr()
    assert not out
    assert said in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--model", "llama-3-8b", "--gpu", "h900"], 2, "known: a100-80gb"),
        (["--model", "nobody-7b", "--gpu", "h100"], 2, "known: opt-13b"),
        (["--model", "deepseek-v3", "--gpu", "h100"], 3, "671 GB of weights"),
    ],
)
def test_what_is_not_known_or_can_not_be(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words, *WORK, "--ttft", "500", "--tpot", "50"]) == code
    assert said in capsys.readouterr().err


def test_an_empty_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "empty.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n")
    asked = ["plan", "--model", "llama-3-8b", "--gpu", "h100", "--trace", str(trace), "--ttft", "5"]
    assert main(asked) == 2
    assert "empty.csv" in capsys.readouterr().err
