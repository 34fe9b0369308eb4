"""What main memory behind the engines is worth on this machine's CPUs (Markdown):

python -m benchmarks.tiers [--rounds 3]

One prefill and one decode instance of `deploy/specs/cpu.yaml` with a model whose engine has the work, and
room for one long prompt each. Seconds to the first token of a prompt that nobody has, of the same one at once
again, and again when others have taken its place: with `tiers` and without, a cluster each.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from random import Random
from statistics import median

import httpx
import yaml

from benchmarks.cluster import URL, cluster, wait_serving
from benchmarks.fidelity import build_model, spec_for

LENGTHS = (512, 1024, 2048, 3500)
# Prompts that take the place of one, in an engine with room for so many tokens.
OTHERS, ROOM_TOKENS = 2, 4096
KV_BYTES_PER_TOKEN = 16384
DEADLINE_S = 120.0


async def first_token_s(http: httpx.AsyncClient, prompt: list[int]) -> float:
    began_s = asyncio.get_running_loop().time()
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    (await http.post("/v1/completions", json=body)).raise_for_status()
    return asyncio.get_running_loop().time() - began_s


async def measure(rounds: int, name: str) -> None:
    random = Random(0)
    async with httpx.AsyncClient(base_url=URL, timeout=DEADLINE_S) as http:

        def prompt(tokens: int) -> list[int]:
            return [random.randrange(100, 4000) for _ in range(tokens)]

        await first_token_s(http, prompt(256))
        for length in LENGTHS:
            times: list[tuple[float, float, float]] = []
            for _ in range(rounds):
                asked = prompt(length)
                new_s = await first_token_s(http, asked)
                cached_s = await first_token_s(http, asked)
                for _ in range(OTHERS):
                    await first_token_s(http, prompt(3900))
                times.append((new_s, cached_s, await first_token_s(http, asked)))
            cells = " | ".join(f"{1e3 * median(column):.0f}" for column in zip(*times, strict=True))
            print(f"| {name} | {length} | {cells} |", flush=True)


def main() -> None:
    """Start the clusters and print what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="medium", help="of benchmarks.fidelity")
    args = parser.parse_args()
    print("| | prompt (tokens) | new (ms) | at once again (ms) | when evicted (ms) |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = spec_for(Path(folder), build_model(Path(folder), args.size), args.size)
        raw = yaml.safe_load(path.read_text())
        raw["engine_options"]["kv_cache_memory_bytes"] = ROOM_TOKENS * KV_BYTES_PER_TOKEN
        for name, tiers in (("without", None), ("tiers: {host_gib: 2}", {"host_gib": 2})):
            path.write_text(yaml.safe_dump(raw | ({"tiers": tiers} if tiers else {})))
            with cluster("", str(path)) as running:
                wait_serving(running)
                asyncio.run(measure(args.rounds, name))


if __name__ == "__main__":
    main()
