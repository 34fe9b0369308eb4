"""What an ingress costs: CPU time per token and per request, beside vLLM's own one-machine server.

Both serve the same twin engine (`cluster.sim_engine`), which computes nothing and emits tokens as fast as it
is asked; what is measured is the CPU time of the server's process alone. Three servers:

- `vllm`: vLLM's OpenAI server with its own client, the twin behind vLLM's own engine protocol;
- `ingress`: our ingress' app in a plain uvicorn, twins behind our wire, every request split;
- `serve`: the same inside Ray Serve with HAProxy, as `pdserve up` deploys it (replica and HAProxy).

    python -m benchmarks.ingress_cost_vllm --model .cache/models/tiny
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmarks.load import stream_load

ROOT = Path(__file__).resolve().parent.parent
STEP_S = 0.005
CONCURRENCY = 64
PROMPT_TOKENS = 128
# Requests and output tokens of the two loads whose difference separates a request's cost from a token's.
SHORT, LONG = (512, 4), (128, 256)
READY_S = 90.0
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def twin_spec(model: str, port: int) -> Any:
    from cluster.spec import ClusterSpec

    return ClusterSpec.model_validate(
        {
            "name": "bench",
            "model": model,
            "served_model_name": "twin",
            "device": "cpu",
            "engine": "sim",
            "engine_options": {"enforce_eager": True, "max_model_len": 4096},
            "sim": {"step_s": STEP_S},
            "ingress": {"port": port, "cpus": 0, "server_options": {"disable_uvicorn_access_log": True}},
        }
    )


# --- processes: python -m benchmarks.ingress_cost_vllm ROLE ...


async def run_twin(instance_id: str, model: str) -> None:
    """A twin behind our wire; prints its address."""
    from cluster.host_zmq import EngineHost
    from cluster.instance import Role
    from cluster.sim_engine import SIM_ENGINE_NAME, SimEngine

    engine = SimEngine.of(twin_spec(model, 1), Role.PREFILL)
    await engine.start(lambda _: None)
    host = EngineHost(engine, engine_name=SIM_ENGINE_NAME, instance_id=instance_id, incarnation="1")
    print(await host.bind("127.0.0.1"), flush=True)
    await host.serve()


async def run_vllm_twin(model: str, inputs: str, outputs: str) -> None:
    """The same twin behind vLLM's own engine protocol (vllm/v1/engine/core.py, EngineCoreProc)."""
    import msgspec
    import zmq
    import zmq.asyncio

    from cluster.instance import Role
    from cluster.sim_engine import SimEngine

    engine = SimEngine.of(twin_spec(model, 1), Role.PREFILL)
    await engine.start(lambda _: None)
    context = zmq.asyncio.Context()
    dealer, push = context.socket(zmq.DEALER), context.socket(zmq.PUSH)
    dealer.setsockopt(zmq.IDENTITY, (0).to_bytes(2, "little"))
    dealer.connect(inputs)
    push.connect(outputs)
    await dealer.send(msgspec.msgpack.encode(_ready_response()))

    async def forward() -> None:
        while True:
            step = await engine.outputs()
            await push.send_multipart(engine.part(step, step.outputs, with_stats=True))

    forwarding = asyncio.create_task(forward())
    while not forwarding.done():
        kind, *frames = await dealer.recv_multipart()
        if kind == b"\x00":
            engine.add(frames)
        elif kind == b"\x01":
            engine.abort(msgspec.msgpack.decode(frames[0]))


def _ready_response() -> dict[str, Any]:
    from cluster.vllm_api import SUPPORTED_VLLM

    return {
        "max_model_len": 4096, "num_gpu_blocks": 1024, "block_size": 128, "dp_stats_address": None,
        "dtype": "torch.bfloat16", "vllm_version": SUPPORTED_VLLM, "world_size": 1, "data_parallel_size": 1,
        "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1,
        "data_parallel_rank": 0, "max_num_seqs": 256, "max_num_batched_tokens": 8192, "instance_id": "twin",
        "supports_lora": False, "max_loras": 0,
    }  # fmt: skip


