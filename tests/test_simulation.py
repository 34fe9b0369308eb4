"""Invariants of the whole simulator, which runs the live router and controller."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from cluster.instance import Role
from cluster.latency import Batch, DecodeCost, LatencyProfile, PrefillCost
from cluster.request import ServeRequest, Slo
from cluster.spec import ClusterSpec, load_spec, parse_spec
from deploy.simulator.result import SimulationResult
from deploy.simulator.run import Simulation
from deploy.simulator.scenario import Scenario, parse_scenario
from deploy.slo_classes import SloClass
from deploy.workload import WorkloadRequest
from deploy.workload_grammar import make_workload
from router.policies import POLICIES
from router.policy import Decision
from router.view import View

ROOT = Path(__file__).resolve().parent.parent


def spec_of(**keys: Any) -> ClusterSpec:
    raw: dict[str, Any] = {
        "model": "m",
        "device": "cpu",
        "engine": "sim",
        "sim": {"step_s": 0.01, "prefill_s_per_token": 0.0001, "max_model_len": 512},
    }
    return parse_spec(raw | keys)


def steady(count: int, *, gap_s: float = 0.1, tokens: int = 64, answer: int = 20) -> list[WorkloadRequest]:
    return [
        WorkloadRequest(arrival_s=i * gap_s, input_tokens=tokens, output_tokens=answer) for i in range(count)
    ]


alone = st.fixed_dictionaries(
    {
        "count": st.integers(1, 3),
        "tensor_parallel_size": st.sampled_from([1, 2]),
        "pipeline_parallel_size": st.sampled_from([1, 1, 2, 3]),
    }
)
together = st.sampled_from(
    [
        {"count": 2, "data_parallel_size": 2},
        {"count": 3, "data_parallel_size": 3},
        {"count": 4, "data_parallel_size": 2},
    ]
)
pools = st.one_of(alone, alone, together)
few_requests = st.lists(
    st.builds(
        WorkloadRequest,
        arrival_s=st.floats(0, 3, allow_nan=False),
        input_tokens=st.integers(1, 400),
        output_tokens=st.integers(1, 100),
        hash_ids=st.lists(st.integers(0, 3), max_size=3).map(tuple),
        tokens_per_hash=st.just(48),
        session_id=st.sampled_from([None, "a", "b"]),
    ),
    min_size=1,
    max_size=8,
).map(lambda made: sorted(made, key=lambda request: request.arrival_s))


@st.composite
def many_requests(draw: st.DrawFn) -> list[WorkloadRequest]:
    """More than a small memory holds; drawn by a seed, since a crowd can't be shrunk to two."""
    rng = Random(draw(st.integers(0, 1 << 30)))
    longest = draw(st.sampled_from([30, 100, 400]))
    made = [
        WorkloadRequest(
            arrival_s=rng.uniform(0, 2),
            input_tokens=rng.randint(1, longest),
            output_tokens=rng.randint(1, 100),
            hash_ids=tuple(rng.choices(range(4), k=rng.randint(0, 3))),
            tokens_per_hash=48,
        )
        for _ in range(draw(st.sampled_from([20, 60, 120])))
    ]
    return sorted(made, key=lambda request: request.arrival_s)


