"""Where requests for LoRA adapters go, what is learned of loading, and how often that is, simulated."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.instance import InstanceLoad, Role
from cluster.request import NO_SLO, ServeRequest, Slo
from cluster.spec import parse_spec
from deploy.simulator.result import SimulationResult
from deploy.simulator.run import Simulation
from deploy.workload import WorkloadRequest
from router.claim import Claim
from router.fleet import Fleet
from router.goodput import Goodput
from router.policies import POLICIES, make_policy
from router.policy import Decision, Policy
from router.predictor import Predictor
from router.view import LastSeen, View
from tests.test_goodput import LATENCY
from tests.twins import FACTS, info_of

LOAD_S = 0.2
WITH_ADAPTERS = replace(FACTS, max_loras=2, max_cpu_loras=3)
NAMES = ("a", "b", "c")


def fleet_of(*instance_ids: str) -> Fleet[LastSeen]:
    fleet: Fleet[LastSeen] = Fleet()
    for instance_id in instance_ids:
        index = int(instance_id.split("-")[1])
        fleet.join(replace(info_of(instance_id, index), facts=WITH_ADAPTERS), LastSeen(InstanceLoad()))
    return fleet


def view_of(fleet: Fleet[LastSeen], instance_id: str) -> Any:
    return fleet.view_of(instance_id)


def goodput() -> Goodput:
    return Goodput(Predictor(dict.fromkeys(Role, LATENCY), load_s=LOAD_S))


def asked(adapter: str, slo: Slo = NO_SLO, name: str = "r") -> ServeRequest:
    return ServeRequest(
        request_id=name, prompt_token_ids=[1] * 1000, max_tokens=100, slo=slo, adapter=adapter,
        plain_prompt=not adapter,
    )  # fmt: skip


@pytest.mark.parametrize(("queue_s", "expected"), [(0.0, 1), (LOAD_S - 0.01, 1), (LOAD_S + 0.01, 0)])
def test_it_goes_where_its_adapter_is_unless_the_queue_there_is_longer_than_the_load(
    queue_s: float, expected: int
) -> None:
    fleet = fleet_of("prefill-0", "prefill-1", "decode-0", "decode-1")
    view_of(fleet, "prefill-1").adapters.hold("a").release()
    if queue_s:
        view_of(fleet, "prefill-1").prompts.add("before", queue_s, math.inf, 0.0)
    view_of(fleet, "decode-1").adapters.hold("a").release()
    decision = goodput().decide(asked("a"), fleet, 0.0)
    assert (decision.prefill, decision.decode) == (f"prefill-{expected}", "decode-1")
    assert decision.predicted is not None
    assert decision.predicted.load_s == (0.0 if expected else LOAD_S)
    # 10 ms and 0.1 ms for each of 1,000 tokens.
    assert decision.predicted.ttft_s == pytest.approx(0.11 + (queue_s if expected else LOAD_S))
    assert goodput().decide(asked(""), fleet, 0.0).prefill == "prefill-0"


def test_who_would_wait_for_a_slot_goes_where_there_is_one() -> None:
    """Its adapter is on the host of decode-0, but requests of two others have the slots there."""
    fleet = fleet_of("prefill-0", "decode-0", "decode-1")
    adapters = view_of(fleet, "decode-0").adapters
    adapters.hold("c").release()
    for name in ("a", "b"):
        adapters.use(name)
        view_of(fleet, "decode-0").decodes.add(name, 100, 100, math.inf)
    for number in range(3):  # it is the fuller one
        view_of(fleet, "decode-1").decodes.add(f"d{number}", 100, 100, math.inf)
    assert adapters.is_loaded("c")
    assert goodput().decide(asked("c"), fleet, 0.0).decode == "decode-1"
    assert goodput().decide(asked("a"), fleet, 0.0).decode == "decode-0"
    alone = fleet.without(frozenset({"decode-1"}))
    waiting, running = (goodput().decide(asked(name), alone, 0.0).predicted for name in ("c", "a"))
    assert waiting is not None
    assert running is not None
    assert waiting.tpot_s > 1.3 * running.tpot_s


def test_loading_would_stop_those_that_decode_there() -> None:
    """20 with a bound of 60 ms on their TPOT take 30 ms; 2 s more for each answer of 50 tokens is 40 ms."""
    fleet = fleet_of("prefill-0", "decode-0", "decode-1")
    for number in range(20):
        view_of(fleet, "decode-0").decodes.add(f"d{number}", 100, 50, 0.06)
    for number in range(25):
        view_of(fleet, "decode-1").decodes.add(f"d{number}", 100, 50, math.inf)
    policy = Goodput(Predictor(dict.fromkeys(Role, LATENCY), load_s=2.0))
    assert policy.decide(asked(""), fleet, 0.0).decode == "decode-0"
    assert policy.decide(asked("a"), fleet, 0.0).decode == "decode-1"


def test_what_is_sent_is_believed_and_given_back() -> None:
    fleet = fleet_of("prefill-0", "decode-0")
    decision = goodput().decide(asked("a"), fleet, 0.0)
    held = Claim(fleet, asked("a"), decision, lone=None, tokens=1000, now_s=0.0)
    assert [view_of(fleet, name).adapters.users for name in ("prefill-0", "decode-0")] == [{"a": 1}] * 2
    held.prefilled(0.3)
    assert [view_of(fleet, name).adapters.users for name in ("prefill-0", "decode-0")] == [{}, {"a": 1}]
    held.close(0.5)
    held.close(0.5)
    assert view_of(fleet, "decode-0").adapters.users == {}
    assert view_of(fleet, "prefill-0").adapters.on_host == ("a",)


def test_what_loading_takes_is_learned_and_nothing_else_from_it() -> None:
    fleet, predictor = fleet_of("prefill-0", "decode-0"), Predictor(dict.fromkeys(Role, LATENCY))
    view = view_of(fleet, "prefill-0")
    for number in range(40):
        request = asked(f"adapter-{number}")
        decision = Goodput(predictor).decide(request, fleet, 0.0)
        held = Claim(fleet, request, decision, lone=None, tokens=1000, now_s=0.0, predictor=predictor)
        held.prefilled(0.11 + 0.7)
        held.close(1.0)
    assert predictor.load_s == pytest.approx(0.7, rel=0.01)
    assert view.prefill_pace.factor == 1.0


@pytest.mark.parametrize("name", ["least_tokens", "power_of_two", "prefix_affinity", "dynamo_kv"])
def test_among_equals_a_policy_that_counts_takes_where_it_is_loaded(name: str) -> None:
    fleet = fleet_of("prefill-0", "prefill-1", "decode-0", "decode-1")
    for instance_id in ("prefill-1", "decode-1"):
        view_of(fleet, instance_id).adapters.hold("a").release()
    decision = make_policy(name).decide(asked("a"), fleet, 0.0)
    assert (decision.prefill, decision.decode) == ("prefill-1", "decode-1")
    assert make_policy("unsplit").decide(asked("a"), fleet, 0.0).prefill == "prefill-1"


def test_aibrix_routes_an_adapter_to_those_that_have_it() -> None:
    fleet = fleet_of("prefill-0", "prefill-1", "decode-0")
    view_of(fleet, "prefill-1").adapters.hold("a").release()
    with fleet.reservations.hold("prefill-1", 50):
        affine, least = (make_policy(name) for name in ("prefix_affinity", "least_tokens"))
        assert affine.decide(asked("a"), fleet, 0.0).prefill == "prefill-1"
        assert least.decide(asked("a"), fleet, 0.0).prefill == "prefill-0"


used = st.lists(st.sampled_from(NAMES), max_size=4)
instances = st.lists(st.tuples(used, used, st.floats(0.0, 0.5)), min_size=1, max_size=4)


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=40, deadline=None)
@given(instances, instances, st.sampled_from(NAMES), st.sampled_from([0.2, math.inf]), st.integers(0, 99))
def test_a_decision_depends_on_the_instances_and_not_on_their_order(
    name: str,
    prefills: list[tuple[list[str], list[str], float]],
    decodes: list[tuple[list[str], list[str], float]],
    adapter: str,
    bound_s: float,
    seed: int,
) -> None:
    facts = {
        f"{role}-{index}": each
        for role, pool in (("prefill", prefills), ("decode", decodes))
        for index, each in enumerate(pool)
    }
    decisions = []
    for order in (list(facts), Random(seed).sample(list(facts), len(facts))):
        fleet = fleet_of(*order)
        for instance_id, (were, are, work_s) in facts.items():
            view = view_of(fleet, instance_id)
            for one in were:
                view.adapters.hold(one).release()
            for number, one in enumerate(are):
                view.adapters.use(one)
                view.decodes.add(f"d{number}", 100, 50, bound_s)
            if work_s:
                view.prompts.add("p", work_s, math.inf, 0.0, tokens=100)
        request = asked(adapter, Slo(ttft_s=bound_s, tpot_s=bound_s))
        before = fleet.snapshot()
        policy = make_policy(name, Predictor(dict.fromkeys(Role, LATENCY), load_s=LOAD_S))
        decisions.append(policy.decide(request, fleet, 0.05))
        for role in Role:
            for one_view, other in zip(before.of(role), fleet.of(role), strict=True):
                assert one_view.adapters.in_slots == other.adapters.in_slots
                assert one_view.adapters.users == other.adapters.users
    assert decisions[0] == decisions[1]


class Blind:
    """Decides without regard to adapters."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def decide(self, request: ServeRequest, view: View, now_s: float) -> Decision:
        return self._policy.decide(replace(request, adapter=""), view, now_s)


