"""KV that moves while its prompt is computed, beside the order of the stock connector (Markdown):

python -m benchmarks.overlap [--rounds 3] [--requests 12] [--transport torch]

One prefill and one decode instance of `deploy/specs/cpu.yaml`, prompts in chunks of 256 tokens, a model whose
engine has the work. Clusters with and without `transfer.overlap` by turns; lone streams of random prompts:
when their second token, the first that needs the KV at the other instance, comes after the first.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, get_args

import httpx
import yaml

from benchmarks.cluster import URL, cluster, wait_serving
from benchmarks.fidelity import build_model, spec_for
from benchmarks.migration import Client
from cluster.spec import TransportName
from deploy.status import read_metric

CHUNK = 256
PROMPTS = (700, 1500, 3000)
DEADLINE_S = 120.0


@dataclass(slots=True)
class Measured:
    """Of one order: seconds from the first token to the second by prompt, and bytes."""

    gap_s: dict[int, list[float]] = field(default_factory=dict)
    second_s: dict[int, list[float]] = field(default_factory=dict)
    early_bytes: float = 0.0
    bytes: float = 0.0


async def measure(found: Measured, requests: int, seed: int) -> None:
    async with httpx.AsyncClient(base_url=URL, timeout=DEADLINE_S) as http:
        client = Client(http, seed)
        for prompt in PROMPTS:  # kernels and links warm up
            await client.stream(prompt, 4)
        loop = asyncio.get_running_loop()
        for _ in range(requests):
            for prompt in PROMPTS:
                began_s = loop.time()
                times_s = (await client.stream(prompt, 4)).times_s
                found.gap_s.setdefault(prompt, []).append(times_s[1] - times_s[0])
                found.second_s.setdefault(prompt, []).append(times_s[1] - began_s)
    found.early_bytes += read_metric(URL, "pdserve_kv_bytes_moved_early_total")
    found.bytes += read_metric(URL, "vllm:nixl_bytes_transferred_sum")


def spec_with(folder: Path, path: Path, *, overlap: bool, transport: str) -> Path:
    raw: dict[str, Any] = yaml.safe_load(path.read_text())
    raw.setdefault("prefill", {}).setdefault("engine_options", {})["max_num_batched_tokens"] = CHUNK
    raw["transfer"] = {"overlap": overlap, "transport": transport}
    target = folder / f"overlap-{overlap}.yaml"
    target.write_text(yaml.safe_dump(raw))
    return target


def report(by_order: dict[bool, Measured]) -> None:
    print("\n| prompt (tokens) | first to second token (ms), overlap | stock order | ratio "
          "| request to second token (ms), overlap | stock order | ratio |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for prompt in PROMPTS:
        cells = []
        for name in ("gap_s", "second_s"):
            ours, stock = (1e3 * median(getattr(by_order[order], name)[prompt]) for order in (True, False))
            cells += [f"{ours:.1f}", f"{stock:.1f}", f"{ours / stock:.2f}"]
        print(f"| {prompt:,} | {' | '.join(cells)} |")
    ours = by_order[True]
    left = 1 - ours.early_bytes / ours.bytes
    print(f"\nbytes left to move when the prompt is computed: {left:.0%} of {ours.bytes / 1e6:,.0f} MB")
    print(f"stock order: {by_order[False].early_bytes:.0f} bytes moved before that")


def main() -> None:
    """Start the clusters by turns and print what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=12, help="of each length in a round")
    parser.add_argument("--transport", choices=get_args(TransportName), default="nixl")
    parser.add_argument("--size", default="medium", help="of benchmarks.fidelity")
    args = parser.parse_args()
    by_order = {True: Measured(), False: Measured()}
    with tempfile.TemporaryDirectory() as folder:
        path = spec_for(Path(folder), build_model(Path(folder), args.size), args.size)
        for number in range(args.rounds):
            for overlap, found in by_order.items():
                spec = spec_with(Path(folder), path, overlap=overlap, transport=args.transport)
                with cluster("", str(spec)) as running:
                    wait_serving(running)
                    asyncio.run(measure(found, args.requests, seed=number))
            print(f"round {number + 1} of {args.rounds}", flush=True)
    report(by_order)


if __name__ == "__main__":
    main()