times = st.floats(0, 4, allow_nan=False)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[ClusterSpec, Scenario]:
    """A cluster, small enough for its memory and its queues to run full, and what goes wrong in it."""
    options: dict[str, Any] = {
        "max_model_len": 512,
        "max_num_seqs": draw(st.sampled_from([2, 8, 32])),
        "max_num_batched_tokens": draw(st.sampled_from([32, 200, 4096])),
        "enable_chunked_prefill": draw(st.booleans()),
        "enable_prefix_caching": draw(st.booleans()),
        "block_size": draw(st.sampled_from([4, 16])),
    }
    sim: dict[str, Any] = {"kv_capacity_tokens": draw(st.sampled_from([512, 700, 2000, 100_000]))}
    if draw(st.booleans()):
        sim |= {
            "hardware": "a100",
            "shape": "mixtral-8x7b",
            "network": {"nic_gbps": draw(st.sampled_from([1, 400]))},
        }
    else:
        sim |= {"step_s": draw(st.sampled_from([0.0, 0.002, 0.05])), "prefill_s_per_token": 0.0002}
    spec = spec_of(
        prefill=draw(pools),
        decode=draw(pools),
        policy=draw(st.sampled_from(sorted(POLICIES))),
        prefill_order=draw(st.sampled_from(["arrival", "deadline"])),
        prefill_queue=draw(st.sampled_from(["bounded", "open"])),
        prefill_batching=draw(st.sampled_from(["mixed", "by_length"])),
        keep_sessions=draw(st.booleans()),
        decode_admission=draw(st.sampled_from(["free_blocks", "predicted_peak"])),
        engine_options=options,
        deadlines=draw(st.sampled_from([{}, {"prefill_s": 0.5, "transfer_s": 0.2, "stall_s": 6.0}])),
        transfer={"lease_s": 6},
        sim=sim,
    )
    names = st.sampled_from([name for name, _ in spec.places()])
    kills = st.fixed_dictionaries({"kill": names, "at_s": times})
    slows = st.fixed_dictionaries(
        {"slow": names, "at_s": times, "factor": st.sampled_from([0.5, 4.0]), "for_s": st.just(1.0)}
    )
    ends = [st.sampled_from([n for n, of in spec.places() if of is role]) for role in Role]
    cuts = st.fixed_dictionaries({"cut": st.tuples(*ends), "at_s": times, "for_s": st.just(2.0)})
    faults = draw(st.lists(st.one_of(kills, slows, cuts), max_size=3))
    raw = {
        "faults": faults,
        "cancel_share": draw(st.sampled_from([0.0, 0.3])),
        "state_delay_s": draw(st.sampled_from([0.0, 0.5])),
        "restart_s": draw(st.sampled_from([0.0, 1.0])),
    }
    return spec, parse_scenario(raw, spec)


def check(result: SimulationResult, asked: list[WorkloadRequest]) -> None:
    # 1. Every request of the workload ends exactly once, in one of these ways.
    assert [request.index for request in result.requests] == list(range(len(asked)))
    assert {request.status for request in result.requests} <= {"ok", "rejected", "failed", "cancelled"}
    for request, was in zip(result.requests, asked, strict=True):
        # 2. A complete answer has all its tokens, no answer has more.
        assert request.output_tokens <= was.output_tokens
        assert (request.status == "ok") == (request.output_tokens == was.output_tokens)
        # 3. Its stages are its whole time.
        assert sum(request.stages) == pytest.approx(request.end_s - request.arrival_s, abs=1e-6)
        assert request.arrival_s == pytest.approx(was.arrival_s, abs=1e-9)
        assert request.ttft_s is None or 0 <= request.ttft_s <= request.end_s - request.arrival_s + 1e-9
        # 4. Whoever has no answer hears why, unless it left.
        assert (request.error is None) == (request.status in ("ok", "cancelled"))
    for use in result.instances:
        # 5. No instance computes for longer than it is there.
        assert use.busy_s <= use.present_s + 1e-6
        assert use.present_s <= result.duration_s + 1e-6
        # 6. Nor uses more memory than it has.
        assert 0 <= use.kv_mean <= use.kv_peak + 1e-9 <= 1 + 1e-9
    # 7. What was moved was somebody's prompt.
    assert result.kv_tokens_moved <= sum(
        (request.moves + 1) * (r.input_tokens + r.output_tokens)
        for request, r in zip(result.requests, asked, strict=True)
    )


