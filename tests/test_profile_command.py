"""`pdserve profile`: options, refusals, and a whole run on the twin."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import EnvironmentProblem, SpecError
from cluster.latency import Batch, ProfiledLatency, load_profile
from deploy.profiler.command import add_profile, run_profile

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("ray", "torch", "vllm", "nixl", "flashinfer", "zmq")
TWIN = """\
model: m
device: cpu
engine: sim
engine_options: {max_model_len: 512, max_num_seqs: 4}
sim: {step_s: 0.0005, prefill_s_per_token: 0.000004}
"""


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_profile(parser.add_subparsers(required=True))
    return parser.parse_args(["profile", *words])


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "twin.yaml"
    path.write_text(TWIN)
    return path


def test_the_twin_of_a_spec_is_profiled(
    spec: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "twin.json"
    args = parse("--spec", str(spec), "--out", str(out), "--max-prompt", "128", "--seconds", "0.1")
    assert run_profile(args) == 0
    profile = load_profile(out)
    assert profile.model == "m (none)"
    assert profile.source.startswith("pdserve profile --spec twin.yaml --role decode")
    # The loop sleeps at least as long as it is told: a busy machine adds to it, nothing makes it less.
    assert ProfiledLatency(profile).iteration_s(Batch(512, 4 * 128**2, 4)) > 0.002
    assert profile.region["decode_requests"] == 4
    assert profile.region["prefill_tokens"] >= 128
    printed = capfd.readouterr()
    assert "decode, held out" in printed.out
    assert "warm-up" in printed.err
    assert "warm-up" not in printed.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--url", "http://h", "--role", "decode"], "--role goes with --spec"),
        (["--spec", "s.yaml", "--shape", "llama-3-8b"], "--shape goes with --kernels"),
        (["--kernels", "--seconds", "3"], "--seconds goes with --spec or --url"),
        (["--kernels"], "--kernels needs --shape and --hardware"),
    ],
)
def test_options_that_do_not_fit_are_refused(words: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        run_profile(parse(*words, "--out", str(tmp_path / "o.json")))


@pytest.mark.parametrize(
    ("out", "told"), [("", "is a directory"), ("absent/o.json", "there is no directory .*absent: create it")]
)
def test_where_nothing_can_be_written_nothing_is_measured(
    out: str, told: str, spec: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        run_profile(parse("--spec", str(spec), "--out", str(tmp_path / out)))


def test_a_bad_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"absent\.yaml"):
        run_profile(parse("--spec", str(tmp_path / "absent.yaml"), "--out", str(tmp_path / "o.json")))


def test_no_server_is_told(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="check that the server is up"):
        run_profile(parse("--url", "http://127.0.0.1:9/v1", "--out", str(tmp_path / "o.json")))


def test_an_unknown_gpu_is_told_with_the_known_ones(tmp_path: Path) -> None:
    words = ["--kernels", "--shape", "llama-3-8b", "--hardware", "abacus", "--out", str(tmp_path / "o.json")]
    with pytest.raises(SpecError, match="h100-80gb"):
        run_profile(parse(*words))


@pytest.mark.parametrize(
    "words",
    [
        ["--out", "o.json"],
        ["--url", "http://h", "--kernels", "--out", "o.json"],
        ["--url", "http://h"],
        ["--url", "http://h", "--out", "o.json", "--seconds", "0"],
        ["--url", "http://h", "--out", "o.json", "--max-prompt", "none"],
    ],
)
def test_incomplete_and_wrong_words_are_refused(words: list[str]) -> None:
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parse(*words)


def test_parsing_loads_nothing_heavy() -> None:
    code = (
        "import argparse, json, sys, deploy.profiler.command as p;"
        "p.add_profile(argparse.ArgumentParser().add_subparsers());"
        f"print(json.dumps([m for m in {(*HEAVY, 'aiohttp')!r} if m in sys.modules]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(found.stdout) == []
