"""Plans on GPUs of several types."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.instance import Role
from cluster.request import Slo
from deploy.cli import main
from deploy.planner.capacity import Capacity, front, splits
from deploy.planner.deployment import Deployment, Layout
from deploy.planner.fleet import Fleet
from deploy.planner.goal import Goal, Infeasible
from deploy.planner.price import price_of, usd_per_hour, watts
from deploy.planner.search import plan
from deploy.planner.trial import simulate, spec_of
from tests.plans import goal_of, short_trials

__all__ = ["short_trials"]
H100, A100 = "h100-80gb", "a100-80gb"


def mixed(h100: int = 2, a100: int = 2, **more: Any) -> Goal:
    fleet = {H100: h100, A100: a100}
    return replace(goal_of(gpus=sum(fleet.values()), **more), hardware=None, fleet=fleet)


def pair(prefill: str = H100, decode: str = A100) -> Deployment:
    return Deployment(
        prefill=Layout(1, gpu=prefill), prefill_count=1, decode=Layout(1, gpu=decode), decode_count=2
    )


def test_instances_of_a_type_share_its_gpus_and_no_others() -> None:
    fleet = Fleet({H100: 8, A100: 4})
    four, one = Layout(4, gpu=H100), Layout(1, gpu=A100)
    assert (fleet.gpus, fleet.most(four), fleet.most(one)) == (12, 2, 4)
    assert fleet.most(Layout(2, gpu=H100), four, 1) == 2
    assert fleet.most(one, four, 2) == 4
    assert fleet.most(four, four, 3) == 0
    assert str(fleet.part(2)) == "4 h100-80gb + 2 a100-80gb"


def test_each_pool_has_the_speed_and_memory_of_its_gpus() -> None:
    capacity = Capacity(mixed(model="llama-3-70b", h100=4, a100=4))
    layouts = capacity.layouts()
    assert layouts == tuple(Layout(ranks, gpu=gpu) for gpu in (H100, A100) for ranks in (2, 4))
    new, old = Layout(4, gpu=H100), Layout(4, gpu=A100)
    assert capacity.prefill_rps(new) > 2 * capacity.prefill_rps(old)
    assert {
        (one.prefill and one.prefill.gpu, one.decode.gpu)
        for one in splits(capacity, layouts, Fleet({H100: 4, A100: 4}))
    } == {(H100, H100), (H100, A100), (A100, H100), (A100, A100)}
    assert str(pair()) == "1 x TP1 H100 prefill + 2 x TP1 A100 decode"


def test_its_spec_names_the_gpus_of_each_pool() -> None:
    goal = mixed()
    spec = spec_of(goal, pair())
    assert spec.sim.hardware == {Role.PREFILL: H100, Role.DECODE: A100}
    assert spec.device == "gpu"
    # What Ray calls a node with such GPUs.
    assert spec.prefill.resources == {"accelerator_type:H100": 0.001}
    assert spec.decode.resources == {"accelerator_type:A100": 0.001}
    assert spec_of(goal, pair(A100, A100)).sim.hardware == A100
    # Another plan's spec as the base.
    planned = {"policy": "unsplit", "colocate": 8}
    planned |= {
        role: {"pipeline_parallel_size": 2, "resources": {"accelerator_type:L40S": 1}} for role in Role
    }
    again = spec_of(replace(goal, base=planned), pair())
    assert (again.policy, again.colocate, again.prefill.pipeline_parallel_size) == ("goodput", None, 1)
    assert again.decode.resources == {"accelerator_type:A100": 0.001}
    own = replace(goal, base={"prefill": {"resources": {"rack_7": 1.0}, "cpus": 3}})
    assert spec_of(own, pair()).prefill.resources == {"rack_7": 1.0, "accelerator_type:H100": 0.001}
    assert spec_of(own, pair()).prefill.cpus == 3
    slow = simulate(goal, pair(A100, H100), 2.0, 0)
    assert simulate(goal, pair(), 2.0, 0).ttft_s[0] < 0.6 * slow.ttft_s[0]


def test_money_and_power_are_of_each_pools_gpus() -> None:
    goal = mixed()
    assert usd_per_hour(goal, pair()) == pytest.approx(38 / 8 + 2 * 17.6 / 8)
    assert watts(goal, pair()) == pytest.approx(700 * 0.97 + 2 * 400 * 0.44)
    unknown = replace(goal, fleet={H100: 2, "h200-141gb": 2}, objective="cost")
    assert usd_per_hour(unknown, pair(H100, "h200-141gb")) is None
    with pytest.raises(ValueError, match="not known for h100-80gb and h200-141gb"):
        price_of(unknown)(pair(H100, "h200-141gb"))


def test_what_is_dearer_and_does_less_is_no_candidate() -> None:
    goal = mixed(objective="cost")
    capacity = Capacity(goal)
    price = price_of(goal)
    found = front(capacity, capacity.layouts(), goal.room, price)
    assert [price(one) for one in found] == sorted(price(one) for one in found)
    for one in found:
        same = [other for other in found if (other.prefill, other.decode) == (one.prefill, one.decode)]
        cheaper = [other for other in same if price(other) < price(one)]
        assert not any(
            capacity.rps(other) >= capacity.rps(one) and capacity.most_rps(other) >= capacity.most_rps(one)
            for other in cheaper
        )


def test_the_cheapest_of_all_mixes_holds_the_rate() -> None:
    chat = "gamma:rate=3,count=400,cv=1,input=3000,output=60"
    goal = mixed(objective="cost", seeds=1, workload=chat, slo=Slo(ttft_s=0.25, tpot_s=0.05))
    found = plan(goal)
    assert found.chosen.trial.attainment >= goal.attainment
    cheapest = usd_per_hour(goal, found.chosen.deployment) or 0.0
    every = [found.chosen.deployment, *(one.deployment for one in found.others), *found.unseen]
    assert {(one.prefill.gpu, one.decode.gpu) for one in every if one.prefill} >= {(H100, A100), (A100, H100)}
    for fleet in ({H100: 2}, {A100: 2}):
        alone = replace(goal, fleet=fleet, gpus=2)
        try:
            other = plan(alone).chosen.deployment
        except Infeasible:
            continue
        assert cheapest <= (usd_per_hour(alone, other) or 0.0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["h100", "a100"], "each type once with a number"),
        (["h100=0", "a100=4"], "each type once with a number"),
        (["h100=4", "h100-80gb=4"], "each type once with a number"),
        (["h100=4", "k80=4"], "k80"),
        (["h100=4", "a100=4", "--gpus-total", "4"], "says how many there are"),
        (["h100=4", "a100=4", "--sweep", "gpus=1:8:2x", "--html", "page.html"], "one type of GPU"),
    ],
)
def test_a_fleet_that_is_none_is_one_clear_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--isl", "2000", "--osl", "8", "--rate", "2", "--ttft", "2000", "--tpot", "100", "--parts", "1"]
    assert main(["plan", "--model", "llama-3-8b", "--gpu", *words, *asked]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