slos = st.lists(
    st.tuples(st.sampled_from([0.05, 1.0, math.inf]), st.sampled_from([0.01, 0.1, math.inf])),
    min_size=1,
    max_size=3,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds(), st.one_of(few_requests, many_requests()), slos)
def test_whatever_happens_every_request_ends_and_nothing_is_left(
    world: tuple[ClusterSpec, Scenario], asked: list[WorkloadRequest], bounds: list[tuple[float, float]]
) -> None:
    # 0. The simulation itself raises when it can't go on, or when at its end a block, a hop or a reservation
    # is still held.
    spec, scenario = world
    kinds = [SloClass(name=f"c{n}", slo=Slo(ttft_s=b[0], tpot_s=b[1])) for n, b in enumerate(bounds)]
    classes = [kinds[number % len(kinds)] for number in range(len(asked))]
    simulation = Simulation(spec, asked, classes, scenario=scenario, seed=1)
    result = simulation.run()
    refused = simulation.router.metrics.refusals._metrics
    for what, seen in (
        ("a prompt was refused", refused),
        ("a request was preempted", any(use.preemptions for use in result.instances)),
        ("a request was moved", any(request.moves for request in result.requests)),
        ("KV was computed anew", result.kv_tokens_recomputed),
        ("a request failed", any(request.status == "failed" for request in result.requests)),
        ("a prefix was found", any(use.prefix_hit_tokens for use in result.instances)),
    ):
        if seen:
            event(what)
    check(result, asked)


def test_an_undisturbed_request_takes_the_time_of_its_iterations() -> None:
    result = Simulation(spec_of(), steady(1, tokens=100, answer=11)).run()
    request = result.requests[0]
    # Prefill: a step with 100 prompt tokens. Decode: ten steps, the first with prefill's token.
    assert request.ttft_s == pytest.approx(0.01 + 100 * 0.0001)
    assert request.tpot_s == pytest.approx(0.01)
    assert (result.kv_tokens_moved, result.kv_tokens_recomputed) == (100, 0)
    assert [use.iterations for use in result.instances] == [1, 10]


def test_two_processes_write_the_same_bytes() -> None:
    story = (
        "from tests.test_simulation import spec_of, steady; from deploy.simulator.run import Simulation\n"
        "from deploy.simulator.scenario import parse_scenario\n"
        "spec = spec_of(prefill={'count': 3}, decode={'count': 3}, sim={'hardware': 'h100', "
        "'shape': 'opt-13b', 'max_model_len': 512})\n"
        "raw = {'cancel_share': 0.2, 'restart_s': 0.5, 'faults': [{'kill': 'decode-1', 'at_s': 1.0}]}\n"
        "r = Simulation(spec, steady(200, gap_s=0.01), scenario=parse_scenario(raw, spec), seed=3).run()\n"
        "print(r.requests, r.instances, r.kv_bytes_moved, r.faults, r.events)"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", story],
            cwd=ROOT,
            capture_output=True,
            check=True,
            timeout=60,
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed in (1, 2)
    ]
    assert told[0] == told[1]
    assert b"cancelled" in told[0]


def profile_file(directory: Path, **found: object) -> str:
    """A profile of engines that take 0.1 s for any prompt and 0.02 s for any step of decodes."""
    path = directory / "p.json"
    LatencyProfile(
        model="m",
        machine="two cores",
        source="made up",
        prefill=(PrefillCost(base_s=0.1, token_s=0.0),),
        decode=(DecodeCost(base_s=0.02),),
        region=Batch(1000, 1_000_000, 10, 10, 10_000)._asdict(),
        **found,  # type: ignore[arg-type]
    ).save(path)
    return str(path)


