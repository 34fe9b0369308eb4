"""The whole thing for real: vLLM engines on the CPU, NIXL, Ray Serve with HAProxy, the OpenAI API."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.batch_spec import BatchSpec
from cluster.spec import ClusterSpec, load_spec
from deploy.cli import main
from deploy.status import fetch_status
from deploy.status import read_metric as metric
from deploy.tiny_model_torch import build_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parent.parent
PORT = 18211


def cluster_spec(model: Path, decode: int) -> ClusterSpec:
    spec = load_spec(ROOT / "deploy" / "specs" / "cpu.yaml", {"model": str(model), "name": "test"})
    return spec.model_copy(
        update={
            "engine_options": {**spec.engine_options, "dtype": "float32"},
            # Longer prompts are read while they are computed.
            "prefill": spec.prefill.model_copy(update={"engine_options": {"max_num_batched_tokens": 512}}),
            "decode": spec.decode.model_copy(update={"count": decode, "cpus": 0.5}),
            "ingress": spec.ingress.model_copy(update={"port": PORT}),
            "batch": BatchSpec(directory=str(model.parent / "batches")),
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def mixed_requests() -> list[dict[str, Any]]:
    """200 requests, 1 to 1,500 tokens in, 1 to 64 out."""
    rng = random.Random(7)
    lengths = [1, 2, 127, 128, 129, 255, 256, 257, 1500] + [
        min(1500, max(1, int(rng.lognormvariate(4.5, 1.4)))) for _ in range(191)
    ]
    return [
        {
            "prompt": [rng.randrange(100, 4000) for _ in range(length)],
            "max_tokens": rng.randint(1, 64),
        }
        for length in lengths
    ]


@pytest.fixture(scope="module")
def reference(model: Path, mixed_requests: list[dict[str, Any]]) -> list[list[int]]:
    """Tokens of a plain vLLM engine, before the cluster takes the cores."""
    answer = subprocess.run(
        [sys.executable, "-m", "tests.reference_vllm", str(model)],
        input=json.dumps(mixed_requests),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    tokens: list[list[int]] = json.loads(answer.stdout)
    return tokens


@pytest.fixture(scope="module")
def url(model: Path, reference: list[list[int]]) -> Iterator[str]:
    """A cluster with one prefill and two decode instances."""
    from deploy.ray_up import serving

    with serving(cluster_spec(model, decode=2), say=print) as at:
        yield at


@pytest.fixture
async def client(url: str) -> Any:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def kv_empty(url: str, deadline_s: float) -> None:
    """No engine holds a block for a request, no request is pending."""
    async with asyncio.timeout(deadline_s):
        while True:
            status = await asyncio.to_thread(fetch_status, url)
            usage = await asyncio.to_thread(metric, url, "vllm:kv_cache_usage_perc")
            if status["pending"] == status["in_engines"] == 0 and usage == 0.0:
                return
            await asyncio.sleep(0.2)


async def complete(
    client: Any, request: dict[str, Any], *, stream: bool, name: str | None = None
) -> list[int]:
    arguments = {
        "model": "tiny",
        "prompt": request["prompt"],
        "max_tokens": request["max_tokens"],
        "temperature": 0.0,
        "stream": stream,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
        "extra_headers": {"x-request-id": name} if name else {},
    }
    if not stream:
        answer = await client.completions.create(**arguments)
        return list(answer.choices[0].model_extra["token_ids"])
    tokens: list[int] = []
    async for chunk in await client.completions.create(**arguments):
        tokens += chunk.choices[0].model_extra["token_ids"] or []
    return tokens


async def test_the_split_changes_no_token(
    url: str, client: Any, mixed_requests: list[dict[str, Any]], reference: list[list[int]]
) -> None:
    slots = asyncio.Semaphore(32)

    async def one(index: int) -> list[int]:
        async with slots:
            return await complete(client, mixed_requests[index], stream=index % 2 == 0)

    moved_before = metric(url, "pdserve_kv_tokens_moved_total")
    tokens = await asyncio.gather(*(one(i) for i in range(len(mixed_requests))))
    differing = [i for i, (got, right) in enumerate(zip(tokens, reference, strict=True)) if got != right]
    assert differing == []
    block = 128
    full_blocks = sum(len(r["prompt"]) // block * block for r in mixed_requests if r["max_tokens"] > 1)
    moved = metric(url, "pdserve_kv_tokens_moved_total") - moved_before
    assert moved >= 0.95 * full_blocks
    assert metric(url, "pdserve_kv_tokens_recomputed_total") == 0
    assert metric(url, "pdserve_kv_bytes_moved_early_total") > 0
    await kv_empty(url, 5.0)


async def test_moves_between_decode_instances_change_no_token(
    url: str, client: Any, mixed_requests: list[dict[str, Any]], reference: list[list[int]]
) -> None:
    """100 streams, each told again and again, at random times, to go on at the other instance."""
    chosen = [n for n, request in enumerate(mixed_requests) if request["max_tokens"] > 20][:100]
    rng = random.Random(3)
    slots = asyncio.Semaphore(16)
    running: dict[str, int] = {}
    answers: dict[int, int] = {}

    async def one(index: int) -> list[int]:
        async with slots:
            name = f"moving-{index}"
            running[name] = index
            try:
                return await complete(client, mixed_requests[index], stream=True, name=name)
            finally:
                del running[name]

    async def move() -> None:
        async with httpx.AsyncClient(base_url=url) as http:
            while True:
                await asyncio.sleep(0.002)
                if running:
                    name, to = rng.choice(list(running)), f"decode-{rng.randrange(2)}"
                    status = (await http.post(f"/pdserve/move/{name}", params={"to": to})).status_code
                    answers[status] = answers.get(status, 0) + 1

    def moved() -> dict[str, float]:
        names = ("pdserve_migrations_total", "pdserve_migration_stall_seconds_count")
        return {name: metric(url, name) for name in names}

    before, recomputed = moved(), metric(url, "pdserve_kv_tokens_recomputed_total")
    mover = asyncio.create_task(move())
    try:
        tokens = await asyncio.gather(*(one(index) for index in chosen))
    finally:
        mover.cancel()
    differing = [n for n, got in zip(chosen, tokens, strict=True) if got != reference[n]]
    assert differing == []
    after = moved()
    began, arrived = (after[name] - before[name] for name in after)
    assert arrived > 50, answers
    # The others ended before they were there.
    assert began >= arrived
    assert set(answers) <= {200, 404, 409}
    assert metric(url, "pdserve_kv_tokens_recomputed_total") == recomputed
    await kv_empty(url, 10.0)


async def test_a_move_that_can_not_be_says_why(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as http:
        answer = await http.post("/pdserve/move/nobody", params={"to": "decode-0"})
        assert answer.status_code == 404
        assert "runs no request 'nobody'" in answer.json()["error"]["message"]
        assert (await http.post("/pdserve/move/nobody")).status_code == 400


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CHAT = [{"role": "user", "content": "How is the weather?"}]
# A grammar allows white space between all words, and random weights like it: now and then an answer was cut
# off at 64 tokens.
GRAMMAR_TOKENS = 2000


async def test_chat_streamed_and_whole_agree(client: Any) -> None:
    whole = await client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=24, temperature=0)
    stream = await client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=24, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


async def test_a_named_tool_is_called_with_arguments_of_its_schema(client: Any) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=GRAMMAR_TOKENS, tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    )  # fmt: skip
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


async def test_json_schema(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "warm": {"type": "boolean"}},
        "required": ["city", "warm"],
        "additionalProperties": False,
    }
    answer = await client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=GRAMMAR_TOKENS, temperature=0.8,
        response_format={"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}},
    )  # fmt: skip
    assert set(json.loads(answer.choices[0].message.content)) == {"city", "warm"}


async def test_logprobs_of_every_token_and_of_the_prompt(url: str, client: Any) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    assert all(len(entry.top_logprobs) >= 2 and entry.logprob <= 0 for entry in content)
    echoed = await client.completions.create(
        model="tiny", prompt="one two three", max_tokens=4, temperature=0, echo=True, logprobs=1
    )
    assert len(echoed.choices[0].logprobs.token_logprobs) == echoed.usage.total_tokens
    assert metric(url, "pdserve_kv_tokens_recomputed_total") == 0


async def test_the_same_seed_gives_the_same_tokens_and_another_does_not(client: Any) -> None:
    async def sample(seed: int) -> str:
        answer = await client.completions.create(
            model="tiny", prompt="Once", max_tokens=20, temperature=1.0, seed=seed
        )
        return str(answer.choices[0].text)

    first, again, other = await asyncio.gather(sample(1), sample(1), sample(2))
    assert first == again != other


@pytest.mark.parametrize("sampler", [{}, {"seed": 5}, {"presence_penalty": 0.5}])
async def test_n_choices(client: Any, sampler: dict[str, Any]) -> None:
    answer = await client.completions.create(
        model="tiny", prompt="Once", max_tokens=8, temperature=1.0, n=3, **sampler
    )
    assert len({choice.text for choice in answer.choices}) == 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


async def test_stop_strings_and_penalties(client: Any) -> None:
    plain = await client.completions.create(model="tiny", prompt="Once", max_tokens=30, temperature=0)
    text = plain.choices[0].text
    stop = text[10:14]
    answer = await client.completions.create(
        model="tiny", prompt="Once", max_tokens=30, temperature=0, stop=[stop]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text[: text.index(stop)]
    penalised = await client.completions.create(
        model="tiny", prompt="Once", max_tokens=30, temperature=0, frequency_penalty=1.5, presence_penalty=1.0
    )
    assert penalised.usage.completion_tokens == 30


async def test_responses_and_tokenize(url: str, client: Any) -> None:
    answer = await client.responses.create(model="tiny", input="Hello", max_output_tokens=12, temperature=0)
    assert answer.output_text

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as reply:
            result: dict[str, Any] = json.load(reply)
            return result

    tokens = (await asyncio.to_thread(post, "/tokenize", {"model": "tiny", "prompt": "a b c"}))["tokens"]
    back = await asyncio.to_thread(post, "/detokenize", {"model": "tiny", "tokens": tokens})
    assert back["prompt"].endswith("a b c")
    assert [m.id for m in (await client.models.list()).data] == ["tiny"]


async def test_a_batch_says_what_the_api_says(client: Any) -> None:
    bodies = [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"{n}?"}],
            "max_tokens": 8,
            "temperature": 0,
        }
        for n in range(6)
    ]
    bodies.append({"model": "tiny", "messages": CHAT, "temperature": -3})
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n, body in enumerate(bodies)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    async with asyncio.timeout(60):
        while batch.status not in ("completed", "failed"):
            await asyncio.sleep(0.1)
            batch = await client.batches.retrieve(batch.id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (6, 1)
    output = [
        json.loads(line) for line in (await client.files.content(batch.output_file_id)).text.splitlines()
    ]
    said = {
        int(one["custom_id"]): one["response"]["body"]["choices"][0]["message"]["content"] for one in output
    }
    for n, body in enumerate(bodies[:6]):
        answer = await client.chat.completions.create(**body)
        assert said[n] == answer.choices[0].message.content
    failed = json.loads((await client.files.content(batch.error_file_id)).text)
    assert failed["response"]["status_code"] == 400
    assert "temperature" in failed["response"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ({"prompt": [200] * 5000, "max_tokens": 4}, 400, "maximum context length"),
        ({"prompt": "x", "model": "nobody"}, 404, "nobody"),
        ({"prompt": "x", "temperature": -3}, 400, "temperature"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    ],
)
async def test_a_bad_request_is_answered_in_vllms_words(
    client: Any, arguments: dict[str, Any], status: int, says: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await client.completions.create(**{"model": "tiny", **arguments})
    assert caught.value.status_code == status
    assert says in caught.value.message


async def test_a_header_that_makes_no_sense_is_a_400_in_the_api_s_words(client: Any) -> None:
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 2}
    with pytest.raises(openai.BadRequestError, match="x-pdserve-ttft-ms: 'soon' is not allowed") as caught:
        await client.completions.create(**asked, extra_headers={"x-pdserve-ttft-ms": "soon"})
    assert caught.value.response.headers["x-pdserve-reason"] == "bad-header"
    answer = await client.completions.create(**asked, extra_headers={"x-llm-d-slo-ttft-ms": "60000"})
    assert answer.choices[0].finish_reason == "length"


async def test_malformed_json_is_a_400(url: str) -> None:
    request = urllib.request.Request(
        f"{url}/v1/completions", b'{"prompt": ', {"content-type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        await asyncio.to_thread(urllib.request.urlopen, request, timeout=10)
    assert caught.value.code == 400
    assert "error" in json.load(caught.value)


async def test_clients_that_leave_free_both_sides(url: str, client: Any) -> None:
    """250 requests, a fifth of them cancelled at a random time."""
    rng = random.Random(11)
    slots = asyncio.Semaphore(48)

    async def one(cancel: bool) -> str:
        request = {
            "prompt": [rng.randrange(100, 4000) for _ in range(rng.choice([5, 60, 300, 900]))],
            "max_tokens": rng.randint(2, 40),
        }
        async with slots:
            task = asyncio.create_task(complete(client, request, stream=rng.random() < 0.5))
            if not cancel:
                return "ok" if len(await task) == request["max_tokens"] else "short"
            await asyncio.sleep(rng.random() * 0.4)
            task.cancel()
            await asyncio.wait([task])
            return "cancelled"

    outcomes = await asyncio.gather(*(one(number % 5 == 0) for number in range(250)))
    assert outcomes.count("ok") == 200
    assert outcomes.count("cancelled") == 50
    # Far less than the lease of 30 s: what nobody will read is released, not waited for.
    await kv_empty(url, 10.0)


def decode_instances(url: str) -> list[dict[str, Any]]:
    return [row for row in fetch_status(url)["instances"] if row["role"] == "decode"]


async def wait_ready(url: str, deadline_s: float) -> None:
    async with asyncio.timeout(deadline_s):
        while not all(
            row["reachable"] and row["state"] == "ready"
            for row in (await asyncio.to_thread(fetch_status, url))["instances"]
        ):
            await asyncio.sleep(0.2)


async def test_no_engine_is_bound_to_a_core_that_others_are_bound_to(url: str) -> None:
    await wait_ready(url, 60)
    rows = (await asyncio.to_thread(fetch_status, url))["instances"]
    for row in rows:
        for thread in os.listdir(f"/proc/{row['pid']}/task"):
            assert os.sched_getaffinity(int(thread)) == os.sched_getaffinity(0), row["instance_id"]


async def test_an_instance_is_drained_while_its_streams_go_on_elsewhere(url: str, client: Any) -> None:
    await wait_ready(url, 60)
    requests = [{"prompt": [300 + n] * (100 + 20 * n), "max_tokens": 1200} for n in range(8)]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(complete(client, request, stream=True) for request in requests))

    undisturbed = await all_of_them()
    recomputed = metric(url, "pdserve_kv_tokens_recomputed_total")
    before = {row["instance_id"]: row["incarnation"] for row in decode_instances(url)}
    streams = asyncio.create_task(all_of_them())
    async with asyncio.timeout(30):
        while not all(row["load"]["running"] for row in await asyncio.to_thread(decode_instances, url)):
            await asyncio.sleep(0.05)
    assert await asyncio.to_thread(main, ["drain", "decode-0", "--url", url]) == 0
    assert not streams.done(), "they did not just end"
    assert await streams == undisturbed
    assert metric(url, 'pdserve_migrations_total{cause="drain"}') > 0
    assert metric(url, "pdserve_kv_tokens_recomputed_total") == recomputed
    await wait_ready(url, 90)
    after = {row["instance_id"]: row["incarnation"] for row in decode_instances(url)}
    assert [name for name in after if after[name] != before[name]] == ["decode-0"]
    await kv_empty(url, 10.0)


async def test_a_killed_decode_instance_is_not_noticed_by_its_clients(url: str, client: Any) -> None:
    await wait_ready(url, 60)
    requests = [{"prompt": [300 + i] * 50, "max_tokens": 400} for i in range(4)]
    right = await asyncio.gather(*(complete(client, r, stream=False) for r in requests))
    streams = [asyncio.create_task(complete(client, r, stream=True)) for r in requests]
    busy = None
    while busy is None:
        await asyncio.sleep(0.02)
        rows = await asyncio.to_thread(decode_instances, url)
        busy = next((row for row in rows if row["outstanding_requests"]), None)
    await asyncio.sleep(0.15)
    os.kill(busy["pid"], signal.SIGKILL)
    assert await asyncio.gather(*streams) == right
    await wait_ready(url, 60)
    assert metric(url, "pdserve_request_moves_total") >= 1
    await kv_empty(url, 10.0)  # what the dead one had is not in the metrics any more


async def test_with_no_decode_instance_left_the_error_is_typed_and_quick(url: str, client: Any) -> None:
    await wait_ready(url, 60)
    request = {"prompt": [777] * 40, "max_tokens": 2000}
    stream = asyncio.create_task(complete(client, request, stream=True))
    await asyncio.sleep(0.5)
    for row in await asyncio.to_thread(decode_instances, url):
        os.kill(row["pid"], signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(openai.APIError, match="no decode instance is ready"):
        await stream
    assert time.monotonic() - killed < 2.0
    with pytest.raises(openai.APIStatusError) as caught:
        await complete(client, request, stream=False)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["x-pdserve-reason"] == "rejected-no-endpoints"
    assert caught.value.response.headers["retry-after"] == "1"
    await wait_ready(url, 90)
    assert len(await complete(client, {"prompt": [5, 6, 7], "max_tokens": 3}, stream=False)) == 3
    await kv_empty(url, 35.0)
