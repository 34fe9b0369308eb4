"""What a deployment costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deploy.planner.deployment import Deployment, Layout
from deploy.planner.price import price_of, usd_per_hour, watts, within_power
from tests.plans import goal_of

SPLIT = Deployment(prefill=Layout(2), prefill_count=3, decode=Layout(4), decode_count=1)
UNSPLIT = Deployment(prefill=None, prefill_count=0, decode=Layout(1), decode_count=10)


def test_money_goes_by_gpus() -> None:
    goal = goal_of(gpu="a100")
    assert usd_per_hour(goal, SPLIT) == pytest.approx(22.0)
    assert price_of(replace(goal, objective="cost"))(SPLIT) == pytest.approx(22.0)
    assert price_of(replace(goal, objective="min_gpus"))(SPLIT) == 10


def test_decodes_take_less_power_than_prompts() -> None:
    goal = goal_of(gpu="a100")
    assert watts(goal, SPLIT) == pytest.approx(400 * (0.97 * 6 + 0.44 * 4))
    split, unsplit = watts(goal, SPLIT), watts(goal, UNSPLIT)
    assert split is not None
    assert unsplit is not None
    assert split < unsplit


def test_caps_on_power_are_of_all_or_of_a_pool() -> None:
    goal = goal_of(gpu="a100")
    drawn = watts(goal, SPLIT)
    assert drawn is not None
    for caps, fits in (
        ({}, True),
        ({"all": drawn}, True),
        ({"all": drawn - 1}, False),
        ({"prefill": 400 * 0.97 * 6}, True),
        ({"prefill": 400 * 0.97 * 5}, False),
        ({"decode": 400 * 0.44 * 4, "all": drawn}, True),
        ({"decode": 400 * 0.44 * 3}, False),
    ):
        assert within_power(replace(goal, max_watts=caps), SPLIT) is fits, caps
    # Without the split there are no pools, but all.
    assert within_power(replace(goal, max_watts={"prefill": 1.0}), UNSPLIT)
    unknown = replace(goal, hardware=None, max_watts={"all": 1.0})
    with pytest.raises(ValueError, match="not known for this machine"):
        within_power(unknown, SPLIT)


def test_a_price_that_is_not_known_is_no_objective() -> None:
    goal = goal_of(gpu="h200")
    assert usd_per_hour(goal, SPLIT) is None
    with pytest.raises(ValueError, match="cost: not known for h200-141gb, but for a100-80gb, h100-80gb"):
        price_of(replace(goal, objective="cost"))(SPLIT)