def test_phases_that_share_cores_slow_each_other_while_both_compute(tmp_path: Path) -> None:
    profile = profile_file(tmp_path, prefill_contention=1.5, decode_contention=((1, 2.0),))
    spec = spec_of(sim={"profile": profile, "max_model_len": 512})
    asked = [WorkloadRequest(arrival_s=at_s, input_tokens=64, output_tokens=21) for at_s in (0.0, 0.25)]
    first, second = Simulation(spec, asked).run().requests
    # The first decodes from 0.10 s on, alone until 0.25 s: 7.5 tokens. Then the second's prompt takes 1.5 x
    # 0.1 s while the first's next 3.75 tokens take 0.04 s each; from 0.40 s on it is alone, with 8.75 to go.
    assert first.ttft_s == pytest.approx(0.1)
    assert second.ttft_s == pytest.approx(0.15)
    assert first.end_s == pytest.approx(0.40 + 8.75 * 0.02)


def test_instances_without_the_split_slow_each_other_too(tmp_path: Path) -> None:
    profile = profile_file(tmp_path, prefill_contention=1.5, decode_contention=((1, 2.0),))
    spec = spec_of(sim={"profile": profile, "max_model_len": 512}, policy="unsplit")
    asked = [WorkloadRequest(arrival_s=0.0, input_tokens=64, output_tokens=count) for count in (21, 11)]
    long, short = Simulation(spec, asked).run().requests
    # Prompts of 0.1 s at once, on two instances, and then ten tokens each.
    assert long.ttft_s == short.ttft_s == pytest.approx(0.15)
    assert short.end_s == pytest.approx(0.15 + 10 * 0.04)
    assert long.end_s == pytest.approx(0.55 + 10 * 0.02)


def test_prompts_have_a_factor_of_their_own(tmp_path: Path) -> None:
    """Of three requests one decodes, alone, while the others' prompts come and go on the other instance."""
    for found, factor in (({"decode_contention": ((8, 2.0),)}, 2.0), ({"prefill_contention": 1.5}, 1.0)):
        profile = profile_file(tmp_path, **found)
        spec = spec_of(sim={"profile": profile, "max_model_len": 512})
        asked = [WorkloadRequest(arrival_s=at_s, input_tokens=64, output_tokens=21) for at_s in (0.0, 0.14)]
        first, second = Simulation(spec, asked).run().requests
        # 0.1 s of prompt, 2 tokens of 0.02 s, then 0.1 or 0.15 s of the second's prompt.
        slowed = (second.ttft_s or 0.0) / (0.02 * factor)
        assert first.end_s == pytest.approx(0.14 + (second.ttft_s or 0.0) + (18 - slowed) * 0.02, abs=1e-6)


def test_a_batch_that_is_slowed_less_takes_less_longer(tmp_path: Path) -> None:
    profile = profile_file(tmp_path, decode_contention=((1, 2.0), (2, 1.5)))
    spec = spec_of(sim={"profile": profile, "max_model_len": 512})
    asked = [WorkloadRequest(arrival_s=at_s, input_tokens=64, output_tokens=21) for at_s in (0.0, 0.0, 0.25)]
    first, second, third = Simulation(spec, asked).run().requests
    # As above, but two decode together from the second's first token on: both prompts are one iteration.
    assert third.ttft_s == pytest.approx(0.1)
    # 7.5 tokens until the third's prompt comes; in its 0.1 s so many at 0.03 s, the rest at 0.02 s.
    assert first.end_s == second.end_s == pytest.approx(0.35 + (20 - 7.5 - 0.1 / 0.03) * 0.02)


@pytest.mark.parametrize(("network", "delay_s"), [({}, 0.05 + 65 * 0.001), ({"nic_gbps": 1e9}, 0.05)])
def test_a_hand_over_takes_what_the_profile_says_of_it(
    network: dict[str, float], delay_s: float, tmp_path: Path
) -> None:
    profile = profile_file(tmp_path, handoff_s=0.05, handoff_token_s=0.001)
    links = {"latency_s": 0.0, **network}
    spec = spec_of(sim={"profile": profile, "max_model_len": 512, "network": links})
    asked = [WorkloadRequest(arrival_s=0.0, input_tokens=64, output_tokens=3)]
    (request,) = Simulation(spec, asked).run().requests
    assert request.end_s == pytest.approx(0.1 + delay_s + 2 * 0.02)


