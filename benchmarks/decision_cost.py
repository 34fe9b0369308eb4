"""What a decision costs: microseconds of each policy in clusters of two sizes, and bytes of the prefix index
(Markdown).

python -m benchmarks.decision_cost
python -m benchmarks.decision_cost --blocks 1000000

Instances that have prompts and decodes of three classes; prompts of up to 16k tokens, of which every other
one is cached somewhere, up to the whole. Policies take turns, so that a neighbour on the machine disturbs all
alike.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random
from resource import getpagesize

from benchmarks.policies import MIXED, spec_of
from cluster.instance import EngineFacts, Fingerprint, InstanceInfo, InstanceLoad, InstanceState, Role
from cluster.prefix_hash import chain_hashes, span_tokens
from cluster.request import ServeRequest
from cluster.wire import Blocks
from router.fleet import Fleet
from router.links import NETWORK, NODE
from router.policies import POLICIES, latency_of, make_policy
from router.predictor import Predictor
from router.prefix_index import PrefixIndex
from router.view import LastSeen

SIZES = (32, 512)
PROMPT_TOKENS = 16_000
DECISIONS = 1000


def loaded_fleet(count: int, rng: Random, *, colocated: bool) -> Fleet[LastSeen]:
    """Instances of both roles as a busy cluster has them, four on a node."""
    facts = EngineFacts(
        fingerprint=Fingerprint(engine="sim", model="m", dtype="", kv_dtype="", block_size_tokens=16),
        max_model_len=32_768,
        kv_capacity_tokens=500_000,
        kv_bytes_per_token=1,
        max_num_seqs=1024,
    )
    fleet: Fleet[LastSeen] = Fleet(by_deadline=True, with_prefixes=True)
    for role in Role:
        for number in range(count):
            name = f"{role}-{number}"
            state = InstanceState.READY
            info = InstanceInfo(instance_id=name, role=role, engine_index=number, state=state, facts=facts)
            node = f"{number // 2}" if colocated else f"{role}-{number // 4}"
            fleet.join(replace(info, node=node), LastSeen(InstanceLoad()))
            view = fleet.view_of(name)
            assert view is not None
            for prompt in range(rng.randrange(4) if role is Role.PREFILL else 0):
                bound_s = rng.choice(MIXED).slo.ttft_s
                due_s = rng.uniform(0.3, 1.0) * bound_s
                view.prompts.add(f"p{prompt}", rng.uniform(0.05, 0.4), due_s, 0.0, bound_s=bound_s)
            for decode in range(rng.randrange(20, 60) if role is Role.DECODE else 0):
                slo = rng.choice(MIXED).slo
                view.decodes.add(f"d{decode}", rng.randrange(100, 4000), rng.randrange(20, 500), slo.tpot_s)
    return fleet


def measure(count: int, decisions: int, *, colocated: bool) -> dict[str, list[float]]:
    """Seconds of each decision, by policy."""
    rng = Random(count)
    fleet = loaded_fleet(count, rng, colocated=colocated)
    predictor = Predictor(latency_of(spec_of(32, "goodput")))
    for tokens_moved in (PROMPT_TOKENS // 2, PROMPT_TOKENS):
        predictor.hand_overs.came(NODE, tokens_moved, 1e-6 * tokens_moved)
        predictor.hand_overs.came(NETWORK, tokens_moved, 1e-5 * tokens_moved)
    policies = {name: make_policy(name, predictor) for name in POLICIES if name != "unsplit"}
    took: dict[str, list[float]] = {name: [] for name in policies}
    tokens = [rng.randrange(100_000) for _ in range(PROMPT_TOKENS)]
    size = span_tokens(16)
    for number in range(decisions):
        length = rng.randrange(PROMPT_TOKENS // 2, PROMPT_TOKENS)
        prompt = [rng.randrange(100_000), *tokens[1:length]]
        if number % 2:
            cached = list(chain_hashes(prompt[: rng.randrange(length)], size))
            for _ in range(rng.randrange(1, 4)):
                fleet.blocks_changed(f"prefill-{rng.randrange(count)}", Blocks(stored=cached))
        request = ServeRequest(
            request_id=f"r{number}", prompt_token_ids=prompt, max_tokens=500, slo=rng.choice(MIXED).slo
        )
        for name, policy in policies.items():
            began_s = time.perf_counter()
            policy.decide(request, fleet, 0.1)
            took[name].append(time.perf_counter() - began_s)
    return took


def index_bytes(blocks: int, instances: int = 64) -> tuple[int, int]:
    """Memory of an index of so many blocks, a tenth of which two instances have, and how many it has."""
    rng = Random(0)
    before = _resident_bytes()
    index = PrefixIndex(128, most_blocks=blocks)
    each = blocks // instances
    last: list[int] = []
    for number in range(instances):
        names = [rng.getrandbits(62) for _ in range(each)]
        index.stored(f"prefill-{number}", names)
        index.stored(f"prefill-{number}", last)
        last = names[: each // 10]
        del names
    return _resident_bytes() - before, len(index)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decisions", type=int, default=DECISIONS)
    parser.add_argument("--blocks", type=int, default=10_000_000, help="in the index")
    args = parser.parse_args()
    print("| instances of each role | pools | policy | p50 (us) | p99 (us) |\n|---|---|---|---|---|")
    for count, colocated in product(SIZES, (False, True)):
        for name, seconds in measure(count, args.decisions, colocated=colocated).items():
            ordered = sorted(seconds)
            p50, p99 = (ordered[math.ceil(share * len(ordered)) - 1] * 1e6 for share in (0.5, 0.99))
            pools = "colocated" if colocated else "apart"
            print(f"| {count} | {pools} | {name} | {p50:.0f} | {p99:.0f} |", flush=True)
    used, blocks = index_bytes(args.blocks)
    print(f"\nIndex of {blocks:,} names: {used / 2**20:,.0f} MiB, {used / blocks:.0f} bytes a name.")


if __name__ == "__main__":
    main()
