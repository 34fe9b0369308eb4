"""A cluster of twins in real Ray actors behind Ray Serve: supervision, death, drain."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from cluster.sim_engine import SIM_ENGINE_NAME
from cluster.spec import ClusterSpec
from deploy.cli import main
from deploy.status import fetch_status, read_metric
from deploy.tiny_model_torch import build_tiny_model
from tests.twins import expected_tokens

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PORT = 18212
PROMPT = list(range(100, 160))


def twin_spec(model: Path) -> ClusterSpec:
    return ClusterSpec.model_validate(
        {
            "name": "twins",
            "model": str(model),
            "served_model_name": "twin",
            "device": "cpu",
            "engine": "sim",
            "engine_options": {"enforce_eager": True, "max_model_len": 4096},
            "sim": {"step_s": 0.01},
            "prefill": {"count": 2, "cpus": 0.1},
            "decode": {"count": 2, "cpus": 0.1},
            "colocate": 2,
            "ingress": {"port": PORT, "cpus": 0, "replicas": 2},
            "batch": {"directory": str(model.parent / "batches")},
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def haproxies() -> set[int]:
    return {process.pid for process in psutil.process_iter() if process.name() == "haproxy"}


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    from deploy.ray_up import serving

    before = haproxies()
    with serving(twin_spec(model), say=print) as at:
        yield at
    deadline_s = time.monotonic() + 5  # one that was replaced ends when its last connection has
    while (left := haproxies() - before) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not left, "HAProxy outlived the cluster"
    assert not any(
        "twins" in " ".join(p.cmdline()) for p in psutil.process_iter() if p.name().startswith("ray::")
    )


@pytest.fixture
async def client(url: str) -> Any:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def complete(client: Any, count: int, prompt: list[int] = PROMPT) -> list[int]:
    tokens: list[int] = []
    stream = await client.completions.create(
        model="twin", prompt=prompt, max_tokens=count, stream=True, temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    async for chunk in stream:
        tokens += chunk.choices[0].model_extra["token_ids"] or []
    return tokens


def rows(url: str) -> dict[str, dict[str, Any]]:
    return {row["instance_id"]: row for row in fetch_status(url)["instances"]}


async def wait_ready(url: str) -> None:
    async with asyncio.timeout(30):
        while not all(
            row["reachable"] and row["state"] == "ready"
            for row in (await asyncio.to_thread(rows, url)).values()
        ):
            await asyncio.sleep(0.1)


def test_a_plan_is_verified_against_what_runs(
    url: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deploy.render.serve_config import raw

    plan, run = tmp_path / "plan.yaml", tmp_path / "run.jsonl"
    plan.write_text(json.dumps(raw(twin_spec(model))))  # JSON is YAML
    trace = ["--trace", "poisson:rate=40,count=160,input=60,output=30"]
    words = ["verify", "--plan", str(plan), "--url", url, *trace, "--save", str(run), "--json"]
    assert main([*words, "--slo", "ttft:2000", "tpot:200"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figures"]["attainment"]["measured"] == 1.0
    # A twin's iteration takes what the plan says, on any machine at least.
    assert found["figures"]["TPOT, mean"]["measured"] >= 0.0099
    assert main(["verify", "--plan", str(plan), "--replay", str(run)]) == 0
    # What a calibration reads; half a minute of work is needed for one.
    for row in rows(url).values():
        assert row["pace"][row["role"]].keys() == {"factor", "seen"}
        assert 0.5 <= row["pace"][row["role"]]["factor"] <= 2.0


async def test_an_instance_is_drained_while_its_streams_go_on_elsewhere(url: str, client: Any) -> None:
    """Long answers need not end first: they move, and the next life takes new ones."""
    await wait_ready(url)
    before = {name: row["incarnation"] for name, row in (await asyncio.to_thread(rows, url)).items()}
    # Long enough to be there still when a busy machine takes seconds to say what runs, and to drain.
    count = 1000
    streams = [asyncio.create_task(complete(client, count, [200 + n] * 40)) for n in range(20)]
    async with asyncio.timeout(30):
        while True:
            found = await asyncio.to_thread(rows, url)
            # Twins decode many as fast as few, so which of the two gets most is the policy's to say.
            drained = max(("decode-0", "decode-1"), key=lambda name: found[name]["load"]["running"])
            if found[drained]["load"]["running"] >= 5:
                break
            assert [stream.result() for stream in streams if stream.done()] == []
            await asyncio.sleep(0.1)
    began_s = time.monotonic()
    assert await asyncio.to_thread(main, ["drain", drained, "--url", url]) == 0
    took_s = time.monotonic() - began_s
    assert not any(stream.done() for stream in streams), took_s
    assert await asyncio.gather(*streams) == [expected_tokens([200 + n] * 40, count) for n in range(20)]
    assert max(await of_replicas(url, 'pdserve_migrations_total{cause="drain"}')) > 0
    assert max(await of_replicas(url, "pdserve_kv_tokens_recomputed_total")) == 0
    await wait_ready(url)
    after = {name: row["incarnation"] for name, row in (await asyncio.to_thread(rows, url)).items()}
    assert [name for name in after if after[name] != before[name]] == [drained]
    assert await asyncio.to_thread(main, ["drain", "decode-9", "--url", url]) != 0


async def test_twins_serve_behind_the_same_front_end(url: str, client: Any) -> None:
    answers = await asyncio.gather(*(complete(client, 20, [100 + n] * 30) for n in range(40)))
    assert answers == [expected_tokens([100 + n] * 30, 20) for n in range(40)]
    status = await asyncio.to_thread(fetch_status, url)
    assert status["pending"] == status["in_engines"] == 0
    assert {row["facts"]["fingerprint"]["engine"] for row in status["instances"]} == {SIM_ENGINE_NAME}


async def wait_empty(url: str) -> None:
    """Until no instance has a request or a block of KV."""
    async with asyncio.timeout(10):
        while True:
            loads = [row["load"] for row in (await asyncio.to_thread(rows, url)).values()]
            if all(not load["running"] + load["waiting"] and load["kv_usage"] == 0 for load in loads):
                return
            await asyncio.sleep(0.05)


async def test_twins_read_each_others_kv_and_hold_nothing_after(url: str, client: Any) -> None:
    await wait_ready(url)
    prompts = [[400 + n] * (100 + n) for n in range(20)]
    assert await asyncio.gather(*(complete(client, 10, prompt) for prompt in prompts)) == [
        expected_tokens(prompt, 10) for prompt in prompts
    ]
    await wait_empty(url)
    assert max(await of_replicas(url, "pdserve_kv_tokens_moved_total")) > 0
    assert max(await of_replicas(url, "pdserve_kv_tokens_recomputed_total")) == 0


async def of_replicas(url: str, metric: str) -> list[float]:
    """A metric as several connections read it: each is of one replica, and one may have had all requests."""
    return [await asyncio.to_thread(read_metric, url, metric) for _ in range(8)]


async def test_clients_that_leave_leave_nothing_behind(url: str, client: Any) -> None:
    await wait_ready(url)
    streams = [asyncio.create_task(complete(client, 500, [500 + n] * 200)) for n in range(20)]
    for number, stream in enumerate(streams):
        await asyncio.sleep(0.01 * (number % 5))  # some in their prefill, some reading, some decoding
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    await wait_empty(url)


def batch_line(custom_id: str, prompt: list[int], **body: Any) -> str:
    asked = {"model": "twin", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    body = asked | {"return_token_ids": True} | body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body})


async def run_batch(client: Any, *lines: str) -> Any:
    """A batch of these lines, when it has ended."""
    content = "\n".join(lines).encode()
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    async with asyncio.timeout(60):
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            await asyncio.sleep(0.1)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def answers(client: Any, file_id: str) -> dict[str, Any]:
    lines = (await client.files.content(file_id)).text.splitlines()
    assert len({json.loads(line)["custom_id"] for line in lines}) == len(lines)
    return {(answer := json.loads(line))["custom_id"]: answer for line in lines}


async def test_a_batch_whichever_replica_is_asked(url: str, client: Any) -> None:
    await wait_ready(url)
    prompts = {f"r{n}": [600 + n % 4] * 40 + [n] for n in range(40)}
    lines = [batch_line(name, prompt) for name, prompt in prompts.items()]
    batch = await run_batch(client, *lines, batch_line("nobody", [1], model="nobody"))
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (41, 40, 1)
    done = await answers(client, batch.output_file_id)
    assert {name: answer["response"]["body"]["choices"][0]["token_ids"] for name, answer in done.items()} == {
        name: expected_tokens(prompt, 8) for name, prompt in prompts.items()
    }
    failed = (await answers(client, batch.error_file_id))["nobody"]
    assert failed["response"]["status_code"] == 404
    assert "nobody" in failed["response"]["body"]["error"]["message"]
    assert batch.id in {one.id async for one in client.batches.list()}
    await wait_empty(url)


async def test_a_batch_with_bad_lines_is_told_which(client: Any) -> None:
    batch = await run_batch(client, batch_line("a", [1]), "nonsense", batch_line("a", [2]))
    assert batch.status == "failed"
    assert [error.line for error in batch.errors.data] == [2, 3]


async def test_a_batch_that_is_cancelled_stops(url: str, client: Any) -> None:
    lines = [batch_line(f"r{n}", [700 + n], max_tokens=3000) for n in range(20)]
    content = "\n".join(lines).encode()
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    assert (await client.files.delete(file.id)).deleted
    assert (await client.batches.cancel(batch.id)).status == "cancelling"
    async with asyncio.timeout(30):
        while batch.status != "cancelled":
            await asyncio.sleep(0.1)
            batch = await client.batches.retrieve(batch.id)
    assert len(await answers(client, batch.error_file_id)) == 20
    await wait_empty(url)


def test_instances_of_both_pools_share_the_group_of_a_node(url: str) -> None:
    from ray.util import placement_group_table

    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    shared = {f"twins:prefill-{n}+decode-{n}" for n in range(2)}
    assert shared == {group["name"] for group in groups if group["name"].startswith("twins:")}
    assert all(len(group["bundles"]) == 2 for group in groups if group["name"] in shared)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_killed_instance_is_replaced_and_its_streams_go_on(url: str, client: Any, role: str) -> None:
    await wait_ready(url)
    streams = [asyncio.create_task(complete(client, 150, [200 + n] * 40)) for n in range(8)]
    await asyncio.sleep(0.5)
    victim = (await asyncio.to_thread(rows, url))[f"{role}-0"]
    os.kill(victim["pid"], signal.SIGKILL)
    assert await asyncio.gather(*streams) == [expected_tokens([200 + n] * 40, 150) for n in range(8)]
    await wait_ready(url)
    again = (await asyncio.to_thread(rows, url))[f"{role}-0"]
    assert again["incarnation"] != victim["incarnation"]


async def test_a_stopped_instance_is_noticed_without_its_connection_closing(url: str, client: Any) -> None:
    """SIGSTOP: the process is there, its socket open, but nothing comes."""
    await wait_ready(url)
    before = await asyncio.to_thread(rows, url)
    os.kill(before["decode-0"]["pid"], signal.SIGSTOP)
    try:
        began = time.monotonic()
        answers = await asyncio.gather(*(complete(client, 30, [300 + n] * 40) for n in range(4)))
        assert answers == [expected_tokens([300 + n] * 40, 30) for n in range(4)]
        assert time.monotonic() - began < 20
    finally:
        os.kill(before["decode-0"]["pid"], signal.SIGCONT)
    await wait_ready(url)


async def test_the_cluster_outlives_its_controller(url: str, client: Any) -> None:
    await wait_ready(url)
    before = await asyncio.to_thread(rows, url)
    controller = next(p for p in psutil.process_iter() if p.name().startswith("ray::Controll"))
    controller.send_signal(signal.SIGKILL)
    async with asyncio.timeout(60):
        while True:
            after = await asyncio.to_thread(rows, url)
            fresh = all(
                after[i]["reachable"] and after[i]["incarnation"] != before[i]["incarnation"] for i in after
            )
            if fresh:
                break
            await asyncio.sleep(0.1)
    assert await complete(client, 10) == expected_tokens(PROMPT, 10)


def test_a_cluster_that_goes_down_lets_streams_end(model: Path, url: str) -> None:
    """Last: takes the cluster of this module down in mid-stream."""
    from ray import serve

    async def scenario() -> list[int]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            await wait_ready(url)
            stream = asyncio.create_task(complete(client, 200))
            await asyncio.sleep(0.5)
            deleting = asyncio.create_task(asyncio.to_thread(serve.delete, "twins"))
            tokens = await stream
            await deleting
            return tokens

    assert asyncio.run(scenario()) == expected_tokens(PROMPT, 200)