def test_hand_overs_at_one_time_go_one_after_the_other(tmp_path: Path) -> None:
    profile = profile_file(tmp_path, handoff_s=0.01, handoff_each_s=0.004)
    spec = spec_of(sim={"profile": profile, "max_model_len": 512, "network": {"latency_s": 0.0}})
    asked = [WorkloadRequest(arrival_s=at_s, input_tokens=64, output_tokens=2) for at_s in (0.0, 0.05, 0.05)]
    first, second, third = Simulation(spec, asked).run().requests
    assert first.end_s == pytest.approx(0.1 + 0.01 + 0.02)
    # Their prompts are one iteration. The third comes 4 ms after the second, whose iteration runs already; in
    # the next one its KV is read.
    assert second.end_s == pytest.approx(0.2 + 0.01 + 0.02)
    assert third.end_s == pytest.approx(0.2 + 0.01 + 0.02 + 0.02)


def test_a_hand_over_takes_longer_while_both_phases_compute(tmp_path: Path) -> None:
    profile = profile_file(tmp_path, handoff_s=0.01, handoff_beside_s=0.055)
    spec = spec_of(sim={"profile": profile, "max_model_len": 512, "network": {"latency_s": 0.0}})
    asked = [
        WorkloadRequest(arrival_s=at_s, input_tokens=64, output_tokens=output)
        for at_s, output in ((0.0, 2), (0.1, 20), (0.15, 2), (0.3, 2))
    ]
    first, second, third, _ = Simulation(spec, asked).run().requests
    # The first is handed over as the second's prompt begins, to an idle instance, where the second decodes
    # from 0.21 s on, every 0.02 s.
    assert first.end_s == pytest.approx(0.1 + 0.01 + 0.02)
    assert second.end_s == pytest.approx(0.2 + 0.01 + 19 * 0.02)
    # The third is handed over at 0.3 s, as the fourth's prompt begins, and there at 0.355 s: its KV is read
    # in the iteration from 0.37 s on, and it is in the next one.
    assert third.end_s == pytest.approx(0.37 + 0.02 + 0.02)


def test_a_killed_decode_instance_costs_time_and_no_token() -> None:
    spec = spec_of(decode={"count": 2})
    scenario = parse_scenario({"faults": [{"kill": "decode-0", "at_s": 1.0}], "restart_s": 2.0}, spec)
    calm = Simulation(spec, steady(100, gap_s=0.05)).run()
    stormy = Simulation(spec, steady(100, gap_s=0.05), scenario=scenario).run()
    assert {request.status for request in stormy.requests} == {"ok"}
    moved = [request for request in stormy.requests if request.moves]
    assert moved
    assert all(calm.requests[r.index].end_s < r.end_s for r in moved)
    decode_0 = next(use for use in stormy.instances if use.instance_id == "decode-0")
    assert decode_0.starts == 2
    # Noticed after 0.05 s, started again by the controller after its pause of about 1 s, READY 2 s later.
    assert stormy.duration_s - decode_0.present_s == pytest.approx(3.05, abs=0.2)
    assert [fault.text for fault in stormy.faults] == ["killed decode-0"]


def test_a_slow_instance_is_slow_for_as_long_as_it_was_asked_to() -> None:
    spec = spec_of()
    raw = {"faults": [{"slow": "decode-0", "at_s": 2.0, "factor": 3.0, "for_s": 2.0}]}
    result = Simulation(spec, steady(60, gap_s=0.1), scenario=parse_scenario(raw, spec)).run()
    tpot = {round(request.arrival_s, 1): request.tpot_s or 0.0 for request in result.requests}
    assert tpot[1.0] == pytest.approx(tpot[5.0], rel=0.05)
    assert tpot[2.5] == pytest.approx(3 * tpot[1.0], rel=0.05)


