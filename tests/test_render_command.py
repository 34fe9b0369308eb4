"""`pdserve render` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deploy.cli import main

SPEC = "name: chat\nmodel: org/llama\nprefill: {count: 1}\n"


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def test_serve_prints_what_serve_deploy_takes(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "serve", str(spec)]) == 0
    made = yaml.safe_load(capsys.readouterr().out)
    assert made["applications"][0]["args"]["spec"]["model"] == "org/llama"


def test_kuberay_writes_a_file_and_says_what_is_next(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = spec.with_name("chat.yaml")
    words = ["--image", "i:1", "--namespace", "llm", "--pvc", "weights:/models", "-o", str(out)]
    assert main(["render", "kuberay", str(spec), *words, "--node-selector", "decode:gpu=h200"]) == 0
    (made,) = yaml.safe_load_all(out.read_text())
    assert made["kind"] == "RayService"
    groups = {g["groupName"]: g for g in made["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert groups["decode"]["template"]["spec"]["nodeSelector"] == {"gpu": "h200"}
    said = capsys.readouterr().err
    assert f"kubectl apply -f {out}" in said
    assert "kubectl -n llm port-forward svc/chat-serve-svc 8000" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kuberay"], "give --image"),
        (["kuberay", "--image", "i", "--pvc", "weights"], "expected CLAIM:/PATH"),
        (["kuberay", "--image", "i", "--node-selector", "gpu=h100"], "expected prefill:KEY=VALUE"),
        (["serve", "--model", "llama"], "every machine must find it"),
    ],
)
def test_bad_input_is_one_clear_line(
    spec: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["render", words[0], str(spec), *words[1:]]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert said in err
