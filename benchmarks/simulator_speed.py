"""How fast the simulator is: seconds, events per second and memory for large runs, and its growth with size.

python -m benchmarks.simulator_speed
python -m benchmarks.simulator_speed --policy goodput

Each run is a process of its own, one after the other, so its memory is its own. CPU seconds are printed
beside those on the clock: on a shared machine only the former are the simulator's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cluster.spec import load_spec
from deploy.simulator.run import Simulation
from deploy.workload_grammar import make_workload

ROOT = Path(__file__).resolve().parent.parent
SPECS = ROOT / "deploy" / "specs"
LARGE = (
    ("100,000 requests, 8P + 8D", "h100-70b-8p8d.yaml", 8, 100_000, 25.0),
    ("20,000 requests, 256P + 256D", "h100-8b-256p256d.yaml", 256, 20_000, 1000.0),
)
# Instances of each role at one load per instance.
GROWTH = (4, 16, 64, 256)
GROWTH_RPS_PER_INSTANCE = 4.0
GROWTH_REQUESTS = 10_000


def one(spec_file: str, count: int, requests: int, rate: float, policy: str) -> dict[str, Any]:
    """Simulate in this process."""
    spec = load_spec(SPECS / spec_file, {"policy": policy})
    pools = {role: getattr(spec, role).model_copy(update={"count": count}) for role in ("prefill", "decode")}
    workload = make_workload(f"poisson:rate={rate},count={requests},lengths=conversation", 0)
    longest = spec.engine_options["max_model_len"]
    workload = [r for r in workload if r.input_tokens + r.output_tokens <= longest]
    simulation = Simulation(spec.model_copy(update=pools), workload)
    cpu_s, began_s = time.process_time(), time.perf_counter()
    result = simulation.run()
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    return {
        "requests": len(workload),
        "output_tokens": sum(request.output_tokens for request in result.requests),
        "virtual_s": result.duration_s,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "events": result.events,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "ok": sum(request.status == "ok" for request in result.requests),
    }


def run(*words: object) -> dict[str, Any]:
    """The same in a process of its own."""
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.simulator_speed", "--one", *map(str, words)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="least_tokens", help="of the router; its decisions cost time too")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3, help="of the growth runs; the least counts")
    args = parser.parse_args()
    if args.one:
        spec, count, requests, rate, policy = args.one
        print(json.dumps(one(spec, int(count), int(requests), float(rate), policy)))
        return
    print("| run | answered | output tokens | virtual s | clock s | CPU s | events/s | memory MB |")
    print("|---" * 8 + "|")
    for name, *words in LARGE:
        found = run(*words, args.policy)
        print(
            f"| {name} | {found['ok']:,} | {found['output_tokens']:,} | {found['virtual_s']:,.0f} "
            f"| {found['wall_s']:.1f} | {found['cpu_s']:.1f} | {found['events'] / found['wall_s']:,.0f} "
            f"| {found['rss_mb']:,.0f} |",
            flush=True,
        )
    print("\n| instances of each role | CPU per request (us) | beside the smallest |\n|---|---|---|")
    least = {count: float("inf") for count in GROWTH}
    for _ in range(args.rounds):
        for count in GROWTH:
            found = run(LARGE[1][1], count, GROWTH_REQUESTS, GROWTH_RPS_PER_INSTANCE * count, args.policy)
            least[count] = min(least[count], found["cpu_s"] / found["requests"])
    for count in GROWTH:
        print(f"| {count} | {least[count] * 1e6:,.0f} | {least[count] / least[GROWTH[0]]:.2f} x |")


if __name__ == "__main__":
    main()