def test_over_a_cut_link_kv_is_computed_anew_and_counted() -> None:
    spec = spec_of()
    raw = {"faults": [{"cut": ["prefill-0", "decode-0"], "at_s": 1.0, "for_s": 1.0}]}
    result = Simulation(spec, steady(40, gap_s=0.1), scenario=parse_scenario(raw, spec)).run()
    assert {request.status for request in result.requests} == {"ok"}
    assert result.kv_tokens_recomputed == pytest.approx(10 * 64, abs=64)
    assert result.kv_tokens_moved == 40 * 64 - result.kv_tokens_recomputed


def test_with_no_decode_instance_left_requests_fail_in_bounded_time_and_say_why() -> None:
    spec = spec_of()
    raw = {"faults": [{"kill": "decode-0", "at_s": 1.0}], "restart_s": 1000.0}
    result = Simulation(spec, steady(40, gap_s=0.1), scenario=parse_scenario(raw, spec)).run()
    assert result.requests[0].status == "ok"
    assert {r.status for r in result.requests[12:]} == {"rejected"}
    assert all("decode" in (r.error or "") for r in result.requests[12:])
    assert result.duration_s < 10


def test_cancelled_clients_are_counted_and_cost_nothing_later() -> None:
    spec = spec_of()
    scenario = parse_scenario({"cancel_share": 0.5, "cancel_within_s": 0.1}, spec)
    result = Simulation(spec, steady(100, answer=100), scenario=scenario, seed=2).run()
    assert sum(request.status == "cancelled" for request in result.requests) == 50
    assert all(r.end_s - r.arrival_s <= 0.1 for r in result.requests if r.status == "cancelled")


def test_equal_prompts_are_found_in_the_prefix_cache() -> None:
    shared = [
        WorkloadRequest(
            arrival_s=i * 0.5, input_tokens=96, output_tokens=5, hash_ids=(1, 2), tokens_per_hash=48
        )
        for i in range(10)
    ]
    result = Simulation(spec_of(), shared).run()
    prefill = result.instances[0]
    # All but the last block: the last token is always computed, and a block is found whole or not at all.
    assert prefill.prefix_hit_tokens == 9 * 80
    assert prefill.prefill_tokens == 96 + 9 * 16


def test_no_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="no requests"):
        Simulation(spec_of(), [])


def test_a_hop_takes_its_time_where_no_profile_has_it() -> None:
    def times(hop_s: float) -> tuple[float | None, float]:
        sim = {"step_s": 0.01, "max_model_len": 512, "hop_s": hop_s}
        request = Simulation(spec_of(sim=sim), steady(1)).run().requests[0]
        return request.ttft_s, request.end_s

    assert times(0.0) == (pytest.approx(0.01), pytest.approx(0.2))
    assert times(0.03) == (pytest.approx(0.04), pytest.approx(0.26))


def test_a_policy_that_is_given_decides_instead_of_the_specs() -> None:
    class Last:
        def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
            return Decision(prefill="prefill-1", decode="decode-1", link="", reason="")

    spec = spec_of(prefill={"count": 2}, decode={"count": 2})
    result = Simulation(spec, steady(5), policy=Last()).run()
    assert {(r.prefill, r.decode) for r in result.requests} == {("prefill-1", "decode-1")}


