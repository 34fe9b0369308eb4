"""What candidates there are, and what they could do at most."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.instance import Role
from cluster.request import Slo
from deploy.planner.capacity import Capacity, neighbours, splits, unsplits
from deploy.planner.deployment import Deployment, Layout
from deploy.planner.fleet import Fleet
from deploy.planner.goal import Infeasible
from deploy.planner.trial import spec_of
from tests.plans import goal_of
from tests.test_latency import make_profile


def test_layouts_hold_the_weights_and_a_request() -> None:
    assert Capacity(goal_of(model="llama-3-70b", gpus=8)).layouts() == (Layout(2), Layout(4), Layout(8))
    assert Layout(1) in Capacity(goal_of()).layouts()
    # A request of 64k tokens of KV does not fit beside half of the weights.
    long = goal_of(model="llama-3-70b", gpus=8, max_model_len=65_536)
    assert Capacity(long).layouts() == (Layout(4), Layout(8))


def test_pipeline_stages_only_where_they_are_asked_for() -> None:
    goal = goal_of(model="opt-66b", gpus=4)
    assert all(layout.pipeline == 1 for layout in Capacity(goal).layouts())
    staged = Capacity(replace(goal, pipeline=True)).layouts()
    assert Layout(1, 4) in staged
    assert Layout(2, 2) in staged


def test_a_model_that_no_node_holds_is_told_with_its_size() -> None:
    with pytest.raises(Infeasible, match=r"671 GB of weights.*8 h100-80gb on one node has 629 GB"):
        Capacity(goal_of(model="deepseek-v3", gpus=8)).layouts()
    assert Layout(8) in Capacity(goal_of(model="deepseek-v3", gpus=8, gpu="h200")).layouts()


def test_groups_that_share_experts_hold_what_no_node_does() -> None:
    layouts = Capacity(goal_of(model="deepseek-v3", gpus=256)).layouts()
    assert Layout(1, data=16) in layouts
    assert all(layout.data > 1 and 16 <= layout.gpus <= 32 for layout in layouts)
    assert all(layout.data == 1 for layout in Capacity(goal_of(model="llama-3-8b", gpus=8)).layouts())


def test_a_group_of_latent_attention_decodes_more_than_its_ranks_in_one_instance() -> None:
    """Tensor parallel ranks each have all of its KV, those of a group only their own requests'."""
    capacity = Capacity(goal_of(model="deepseek-v3", gpus=8, gpu="h200"))
    assert capacity.decode_rps(Layout(1, data=8)) > 2 * capacity.decode_rps(Layout(8))
    assert 8 * capacity.kv_tokens(Layout(1, data=8)) > 4 * capacity.kv_tokens(Layout(8))


def test_groups_that_are_surely_worse_are_not_tried() -> None:
    capacity = Capacity(goal_of(model="deepseek-v3", gpus=64, gpu="h200", slo=Slo(ttft_s=2.0, tpot_s=0.05)))
    layouts = capacity.layouts()
    left = capacity.for_decode(layouts)
    assert Layout(8) in left
    assert Layout(1, data=8) in left
    assert len(left) <= len(layouts) / 2
    tight = Capacity(goal_of(model="deepseek-v3", gpus=64, gpu="h200", slo=Slo(ttft_s=0.3, tpot_s=0.05)))
    assert set(capacity.for_prefill(layouts)) < set(tight.for_prefill(layouts))


def test_bounds_below_the_floor_of_the_hardware_are_told_with_the_floor() -> None:
    goal = goal_of(slo=Slo(ttft_s=0.001, tpot_s=0.05))
    capacity = Capacity(goal)
    with pytest.raises(Infeasible, match=r"0.0% of the requests could.*up to \d+ ms, and a token \d+\.\d ms"):
        capacity.require_possible(capacity.layouts())
    easy = Capacity(goal_of())
    easy.require_possible(easy.layouts())


def test_more_ranks_do_more_and_less_each() -> None:
    capacity = Capacity(goal_of(model="llama-3-70b", gpus=8))
    for rps in (capacity.prefill_rps, capacity.decode_rps):
        assert rps(Layout(4)) < rps(Layout(8)) < 2 * rps(Layout(4)) or rps == capacity.decode_rps
    # Tighter tokens, smaller batches.
    tight = Capacity(goal_of(model="llama-3-70b", gpus=8, slo=Slo(ttft_s=1.0, tpot_s=0.02)))
    assert tight.decode_rps(Layout(8)) < capacity.decode_rps(Layout(8))


def test_of_each_pair_of_layouts_no_ratio_could_do_more() -> None:
    """By what each pool does at its own work, or with decode instances that compute prompts too."""
    capacity = Capacity(goal_of(gpus=8))
    pairs: dict[tuple[Layout | None, Layout], list[Deployment]] = {}
    for one in splits(capacity, capacity.layouts(), Fleet({"": 8})):
        assert one.gpus <= 8
        pairs.setdefault((one.prefill, one.decode), []).append(one)
    assert any(len(ratios) == 2 for ratios in pairs.values())
    for ratios in pairs.values():
        for could in (capacity.rps, capacity.most_rps):
            others = (other for one in ratios for other in neighbours(capacity, one, Fleet({"": 8})))
            assert max(map(could, ratios)) >= max(map(could, others), default=0.0)