async def serve_ingress(model: str, port: int, addresses: list[str]) -> None:
    """Our ingress' app in uvicorn, with instances at fixed addresses."""
    import uvicorn
    from prometheus_client import REGISTRY

    from cluster.instance import EngineFacts, Fingerprint, InstanceInfo, InstanceState, Role
    from cluster.metrics import IngressMetrics
    from cluster.registry import Membership
    from cluster.sim_engine import SIM_ENGINE_NAME
    from router.vllm_frontend import ClusterCore
    from router.vllm_server import build_server

    spec = twin_spec(model, port)
    core = ClusterCore(spec, IngressMetrics(REGISTRY), ingress="bench", engine=SIM_ENGINE_NAME)
    app = await build_server(spec, core)
    print_ = Fingerprint(engine=SIM_ENGINE_NAME, model="m", dtype="n", kv_dtype="n", block_size_tokens=16)
    facts = EngineFacts(
        fingerprint=print_,
        max_model_len=4096,
        kv_capacity_tokens=1 << 20,
        kv_bytes_per_token=0,
        max_num_seqs=256,
    )
    instances = tuple(
        InstanceInfo(
            instance_id=f"{role}-0", role=role, engine_index=index, incarnation="1",
            state=InstanceState.READY, address=address, facts=facts,
        )
        for index, (role, address) in enumerate(zip(Role, addresses, strict=True))
    )  # fmt: skip
    core.links.sync(Membership(version=1, instances=instances))
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
    await uvicorn.Server(config).serve()


async def serve_vllm(model: str, port: int, inputs: str, outputs: str) -> None:
    """vLLM's server as vLLM starts it, with an engine that is started elsewhere."""
    import uvicorn

    from cluster import vllm_api
    from cluster.vllm_options import server_arguments

    parser = vllm_api.make_arg_parser(vllm_api.FlexibleArgumentParser())
    words = server_arguments(twin_spec(model, port))
    at = words.index("--kv-transfer-config")
    args = parser.parse_args(words[:at] + words[at + 2 :])
    config = vllm_api.AsyncEngineArgs.from_cli_args(args).create_engine_config(
        vllm_api.UsageContext.OPENAI_API_SERVER
    )
    llm = vllm_api.AsyncLLM.from_vllm_config(
        config, client_addresses={"input_address": inputs, "output_address": outputs}
    )
    tasks = ("generate",)
    app = vllm_api.build_app(args, tasks, config.model_config)
    llm._supported_tasks = tasks
    await vllm_api.init_app_state(llm, app.state, args, tasks)
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
    await uvicorn.Server(config).serve()


# --- the measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server under test: its URL and the processes whose CPU time counts, by name."""

    name: str
    url: str
    processes: dict[str, list[psutil.Process]]

    def cpu_s(self) -> dict[str, float]:
        return {
            name: sum(sum(p.cpu_times()[:2]) for p in processes) for name, processes in self.processes.items()
        }


@contextmanager
def process(*words: str, core: int) -> Iterator[subprocess.Popen[str]]:
    """A process of this module on one core, ended with the block."""
    child = subprocess.Popen(
        ["taskset", "-c", str(core), sys.executable, "-m", "benchmarks.ingress_cost_vllm", *words],
        cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield child
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(10)


@contextmanager
def vllm_server(model: str) -> Iterator[Server]:
    inputs, outputs = (f"ipc:///tmp/pdserve-bench-{os.getpid()}-{name}" for name in ("in", "out"))
    with (
        process("serve-vllm", model, "18301", inputs, outputs, core=0) as server,
        process("vllm-twin", model, inputs, outputs, core=1),
    ):
        yield _ready("vllm", "http://127.0.0.1:18301", {"server": [psutil.Process(server.pid)]})


@contextmanager
def ingress_server(model: str) -> Iterator[Server]:
    with ExitStack() as stack:
        twins = [stack.enter_context(process("twin", f"{r}-0", model, core=1)) for r in ("prefill", "decode")]
        addresses = [twin.stdout.readline().strip() for twin in twins if twin.stdout]
        server = stack.enter_context(process("serve-ingress", model, "18302", *addresses, core=0))
        yield _ready("ingress", "http://127.0.0.1:18302", {"server": [psutil.Process(server.pid)]})


@contextmanager
def ray_server(model: str) -> Iterator[Server]:
    from deploy.ray_up import serving

    with serving(twin_spec(model, 18303), say=lambda _: None) as url:
        everyone = list(psutil.process_iter(["name", "cmdline"]))
        replica = [p for p in everyone if "ServeReplica:bench" in " ".join(p.info["cmdline"] or [])]
        haproxy = [p for p in everyone if p.info["name"] == "haproxy"]
        yield _ready("serve", url, {"server": replica, "haproxy": haproxy})


def _ready(name: str, url: str, processes: dict[str, list[psutil.Process]]) -> Server:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return Server(name=name, url=url, processes=processes)
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"{name} was not ready in {READY_S:g} s")