@pytest.mark.parametrize(
    ("policy", "gain"), [("round_robin", 0.1), ("least_tokens", -0.01), ("goodput", -0.01)]
)
def test_forwarding_keeps_prompts_from_an_instance_that_is_slower_than_believed(
    policy: str, gain: float
) -> None:
    rng, now_s, asked = Random(3), 0.0, []
    for _ in range(1500):
        now_s += rng.expovariate(40)
        asked.append(WorkloadRequest(arrival_s=now_s, input_tokens=rng.randint(50, 480), output_tokens=2))
    classes = [SloClass(name="chat", slo=Slo(ttft_s=0.5))] * len(asked)
    kept = {}
    for queue in ("bounded", "open"):
        spec = spec_of(prefill={"count": 3}, decode={"count": 2}, prefill_queue=queue, policy=policy)
        # Slower than any policy believes: what they learn is bounded.
        raw = {"faults": [{"slow": "prefill-0", "at_s": 0.0, "factor": 8.0}]}
        result = Simulation(spec, asked, classes, scenario=parse_scenario(raw, spec), seed=1).run()
        check(result, asked)
        assert not any(request.moves for request in result.requests)  # a refusal is no move
        kept[queue] = sum(request.met for request in result.requests) / len(asked)
    assert kept["bounded"] > kept["open"] + gain


def test_what_is_cached_is_told_only_where_somebody_may_find_it() -> None:
    """And where nobody can, the decisions are the same with it."""
    specs = Path(__file__).resolve().parent.parent / "deploy" / "specs"
    spec = load_spec(specs / "h100-8b-256p256d.yaml", {"prefill": {"count": 2}, "decode": {"count": 2}})
    asked = make_workload("poisson:rate=20,count=200,lengths=conversation", 0)
    untold, told = Simulation(spec, asked), Simulation(spec, asked, scenario=Scenario(restart_s=61.0))
    assert (untold.router.wants_blocks, told.router.wants_blocks) == (False, True)
    assert untold.run().requests == told.run().requests
    shared = [replace(request, hash_ids=(1,)) for request in asked]
    assert Simulation(spec, shared).router.wants_blocks


def test_out_of_memory_requests_go_on_where_there_is_room() -> None:
    """Answers of 20 tokens, and every fourth one of 3,000, which nobody foresees."""
    lengths = Random(1)
    requests = [
        replace(request, output_tokens=lengths.choice((20, 20, 20, 3000)))
        for request in make_workload("poisson:rate=3,count=300,input=200,output=30", 0)
    ]

    def run(rebalance: str) -> tuple[Simulation, SimulationResult]:
        spec = parse_spec(
            {
                "model": "llama-3-8b",
                "engine_options": {"max_model_len": 8192},
                "decode": {"count": 3},
                "rebalance": rebalance,
                "sim": {"hardware": "h100", "kv_capacity_tokens": 16_000},
            }
        )
        slo = SloClass(name="all", slo=Slo(ttft_s=2.0, tpot_s=0.03))
        simulation = Simulation(spec, requests, [slo] * len(requests))
        return simulation, simulation.run()

    def preemptions(result: SimulationResult) -> int:
        return sum(instance.preemptions for instance in result.instances)

    (_, without), (moving, result) = run("off"), run("memory")
    assert moving.router.metrics.migrations.labels(cause="memory")._value.get() > 0
    assert moving.router.metrics.migration_stall_seconds._sum.get() > 0
    assert preemptions(result) < preemptions(without)
    assert {request.status for request in result.requests} == {"ok"}
    assert [request.output_tokens for request in result.requests] == [one.output_tokens for one in requests]


def test_a_group_dies_and_comes_back_as_one() -> None:
    spec = spec_of(decode={"count": 4, "data_parallel_size": 2})
    raw = {"faults": [{"kill": "decode-1", "at_s": 1.0}], "restart_s": 0.5}
    result = Simulation(spec, steady(100, gap_s=0.05), scenario=parse_scenario(raw, spec)).run()
    assert {request.status for request in result.requests} == {"ok"}
    decodes = [use for use in result.instances if use.role is Role.DECODE]
    assert [use.starts for use in decodes] == [2, 2, 1, 1]
    # Both are asked again as soon as they are back: nobody waits for a deadline.
    assert max(request.end_s - request.arrival_s for request in result.requests) < 5.0
    assert decodes[0].busy_s > 1.5
