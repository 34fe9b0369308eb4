"""The options that replay and simulate share."""

import argparse
from pathlib import Path

import pytest

from deploy.cli import main
from deploy.workload import WorkloadRequest, mean_rate_rps
from deploy.workload_options import TRACE_HELP, add_workload_options, workload_from


def workload(*words: str) -> list[WorkloadRequest]:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", help=TRACE_HELP)
    add_workload_options(parser)
    return workload_from(parser.parse_args(words))


FIXED = "fixed:rate=2,count=101,input=900,output=100"


def test_a_trace_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n5,1,2\n3,4,5\n")
    assert [(r.arrival_s, r.input_tokens) for r in workload(str(path))] == [(0.0, 4), (2.0, 1)]


def test_limit_and_pace() -> None:
    assert len(workload(FIXED, "--limit", "11")) == 11
    assert mean_rate_rps(workload(FIXED, "--rate", "10")) == pytest.approx(10)
    assert mean_rate_rps(workload(FIXED, "--speedup", "3")) == pytest.approx(6)
    assert mean_rate_rps(workload(FIXED, "--limit", "11", "--rate", "10")) == pytest.approx(10)


@pytest.mark.parametrize(
    ("words", "longest"),
    [
        (["--max-model-len", "400"], (300, 100)),
        (["--max-model-len", "400", "--max-output", "40"], (360, 40)),
        (["--max-output", "40"], (900, 40)),
        (["--max-model-len", "40"], (30, 10)),
    ],
)
def test_lengths_fit_what_is_asked(words: list[str], longest: tuple[int, int]) -> None:
    requests = workload(FIXED, *words)
    assert {(r.input_tokens, r.output_tokens) for r in requests} == {longest}


def test_the_seed_is_of_the_draw() -> None:
    text = "poisson:rate=2,count=10,lengths=conversation"
    assert workload(text) == workload(text, "--seed", "0")
    assert workload(text) != workload(text, "--seed", "1")


@pytest.mark.parametrize(
    "words",
    [["--rate", "1", "--speedup", "2"], ["--limit", "0"], ["--limit", "1.5"], ["--max-output", "-3"]],
)
def test_a_bad_option_ends_the_parsing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        workload(FIXED, *words)
    assert words[-2] in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--rate", "0"], ["--speedup", "nan"], ["--max-model-len", "1"]])
def test_a_bad_value_is_an_error(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"rate_rps|speedup|max_model_len"):
        workload(FIXED, *words)


def test_replay_takes_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "poisson:rate=4,cuont=3"]) == 2
    assert "unknown key 'cuont'" in capsys.readouterr().err