def measure(server: Server, requests: int, output_tokens: int) -> dict[str, float]:
    """CPU seconds by process of one load."""
    before = server.cpu_s()
    asyncio.run(
        stream_load(
            server.url, model="twin", requests=requests, concurrency=CONCURRENCY,
            prompt_tokens=PROMPT_TOKENS, output_tokens=output_tokens,
        )
    )  # fmt: skip
    return {name: cpu - before[name] for name, cpu in server.cpu_s().items()}


def costs(short_s: float, long_s: float) -> tuple[float, float]:
    """Microseconds per token and per request, from the CPU seconds of the two loads."""
    (n, a), (m, b) = SHORT, LONG
    per_token = (long_s / m - short_s / n) / (b - a)
    return per_token * 1e6, (short_s / n - a * per_token) * 1e6


def benchmark(model: str, rounds: int, with_serve: bool) -> dict[str, Any]:
    """Interleaved rounds over the servers; medians."""
    makers = [vllm_server, ingress_server] + ([ray_server] if with_serve else [])
    rows: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds):
        for make in makers:
            with make(model) as server:
                measure(server, 64, 16)  # warm up
                short, long = measure(server, *SHORT), measure(server, *LONG)
                for name in server.processes:
                    label = server.name if name == "server" else f"{server.name} {name}"
                    rows.setdefault(label, []).append(costs(short[name], long[name]))
                    per_token, per_request = rows[label][-1]
                    print(
                        f"round {number}: {label:<14} {per_token:7.1f} us/token {per_request:8.0f} us/request"
                    )
    medians = {
        name: {
            "us_per_token": statistics.median(v[0] for v in values),
            "us_per_request": statistics.median(v[1] for v in values),
        }
        for name, values in rows.items()
    }
    base = medians["vllm"]
    for row in medians.values():
        row["token_ratio"] = row["us_per_token"] / base["us_per_token"]
        row["request_ratio"] = row["us_per_request"] / base["us_per_request"]
    return medians


def main() -> None:
    roles: dict[str, Any] = {
        "twin": lambda instance_id, model: run_twin(instance_id, model),
        "vllm-twin": run_vllm_twin,
        "serve-vllm": lambda model, port, i, o: serve_vllm(model, int(port), i, o),
        "serve-ingress": lambda model, port, *addresses: serve_ingress(model, int(port), list(addresses)),
    }
    if len(sys.argv) > 1 and sys.argv[1] in roles:
        uvloop.run(roles[sys.argv[1]](*sys.argv[2:]))  # the loop that vLLM's server runs on
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".cache/models/tiny", help="checkpoint for tokenizer and config")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-serve", action="store_true", help="leave Ray Serve out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = benchmark(args.model, args.rounds, not args.no_serve)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"\n{'':<16}{'us/token':>10}{'x vLLM':>8}{'us/request':>12}{'x vLLM':>8}")
    for name, row in result.items():
        print(
            f"{name:<16}{row['us_per_token']:>10.1f}{row['token_ratio']:>8.2f}"
            f"{row['us_per_request']:>12.0f}{row['request_ratio']:>8.2f}"
        )


if __name__ == "__main__":
    main()
