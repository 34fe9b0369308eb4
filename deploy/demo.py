"""`make demo`: a real split cluster on this machine, shown and checked in a few minutes."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from cluster.errors import ServingError, SpecError
from cluster.request import Slo
from cluster.spec import load_spec
from deploy.model_store import holds_foreign_checkpoint, tiny_model_ready, tiny_recipe
from deploy.replay import ReplayOptions, replay
from deploy.replay_command import progress_line
from deploy.replay_report import ReplayReport
from deploy.status import read_metric
from deploy.trace_shapes import conversation_like

SPEC = Path(__file__).resolve().parent / "specs" / "cpu.yaml"
REQUESTS = 60
RATE_RPS = 6.0
PROOFS = 16
DEADLINE_S = 120.0


def main() -> int:
    """Run the demo; returns 0 when everything worked and no token differed."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint; built if it is the tiny one")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    try:
        return _demo(args.model, args.port)
    except SpecError as error:
        _say(f"demo: {error}")
        return 2
    except ServingError as error:
        _say(f"demo: {error}")
        return 1


def _demo(model: Path, port: int) -> int:
    _say("== a model")
    random_weights = _prepare_model(model)
    spec = load_spec(SPEC, {"model": str(model), "served_model_name": model.name})
    spec = spec.model_copy(
        update={
            "ingress": spec.ingress.model_copy(update={"port": port}),
            # In bfloat16 a greedy choice may hang on the last bit, which differs with the batch it is made
            # in, split or not; what is shown here is that the split changes nothing.
            "engine_options": {**spec.engine_options, "dtype": "float32"},
        }
    )
    _say("\n== a cluster: one prefill and one decode instance, real vLLM engines, KV moved by NIXL")
    from deploy.ray_up import serving

    with serving(spec, say=_say) as url:
        _say("\n== one chat completion, streamed through the split")
        if random_weights:
            _say(
                "(random weights: the words mean nothing; MODEL=/path/to/checkpoint make demo for a real one)"
            )
        asyncio.run(_chat(url, model.name))
        _say(f"\n== {REQUESTS} requests with the lengths and arrivals of a production conversation trace")
        report = asyncio.run(_replay(url))
        print(report.to_text(), flush=True)
        _say("\n== what moved")
        moved, recomputed = _kv_report(url)
        _say("\n== does the split change a token?")
        differing = asyncio.run(_prove(url, model.name))
    _say("\nstopped")
    failed = report.counts["failed"] + report.counts["timeout"] + report.counts["rejected"]
    return 0 if differing == 0 and failed == 0 and moved > 0 and recomputed == 0 else 1


def _prepare_model(model: Path) -> bool:
    """Build the tiny model unless there is one; returns whether its weights are random."""
    if holds_foreign_checkpoint(model, tiny_recipe()):
        _say(f"{model}")
        return False
    if not tiny_model_ready(model):
        from deploy.tiny_model_torch import build_tiny_model

        build_tiny_model(model)
    _say(f"{model}: a small Llama with random weights")
    return True


async def _chat(url: str, model: str) -> None:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of Germany?"}],
        "stop": ["\nUser:"],  # a base model goes on with the next question
        "max_tokens": 40,
        "temperature": 0,
    }
    async for event in _events(f"{url}/v1/chat/completions", body):
        for choice in event["choices"]:
            print(choice["delta"].get("content") or "", end="", flush=True)
    print(flush=True)


async def _replay(url: str) -> ReplayReport:
    requests = conversation_like(
        REQUESTS, rate_rps=RATE_RPS, max_input=1500, max_output=64, rng=random.Random(0)
    )
    options = ReplayOptions(slo=Slo(ttft_s=1.0, tpot_s=0.1), timeout_s=DEADLINE_S)
    return await replay(url, requests, options, progress_line())


def _kv_report(url: str) -> tuple[float, float]:
    moved = read_metric(url, "pdserve_kv_tokens_moved_total")
    moved_bytes = read_metric(url, "pdserve_kv_bytes_moved_total")
    recomputed = read_metric(url, "pdserve_kv_tokens_recomputed_total")
    print(
        f"KV moved from prefill to decode: {moved:,.0f} tokens, {moved_bytes / 1e6:,.1f} MB; "
        f"recomputed: {recomputed:,.0f} tokens",
        flush=True,
    )
    return moved, recomputed


async def _prove(url: str, model: str) -> int:
    """Greedy tokens through the split against the same engine doing both phases; returns how many differ."""
    rng = random.Random(1)
    differing = tokens = 0
    for number in range(PROOFS):
        prompt = [rng.randrange(100, 4000) for _ in range(rng.randint(1, 900))]
        split = await _greedy(url, model, prompt, salt=f"split-{number}")
        whole = await _greedy(url, model, prompt, salt=f"whole-{number}", vllm_xargs={"pdserve_unsplit": 1})
        differing += split != whole
        tokens += len(whole)
    verdict = "all equal" if differing == 0 else f"{differing} DIFFER"
    print(f"{PROOFS} prompts, {tokens} greedy tokens, split against unsplit: {verdict}", flush=True)
    return differing


async def _greedy(url: str, model: str, prompt: list[int], *, salt: str, **extra: Any) -> list[int]:
    # A salt of its own keeps each run out of the other's prefix cache.
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 32,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "cache_salt": salt,
        **extra,
    }
    tokens: list[int] = []
    async for event in _events(f"{url}/v1/completions", body):
        for choice in event["choices"]:
            tokens += choice.get("token_ids") or []
    return tokens


async def _events(url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(url, json={**body, "stream": True}) as answer,
    ):
        answer.raise_for_status()
        async for line in answer.content:
            text = line.decode().strip()
            if not text.startswith("data: ") or text == "data: [DONE]":
                continue
            event = json.loads(text.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(f"the server ended the stream with {event['error']}")
            yield event


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