def test_decode_instances_that_have_time_compute_prompts_too() -> None:
    """Answers of 8 tokens leave nearly all of it: then a pair does what two prefill instances do."""
    capacity = Capacity(goal_of(gpus=2))
    (pair,) = splits(capacity, (Layout(1),), Fleet({"": 2}))
    prompts = capacity.prefill_rps(Layout(1))
    assert capacity.rps(pair) == pytest.approx(prompts)
    assert 1.9 * prompts < capacity.most_rps(pair) < 2 * prompts
    # Where the answers are long, they are all that decode instances do.
    answers = Capacity(goal_of(gpus=2, workload="fixed:rate=8,count=40,input=20,output=2000"))
    (pair,) = splits(answers, (Layout(1),), Fleet({"": 2}))
    assert answers.most_rps(pair) == answers.rps(pair) == answers.decode_rps(Layout(1))


def test_unsplit_candidates_need_room_for_one_instance() -> None:
    capacity = Capacity(goal_of(gpus=4))
    assert [one.gpus for one in unsplits(capacity, (Layout(2), Layout(8)), Fleet({"": 4}))] == [4]


def test_what_computes_longest_prompts_waits_for_nobody() -> None:
    """An unsplit instance does both, so it does less of each than a pool's."""
    capacity = Capacity(goal_of(gpus=2))
    unsplit = Deployment(prefill=None, prefill_count=0, decode=Layout(1), decode_count=1)
    assert capacity.rps(unsplit) < min(capacity.prefill_rps(Layout(1)), capacity.decode_rps(Layout(1)))


def test_profiles_are_the_layouts_that_there_are(tmp_path: Path) -> None:
    files = {layout: str(tmp_path / f"{layout}.json") for layout in (Layout(1), Layout(4))}
    for layout, file in files.items():
        profile = make_profile().model_copy(update={"tensor_parallel_size": layout.tensor})
        Path(file).write_text(profile.model_dump_json())
    goal = replace(goal_of(gpus=8, workload="fixed:rate=2,count=10,input=100,output=10"), profiles=files)
    capacity = Capacity(goal)
    assert capacity.layouts() == (Layout(1), Layout(4))
    assert Capacity(replace(goal, gpus=3)).layouts() == (Layout(1),)
    # Equal times in both files, whatever the hardware could do.
    assert capacity.prefill_rps(Layout(1)) == pytest.approx(capacity.prefill_rps(Layout(4)))
    both = Deployment(prefill=Layout(4), prefill_count=1, decode=Layout(1), decode_count=2)
    assert spec_of(goal, both).sim.profile == {Role.PREFILL: files[Layout(4)], Role.DECODE: files[Layout(1)]}
    one = Deployment(prefill=None, prefill_count=0, decode=Layout(4), decode_count=2)
    assert spec_of(goal, one).sim.profile == files[Layout(4)]


def test_a_busy_network_puts_both_pools_on_each_node() -> None:
    """KV of 3,000 tokens is 393 MB: on 2 Gbit/s and GPU that is a second and a half."""
    chat = "gamma:rate=8,count=400,cv=1,input=3000,output=200"
    slow = Capacity(goal_of(gpus=16, workload=chat, node_gbps=2.0))
    fast = Capacity(goal_of(gpus=16, workload=chat))
    layouts = (Layout(1), Layout(2))
    assert all(one.colocated for one in splits(slow, layouts, Fleet({"": 16})) if one.gpus > 8)
    assert not any(one.colocated for one in splits(fast, layouts, Fleet({"": 16})))
    best = splits(slow, layouts, Fleet({"": 16}))[0]
    assert slow.network_share(best) > 1 > fast.network_share(best)
    assert replace(best, colocated=False) in neighbours(slow, best, Fleet({"": 16}))
    apart = splits(fast, layouts, Fleet({"": 16}))[0]
    assert replace(apart, colocated=True) in neighbours(fast, apart, Fleet({"": 16}))
    assert str(best) == f"{replace(best, colocated=False)}, colocated"
    assert spec_of(goal_of(gpus=16), best).colocate == 8


def test_what_is_on_one_node_or_does_not_fit_is_not_colocated() -> None:
    capacity = Capacity(goal_of(gpus=16, node_gbps=2.0))

    def pools(prefills: int, prefill: int, decodes: int, decode: int) -> Deployment:
        return Deployment(
            prefill=Layout(prefill), prefill_count=prefills, decode=Layout(decode), decode_count=decodes
        )

    assert not capacity.can_colocate(pools(4, 1, 4, 1))
    assert capacity.can_colocate(pools(8, 1, 2, 4))
    # A node each, and nobody beside it.
    assert not capacity.can_colocate(pools(1, 8, 2, 4))
    unsplit = Deployment(prefill=None, prefill_count=0, decode=Layout(4), decode_count=4)
    assert not capacity.can_colocate(unsplit)
