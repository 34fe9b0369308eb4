"""The search, on clusters so small that every candidate can be simulated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.request import Slo
from cluster.spec import parse_spec
from deploy.planner.capacity import Capacity, splits, unsplits
from deploy.planner.deployment import Deployment
from deploy.planner.fleet import Fleet
from deploy.planner.goal import Infeasible
from deploy.planner.plan import Plan
from deploy.planner.price import watts
from deploy.planner.search import plan
from deploy.planner.trial import goodput, raw_spec, simulate, spec_of
from tests.plans import COARSE, goal_of, short_trials

__all__ = ["short_trials"]


@pytest.fixture(scope="module")
def small() -> Plan:
    return plan(goal_of())


def test_the_plan_is_as_good_as_any_candidate() -> None:
    goal = goal_of(seeds=1)
    chosen = plan(goal).chosen
    capacity = Capacity(goal)
    layouts = capacity.layouts()
    every: Sequence[Deployment] = [
        Deployment(prefill=p, prefill_count=n, decode=d, decode_count=m)
        for p in layouts
        for d in layouts
        for n in range(1, 3)
        for m in range(1, 3)
        if n * p.gpus + m * d.gpus <= goal.gpus
    ]
    every = [*every, *unsplits(capacity, layouts, goal.room)]
    best = max(goodput(goal, one, 0, 4.0).per_gpu_rps for one in every)
    assert chosen.per_gpu_rps >= best * (1 - 2 * COARSE)


def test_the_same_plan_on_any_number_of_cores(small: Plan) -> None:
    again = plan(small.goal, jobs=2)
    assert json.dumps(again.to_json()) == json.dumps(small.to_json())


def test_the_alternatives_say_why_they_lost(small: Plan) -> None:
    assert small.others
    assert small.best_unsplit is not None
    assert small.best_split is not None
    for one in small.others:
        if one.rates_rps:
            assert one.per_gpu_rps <= small.chosen.per_gpu_rps
        else:
            assert one.trial.attainment < small.goal.attainment
        assert one.bottleneck
    text = small.to_text()
    assert "lost " in text
    assert f"{small.chosen.deployment}" in text


def test_a_figure_is_the_mean_over_parts_of_the_workload(small: Plan) -> None:
    assert len(small.chosen.rates_rps) == small.goal.seeds
    parts = [small.goal.part(seed, 600, 8.0)[0] for seed in range(2)]
    assert [r.input_tokens for r in parts[0]] == [3000] * 600
    assert [r.arrival_s for r in parts[0]] != [r.arrival_s for r in parts[1]]
    assert parts[1][0].arrival_s == 0.0
    assert parts[1] == sorted(parts[1], key=lambda request: request.arrival_s)


def test_the_spec_is_one_that_simulates_to_what_was_promised(small: Plan) -> None:
    import yaml

    spec = parse_spec(yaml.safe_load(small.to_yaml()))
    assert spec == spec_of(small.goal, small.chosen.deployment)
    again = simulate(small.goal, small.chosen.deployment, small.chosen.rates_rps[0], 0)
    assert again == small.chosen.trial
    assert again.attainment >= small.goal.attainment


def test_do_not_split_where_it_does_not_pay() -> None:
    """Short prompts and long answers without a bound on the first token: a prefill instance would idle."""
    goal = goal_of(
        gpus=2, workload="gamma:rate=2,count=600,cv=1,input=20,output=80", slo=Slo(ttft_s=5.0, tpot_s=0.05)
    )
    found = plan(replace(goal, seeds=1))
    assert not found.chosen.deployment.is_split
    assert "do not split" in found.to_text()
    spec = spec_of(goal, found.chosen.deployment)
    assert spec.policy == "unsplit"
    assert spec.prefill.count == 0


def test_a_rate_that_is_not_held_comes_with_what_would_do() -> None:
    goal = goal_of(workload="gamma:rate=60,count=3000,cv=1,input=3000,output=60", seeds=1)
    with pytest.raises(Infeasible) as refused:
        plan(goal)
    error = refused.value
    assert "3 GPUs hold" in error.why
    assert "of 60 at best" in error.why
    assert any("GPUs would do" in remedy for remedy in error.remedies)


def test_a_cluster_of_many_gpus_is_copies_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.planner.search.PART_GPUS", 2)
    part = plan(goal_of(gpus=2, seeds=1), must_hold=False).chosen
    whole = plan(goal_of(gpus=4, seeds=1), must_hold=False).chosen
    assert whole.deployment == part.deployment.times(2)
    # A larger pool does at least as much: it is searched from the sum of its parts on.
    assert whole.goodput_rps >= 2 * 0.9 * part.goodput_rps


def test_a_cap_on_power_leaves_gpus_dark() -> None:
    goal = goal_of(gpus=4, seeds=1, max_watts={"all": 1500.0})
    found = plan(goal).chosen.deployment
    drawn = watts(goal, found)
    assert drawn is not None
    assert drawn <= 1500.0
    assert found.gpus < 4
    with pytest.raises(Infeasible, match=r"draws so little: 0\.1 kW of all"):
        plan(replace(goal, max_watts={"all": 100.0}))


def test_the_least_gpus_that_hold_the_rate() -> None:
    goal = goal_of(gpus=4, objective="min_gpus", seeds=1)
    found = plan(goal)
    assert found.chosen.trial.attainment >= goal.attainment
    capacity = Capacity(goal)
    layouts = capacity.layouts()
    for gpus in range(1, found.chosen.deployment.gpus):
        fewer = Fleet({"": gpus})
        for less in (*splits(capacity, layouts, fewer), *unsplits(capacity, layouts, fewer)):
            assert simulate(goal, less, goal.rate_rps, 0).attainment < goal.attainment
    with pytest.raises(Infeasible, match="do not hold 120 requests/s"):
        plan(
            replace(goal, requests=goal_of(workload="fixed:rate=120,count=600,input=3000,output=60").requests)
        )


def test_a_mixture_of_experts_is_planned_in_groups_that_a_spec_can_say() -> None:
    goal = goal_of(model="mixtral-8x7b", gpus=4, seeds=1, slo=Slo(ttft_s=1.0, tpot_s=0.05))
    capacity = Capacity(goal)
    of_groups = [one for one in splits(capacity, capacity.layouts(), goal.room) if one.decode.data > 1]
    assert of_groups
    spec = parse_spec(raw_spec(goal, of_groups[0]))
    layout = of_groups[0].decode
    assert spec.decode.count == of_groups[0].decode_count * layout.data
    assert spec.decode.data_parallel_size == layout.data
    trial = simulate(goal, of_groups[0], 2.0, 0)
    assert trial.attainment > 0.9
    chosen = plan(goal).chosen
    assert chosen.goodput_rps >= 2.0
