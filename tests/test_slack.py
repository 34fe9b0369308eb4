"""Who may fill the slack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import NoSlack
from cluster.instance import InstanceLoad
from cluster.request import ServeRequest, Slo
from router.fleet import Fleet
from router.policy import Decision
from router.predictor import Prediction
from router.slack import BOUND_SHARE, MEMORY_S, MOST_HARM, MOST_QUEUE_S, PER_INSTANCE, ROOM_SHARE, Slack
from router.view import LastSeen
from tests.twins import FACTS, TwinCluster, info_of, until

GOOD = Prediction(
    queue_s=0.0, work_s=0.1, ttft_s=0.1, tpot_s=0.02, iteration_s=0.02, output_tokens=100,
    chance=1.0,
)  # fmt: skip
REQUEST = ServeRequest(request_id="r", prompt_token_ids=[1] * 1000, max_tokens=200, fills_slack=True)
PAIR = Decision(prefill="prefill-0", decode="decode-0", link="network", reason="")


def fleet_of(*names: str, load: InstanceLoad | None = None, by_deadline: bool = False) -> Fleet[LastSeen]:
    fleet: Fleet[LastSeen] = Fleet(by_deadline=by_deadline)
    for index, name in enumerate(names or ("prefill-0", "decode-0")):
        fleet.join(info_of(name, index), LastSeen(load or InstanceLoad()))
    return fleet


def require(slack: Slack, now_s: float = 0.0, **facts: Any) -> None:
    slack.require(REQUEST, replace(PAIR, predicted=replace(GOOD, **facts)), now_s)


def test_where_nobody_else_is_it_may_have_all() -> None:
    require(Slack(fleet_of()), ttft_s=30.0, tpot_s=0.5)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"harm": 1.01 * MOST_HARM}, "others would lose"),
        ({"queue_s": 1.01 * MOST_QUEUE_S}, "prompts are waiting"),
    ],
)
def test_it_takes_nothing_from_those_that_are_there(facts: dict[str, float], why: str) -> None:
    with pytest.raises(NoSlack, match=why) as caught:
        require(Slack(fleet_of()), **facts)
    assert (caught.value.http_status, caught.value.reason) == (429, "rejected-no-slack")


def test_it_leaves_room_for_the_tightest_of_late() -> None:
    slack = Slack(fleet_of())
    slack.came(Slo(tpot_s=0.04), 10.0)
    slack.came(Slo(ttft_s=1.0, tpot_s=0.2), 11.0)
    require(slack, 12.0, tpot_s=0.99 * BOUND_SHARE * 0.04)
    with pytest.raises(NoSlack, match="a token would take"):
        require(slack, 12.0, tpot_s=1.01 * BOUND_SHARE * 0.04)
    with pytest.raises(NoSlack, match="a token would take"):
        require(slack, 12.0 + MEMORY_S, tpot_s=0.03)
    require(slack, 12.0 + 2 * MEMORY_S, tpot_s=0.03)
    slack.came(Slo(tpot_s=0.04), 1e6)
    require(slack, 2e6, tpot_s=0.03)


def test_what_is_promised_counts_though_nobody_asks() -> None:
    slack = Slack(fleet_of(), 0.04)
    require(slack, 1e6, tpot_s=0.99 * BOUND_SHARE * 0.04, ttft_s=30.0)
    with pytest.raises(NoSlack, match="a token would take"):
        require(slack, 1e6, tpot_s=1.01 * BOUND_SHARE * 0.04)


def test_a_long_prompt_leaves_another_instance_free() -> None:
    """Unless it would give way."""
    late = {"ttft_s": 1.01 * BOUND_SHARE}
    for fleet in (fleet_of("prefill-0", "prefill-1", "decode-0"), fleet_of(by_deadline=True)):
        slack = Slack(fleet)
        slack.came(Slo(ttft_s=1.0), 0.0)
        require(slack, **late)
    busy = fleet_of("prefill-0", "prefill-1", "decode-0")
    other = busy.view_of("prefill-1")
    assert other is not None
    other.prompts.add("p", 1.0, 9.0, 0.0)
    for fleet in (busy, fleet_of()):
        slack = Slack(fleet)
        slack.came(Slo(ttft_s=1.0), 0.0)
        with pytest.raises(NoSlack, match="no other prefill instance is free"):
            require(slack, **late)


def test_it_leaves_memory_and_places_in_the_batch() -> None:
    fleet = fleet_of()
    decode = fleet.view_of("decode-0")
    assert decode is not None
    full = int(ROOM_SHARE * FACTS.kv_capacity_tokens) - 1000
    decode.decodes.add("d", full, 0, 1.0)
    with pytest.raises(NoSlack, match="KV cache of decode-0 is to have room"):
        require(Slack(fleet))
    decode.decodes.remove("d")
    holds = [fleet.reservations.hold("decode-0", 1) for _ in range(int(ROOM_SHARE * FACTS.max_num_seqs) + 1)]
    with pytest.raises(NoSlack, match="batch of decode-0 is to have room"):
        require(Slack(fleet))
    holds.pop().release()
    require(Slack(fleet))


def test_what_instances_say_of_other_routers_counts_while_it_is_news() -> None:
    for load, why in (
        (InstanceLoad(waiting=1), "requests wait on prefill-0"),
        (InstanceLoad(kv_usage=0.9), "KV cache of prefill-0 is 90% full"),
    ):
        fleet = fleet_of(load=load)
        require(Slack(fleet))
        with fleet.reservations.hold("prefill-0", 1), pytest.raises(NoSlack, match=why):
            require(Slack(fleet))


async def test_without_predictions_a_few_of_them_per_instance() -> None:
    cluster = TwinCluster("prefill-0", "decode-0", "decode-1")
    for twin in cluster.instances.values():
        twin.stalls_at = 1
    requests = [replace(REQUEST, request_id=f"r{n}") for n in range(PER_INSTANCE)]
    for request in requests:
        cluster.router.submit(request)
    with pytest.raises(NoSlack, match=f"{PER_INSTANCE} of its kind run already"):
        cluster.router.submit(replace(REQUEST, request_id="one-more"))
    cluster.router.submit(replace(REQUEST, request_id="other", fills_slack=False))
    cluster.router.abort([request.request_id for request in requests] + ["other"])
    await until(lambda: not cluster.router.pending)
    assert cluster.router.slack.running == 0
    cluster.assert_nothing_held()


def test_an_instance_that_has_just_gone_is_the_runs_to_find() -> None:
    Slack(fleet_of("prefill-0")).require(REQUEST, PAIR, 0.0)
