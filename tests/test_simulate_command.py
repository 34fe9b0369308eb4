"""`pdserve simulate`: from files and options to a report, and how a mistake is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import SpecError
from cluster.latency import LatencyProfile
from cluster.spec import UNSPLIT, parse_spec
from deploy.cli import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK, main
from deploy.simulator.command import unsplit

ROOT = Path(__file__).resolve().parent.parent
TRACE = "poisson:rate=20,count=40,input=100,output=10"
SPEC = {
    "model": "m",
    "device": "cpu",
    "prefill": {"count": 1, "tensor_parallel_size": 2},
    "decode": {"count": 2},
    "sim": {"step_s": 0.01, "prefill_s_per_token": 0.0002, "max_model_len": 2048},
}


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return write(tmp_path / "spec.yaml", SPEC)


def write(path: Path, raw: Any) -> Path:
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def simulate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, output, what was said) of a run."""
    code = main(["simulate", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, output, said = simulate(capsys, *arguments, "--json")
    assert code == EXIT_OK, said
    found: dict[str, Any] = json.loads(output)
    return found


def test_a_run_ends_in_a_report(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, spec, "--trace", TRACE, "--slo", "ttft:500", "tpot:50", "--seed", "3")
    assert found["counts"]["ok"] == 40
    assert found["seed"] == 3
    assert found["gpus"] == 4
    assert [one["instance_id"] for one in found["instances"]] == ["prefill-0", "decode-0", "decode-1"]
    assert found["kv_tokens_moved"] == 40 * 100
    assert found["cost"]["events"] > 0


def test_it_is_a_text_for_people_without_json(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, said = simulate(capsys, spec, "--trace", TRACE)
    assert code == EXIT_OK
    assert "40 requests" in said
    assert "1 prefill, 2 decode" in said
    assert all(len(line) <= 100 for line in output.splitlines())


@pytest.mark.parametrize("kind", ["chunked", "whole"])
def test_the_same_gpus_without_the_split(kind: str, spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, spec, "--trace", TRACE, "--unsplit", kind)
    assert found["counts"]["ok"] == 40
    assert found["gpus"] == 4
    assert [one["instance_id"] for one in found["instances"]] == [f"decode-{number}" for number in range(4)]
    assert found["kv_tokens_moved"] == 0
    assert sum(one["prefill_tokens"] for one in found["instances"]) == 40 * 100


def test_unsplit_alone_means_chunked(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone, chunked = (
        report(capsys, spec, "--trace", TRACE, "--unsplit", *kind) for kind in ((), ("chunked",))
    )
    del alone["cost"], chunked["cost"]
    assert alone == chunked


def test_without_the_split_every_instance_is_as_decodes_are() -> None:
    made = unsplit(parse_spec(SPEC | {"engine": "sim"}), chunked=False)
    assert made.policy == UNSPLIT
    assert (made.prefill.count, made.decode.count) == (0, 4)
    assert made.decode.tensor_parallel_size == 1
    assert made.decode.engine_options == {"enable_chunked_prefill": False}


def test_gpus_that_cannot_be_divided_are_told() -> None:
    raw = SPEC | {"engine": "sim", "prefill": {"count": 1}, "decode": {"tensor_parallel_size": 2}}
    with pytest.raises(SpecError, match="the 3 GPUs of both pools must be a multiple"):
        unsplit(parse_spec(raw), chunked=True)


def profiled(tmp_path: Path, largest_prompt: int) -> Path:
    """A spec whose profile was measured on prompts of up to so many tokens."""
    profile = tmp_path / "profile.json"
    LatencyProfile(
        model="m",
        machine="this",
        source="a test",
        prefill=({"base_s": 0.01, "token_s": 0.0001},),  # type: ignore[arg-type]
        decode=({"base_s": 0.01},),  # type: ignore[arg-type]
        region={
            "prefill_tokens": largest_prompt,
            "prefill_attention": 10**9,
            "prefill_requests": 1000,
            "decode_requests": 1000,
            "decode_context_tokens": 10**9,
        },
    ).save(profile)
    raw = SPEC | {"prefill": {"count": 1}, "sim": {"profile": str(profile), "max_model_len": 2048}}
    return write(tmp_path / "profiled.yaml", raw)


@pytest.mark.parametrize(("largest", "trusted"), [(100, False), (100_000, True)])
def test_strict_fails_where_a_profile_is_left_behind(
    largest: int, trusted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = profiled(tmp_path, largest)
    trace = "poisson:rate=20,count=10,input=400,output=5"
    code, output, _ = simulate(capsys, spec, "--trace", trace, "--strict", "--json")
    assert code == (EXIT_OK if trusted else EXIT_FAILED)
    assert bool(json.loads(output)["warnings"]) == (not trusted)
    assert simulate(capsys, spec, "--trace", trace)[0] == EXIT_OK


def test_a_scenario_happens(spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = write(
        tmp_path / "day.yaml", {"faults": [{"kill": "decode-0", "at_s": 0.5}], "cancel_share": 0.2}
    )
    found = report(capsys, spec, "--trace", TRACE, "--scenario", scenario)
    assert "killed decode-0" in str(found["faults"])
    assert sum(found["counts"].values()) == 40


def test_pictures_are_written(spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timeline, page = tmp_path / "t.json", tmp_path / "p.html"
    code, _, said = simulate(capsys, spec, "--trace", TRACE, "--timeline", timeline, "--html", page)
    assert code == EXIT_OK
    assert json.loads(timeline.read_text(encoding="utf-8"))
    assert page.read_text(encoding="utf-8").startswith("<!")
    assert str(timeline) in said
    assert str(page) in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trace", "nothing.csv"], "nothing.csv"),
        (["--trace", "poisson:rate=x,count=1"], "rate"),
        (["--trace", TRACE, "--rate", "0"], "rate"),
        (["--trace", TRACE, "--rate", "nan"], "rate"),
        (["--trace", TRACE, "--speedup", "-1"], "speedup"),
        (["--trace", TRACE, "--slo", "ttft:fast"], "fast"),
        (["--trace", "poisson:rate=1,count=0"], "count"),
        (["--trace", TRACE, "--scenario", "none.yaml"], "none.yaml"),
        (["--trace", TRACE, "--html", "no-such-directory/page.html"], "no-such-directory"),
        (["--trace", TRACE, "--timeline", "no-such-directory/t.json"], "no-such-directory"),
    ],
)
def test_bad_input_is_told_in_one_line(
    arguments: list[str], says: str, spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output, said = simulate(capsys, spec, *arguments)
    assert code == EXIT_BAD_INPUT
    assert output == ""
    assert says in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"policy": "none"}, "none"),
        ({"sim": {"hardware": "h1000"}}, "h1000"),
        ({"sim": {"profile": "none.json"}}, "none.json"),
        ({"sim": {"speed": 1}}, "sim.speed"),
        ({"engine_options": {"max_num_seqs": 5000}}, "max_num_seqs"),
        ({"sim": {"kv_capacity_tokens": 64}}, "max_model_len"),
    ],
)
def test_a_spec_that_cannot_be_simulated_is_told(
    change: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output, said = simulate(capsys, write(tmp_path / "bad.yaml", SPEC | change), "--trace", TRACE)
    assert code == EXIT_BAD_INPUT, said
    assert output == ""
    assert says in said.splitlines()[-1]


def test_a_spec_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = simulate(capsys, "none.yaml", "--trace", TRACE)
    assert code == EXIT_BAD_INPUT
    assert "none.yaml" in said
    assert len(said.splitlines()) == 1


def test_a_seed_gives_the_same_bytes_in_every_process(spec: Path, tmp_path: Path) -> None:
    scenario = write(
        tmp_path / "day.yaml",
        {"faults": [{"kill": "decode-0", "at_s": 0.5}], "cancel_share": 0.2, "state_delay_s": 0.1},
    )
    told = []
    for hash_seed in ("1", "2"):
        command = ["simulate", str(spec), "--trace", TRACE, "--scenario", str(scenario), "--json"]
        output = subprocess.run(
            [sys.executable, "-m", "deploy.cli", *command],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout
        before, cost, _ = output.partition(b'"cost"')
        assert cost
        told.append(before)
    assert told[0] == told[1]


def test_groups_without_the_split_are_whole() -> None:
    decode = {"count": 4, "data_parallel_size": 4}
    spec = parse_spec({"model": "m", "prefill": {"count": 4}, "decode": decode})
    assert unsplit(spec, chunked=True).groups() == [
        tuple(f"decode-{n}" for n in range(first, first + 4)) for first in (0, 4)
    ]
    odd = parse_spec({"model": "m", "prefill": {"count": 2}, "decode": decode})
    with pytest.raises(SpecError, match=r"decode.data_parallel_size.*the 6 GPUs of both pools"):
        unsplit(odd, chunked=True)