def simulate(policy: str, *, blind: bool = False) -> SimulationResult:
    """16 adapters, Zipf, on 4 + 4 instances of 4 slots, 16 requests per second."""
    spec = parse_spec(
        {
            "model": "m", "device": "cpu", "engine": "sim", "policy": policy,
            "engine_options": {"enable_lora": True, "max_loras": 4},
            "prefill": {"count": 4}, "decode": {"count": 4},
            "sim": {
                "step_s": 0.01, "prefill_s_per_token": 0.0001, "max_model_len": 2048,
                "adapter_load_s": LOAD_S,
            },
        }
    )  # fmt: skip
    rng = Random(5)
    adapters = rng.choices(range(16), [1 / rank for rank in range(1, 17)], k=600)
    requests = [
        WorkloadRequest(
            arrival_s=index / 16,
            input_tokens=rng.randint(50, 1000),
            output_tokens=20,
            adapter=f"adapter-{adapter}",
        )
        for index, adapter in enumerate(adapters)
    ]
    return Simulation(spec, requests, wrap=Blind if blind else lambda policy: policy).run()


@pytest.mark.parametrize("policy", ["goodput", "prefix_affinity"])
def test_who_looks_at_adapters_loads_fewer(policy: str) -> None:
    aware, blind = simulate(policy), simulate(policy, blind=True)
    for result in (aware, blind):
        assert all(request.status == "ok" for request in result.requests)
    loads, blind_loads = (sum(use.adapter_loads for use in result.instances) for result in (aware, blind))
    assert loads < blind_loads / 3
    if policy == "goodput":
        ttfts, blind_ttfts = (
            sum(request.ttft_s or 0.0 for request in result.requests) for result in (aware, blind)
        )
        assert ttfts < blind_ttfts


def test_twins_hold_at_most_so_many_and_lose_no_request() -> None:
    """One slot, three adapters, all at once: they take turns."""
    spec = parse_spec(
        {
            "model": "m", "device": "cpu", "engine": "sim", "policy": "least_tokens",
            "engine_options": {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 3},
            "sim": {"step_s": 0.01, "max_model_len": 512, "adapter_load_s": LOAD_S},
        }
    )  # fmt: skip
    requests = [
        WorkloadRequest(arrival_s=0.0, input_tokens=20, output_tokens=10, adapter=NAMES[n % 3])
        for n in range(12)
    ]
    result = Simulation(spec, requests).run()
    assert all(request.status == "ok" for request in result.requests)
    assert [use.adapter_loads for use in result.instances] == [3, 3]
