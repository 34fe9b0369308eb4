"""What `keep_sessions` is worth: prompt tokens found in caches and SLO attainment, simulated (Markdown).

python -m benchmarks.kept_sessions                          # three memories, 2 seeds

Agents with the tool gaps of a real trace (half of them below 0.7 s), ten turns each on average, on two
prefill and two decode instances of `benchmarks.policies`' cluster; and single requests, which push everything
out of the caches. The memory of a prefill instance is a part of what it would have. Needs the shared traces.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from itertools import count, product
from random import Random
from statistics import fmean

from benchmarks.latency_data import TRACES
from benchmarks.policies import spec_of
from cluster.request import Slo
from deploy.simulator.run import Simulation
from deploy.slo_classes import SloClass
from deploy.workload import WorkloadRequest

GAPS = TRACES / "agentic" / "lmcache_agentic_sample.jsonl.gz"
GPUS = 16
TURNS = 10
SLO = SloClass(name="all", slo=Slo(ttft_s=2.0, tpot_s=0.05), share=1.0)
TOKENS_PER_HASH = 512


def tool_gaps() -> list[float]:
    with gzip.open(GAPS, "rt", encoding="utf-8") as lines:
        return [gap for row in map(json.loads, lines) if (gap := row["pre_gap_s"]) > 0]


def agents(rate_rps: float, seconds: float, gaps: list[float], rng: Random) -> list[WorkloadRequest]:
    """Sessions that begin at that rate. Each turn's prompt is the one before, its answer and what a tool
    said; it comes a tool's time after the answer, which takes 25 ms a token and a second."""
    found: list[WorkloadRequest] = []
    ids = count()
    at_s, number = 0.0, 0
    while (at_s := at_s + rng.expovariate(rate_rps)) < seconds:
        turn_s, tokens, hashes = at_s, rng.randrange(3000, 6000), [next(ids)]
        number += 1
        while turn_s < seconds:
            hashes += [next(ids) for _ in range(-(-tokens // TOKENS_PER_HASH) - len(hashes))]
            answer = rng.randrange(40, 200)
            found.append(
                WorkloadRequest(
                    arrival_s=turn_s,
                    input_tokens=tokens,
                    output_tokens=answer,
                    hash_ids=tuple(hashes),
                    tokens_per_hash=TOKENS_PER_HASH,
                    session_id=f"agent-{number}",
                )
            )
            if rng.random() < 1 / TURNS or tokens > 14_000:
                break
            turn_s += 1.0 + 0.025 * answer + rng.choice(gaps)
            tokens += answer + rng.randrange(100, 1000)
    return found


def others(rate_rps: float, seconds: float, rng: Random) -> list[WorkloadRequest]:
    """Single requests, each with a prompt of its own."""
    found = []
    at_s = 0.0
    while (at_s := at_s + rng.expovariate(rate_rps)) < seconds:
        tokens = rng.randrange(500, 4000)
        found.append(
            WorkloadRequest(arrival_s=at_s, input_tokens=tokens, output_tokens=rng.randrange(20, 200))
        )
    return found


def measure(tokens: int, keeps: bool, seed: int, args: argparse.Namespace) -> tuple[float, float, float]:
    """Share of the sessions' prompt tokens that was found, SLOs kept, mean TTFT of turns."""
    rng = Random(f"{seed}/agents")
    requests = agents(args.sessions, args.seconds, tool_gaps(), rng) + others(args.others, args.seconds, rng)
    requests.sort(key=lambda request: request.arrival_s)
    spec = spec_of(GPUS, args.policy)
    spec = spec.model_copy(
        update={
            "keep_sessions": keeps,
            "prefill": spec.prefill.model_copy(
                update={"engine_options": {"num_gpu_blocks_override": tokens // 16}}
            ),
        }
    )
    result = Simulation(spec, requests, [SLO] * len(requests)).run()
    turns = [one for one in result.requests if requests[one.index].session_id]
    asked = sum(one.input_tokens for one in turns)
    found = sum(instance.prefix_hit_tokens for instance in result.instances if instance.role == "prefill")
    ttft_s = fmean(one.ttft_s for one in turns if one.ttft_s is not None)
    return found / asked, fmean(one.met for one in result.requests), ttft_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", type=int, nargs="+", default=[50_000, 80_000, 120_000], help="tokens")
    parser.add_argument("--sessions", type=float, default=0.4, help="that begin, per second")
    parser.add_argument("--others", type=float, default=6.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--policy", default="goodput")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    if not TRACES.is_dir():
        sys.exit(f"{TRACES.name}: the shared traces are needed beside the checkout")
    print("| tokens of KV | keep_sessions | found in the cache | SLOs kept | mean TTFT of turns |")
    print("|---|---|---|---|---|")
    for tokens, keeps in product(args.memory, (False, True)):
        seeds = [measure(tokens, keeps, seed, args) for seed in range(args.seeds)]
        found, kept, ttft_s = (fmean(column) for column in zip(*seeds, strict=True))
        print(f"| {tokens:,} | {keeps} | {found:.1%} | {kept:.1%} | {1e3 * ttft_s:.0f} ms |", flush=True)


if __name__ == "__main__":
    main()
