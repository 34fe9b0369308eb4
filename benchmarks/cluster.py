"""A whole cluster on this machine, as `pdserve up` starts it: start-up, idle cost, throughput, memory.

python -m benchmarks.cluster --model .cache/models/tiny
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load import stream_load
from deploy.replay import ReplayOptions, replay
from deploy.trace_shapes import conversation_like

ROOT = Path(__file__).resolve().parent.parent
PORT = 18310
URL = f"http://127.0.0.1:{PORT}"
START_DEADLINE_S = 180.0


@dataclass
class Cluster:
    """A running `pdserve up`; `log` has its lines with the seconds since its start."""

    process: subprocess.Popen[str]
    began: float
    log: list[tuple[float, str]] = field(default_factory=list)

    def tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far, by process title."""
        used: dict[str, float] = {}
        for member in self.tree():
            try:
                title = " ".join(member.cmdline()[:1])[-40:] or member.name()
                used[f"{title} {member.pid}"] = sum(member.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
        return used

    def rss_mb(self) -> dict[str, float]:
        """Resident memory of ingress and engines."""
        sizes = {}
        for member in self.tree():
            title = " ".join(member.cmdline())
            if "ServeReplica" in title or "Actor" in title:
                sizes[title.split(":")[2].split(".")[0][:16] + f" {member.pid}"] = (
                    member.memory_info().rss / 1e6
                )
        return sizes


@contextmanager
def cluster(model: str, spec: str = "deploy/specs/cpu.yaml") -> Iterator[Cluster]:
    words = ["up", spec, *(["--model", model] if model else []), "--port", str(PORT)]
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    running = Cluster(process=process, began=time.monotonic())

    def read() -> None:
        for line in process.stderr or ():
            running.log.append((time.monotonic() - running.began, line.rstrip()))

    threading.Thread(target=read, daemon=True).start()
    try:
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_serving(running: Cluster) -> float:
    """Seconds until the first token of the first request."""
    while not any("serving" in line for _, line in running.log):
        if running.process.poll() is not None or time.monotonic() - running.began > START_DEADLINE_S:
            raise RuntimeError("\n".join(line for _, line in running.log))
        time.sleep(0.02)
    body = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{URL}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.read()
    return time.monotonic() - running.began


def idle_percent(running: Cluster, seconds: float) -> dict[str, float]:
    """Per cent of one core that each process takes while nothing is asked of the cluster."""
    before = running.cpu_s()
    time.sleep(seconds)
    after = running.cpu_s()
    used = {name: (cpu - before.get(name, cpu)) / seconds * 100 for name, cpu in after.items()}
    return dict(sorted(used.items(), key=lambda item: -item[1]))


def load(concurrency: int, requests: int, prompt: int, output: int, seed: int) -> Any:
    return asyncio.run(
        stream_load(
            URL, model="tiny", requests=requests, concurrency=concurrency, prompt_tokens=prompt,
            output_tokens=output, seed=seed,
        )
    )  # fmt: skip


def soak(seed: int) -> str:
    """500 requests of mixed length, a fifth of them cancelled at a random time; returns how they ended."""
    workload = conversation_like(500, rate_rps=50.0, max_input=1500, max_output=64, rng=random.Random(seed))
    report = asyncio.run(
        replay(URL, workload, ReplayOptions(cancel_share=0.2, cancel_within_s=0.1, seed=seed))
    )
    return ", ".join(f"{count} {status}" for status, count in report.counts.items() if count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".cache/models/tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soaks", type=int, default=0, help="rounds of 500 requests with cancellations")
    args = parser.parse_args()
    with cluster(args.model) as running:
        first_token_s = wait_serving(running)
        print(f"from 'pdserve up' to the first token: {first_token_s:.1f} s")
        for at, line in running.log:
            print(f"  {at:5.1f} s  {line}")
        load(8, 64, 64, 16, seed=99)
        time.sleep(3)
        idle = idle_percent(running, 20)
        print(f"idle: {sum(idle.values()):.1f} % of one core in all")
        for name, percent in list(idle.items())[:6]:
            print(f"  {percent:5.1f} %  {name}")
        print("memory before:", {name: round(mb) for name, mb in running.rss_mb().items()})
        for number in range(args.rounds):
            alone = load(1, 16, 64, 32, seed=number)
            ttft_s = alone.first_s[len(alone.first_s) // 2]
            tpot_s = (alone.wall_s / alone.requests - ttft_s) / 31
            print(f"alone: TTFT p50 {ttft_s * 1e3:.1f} ms, TPOT {tpot_s * 1e3:.2f} ms")
            many = load(128, 384, 64, 128, seed=100 + number)
            print(f"128 streams: {many.tokens / many.wall_s:,.0f} output tokens/s")
        for number in range(args.soaks):
            print(f"soak: {soak(number)}")
            print("memory:       ", {name: round(mb) for name, mb in running.rss_mb().items()})
        print("memory after: ", {name: round(mb) for name, mb in running.rss_mb().items()})


if __name__ == "__main__":
    main()
