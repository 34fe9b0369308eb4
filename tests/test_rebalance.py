"""Which request shall go on elsewhere."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.instance import InstanceLoad, Role
from cluster.latency import Batch
from router.predictor import Predictor
from router.rebalance import EVERY_S, LEAST_GAIN, Progress, best_move, iteration_s, overloaded
from router.view import ClusterView, InstanceView, LastSeen
from tests.twins import FACTS, info_of

BOUND_S = 0.05


class PerRequest:
    """Every request of the batch takes 5 ms of an iteration."""

    region = None

    def iteration_s(self, batch: Batch) -> float:
        return 0.005 * batch.decode_requests


PREDICTOR = Predictor({role: PerRequest() for role in Role})


def instance(index: int, requests: int, usage: float = 0.5, bound_s: float = BOUND_S) -> InstanceView:
    view = InstanceView(
        info=dataclasses.replace(
            info_of(f"decode-{index}", index), facts=dataclasses.replace(FACTS, kv_capacity_tokens=10_000)
        ),
        link=LastSeen(InstanceLoad(running=requests, waiting=0, kv_usage=usage)),
    )
    for number in range(requests):
        view.decodes.add(f"{index}/{number}", 100, 200, bound_s)
    return view


def view_of(*decodes: InstanceView) -> ClusterView:
    return ClusterView(prefill=(), decode=decodes)


def progress(view: InstanceView, spent_s: float = 0.0, tokens: int = 0) -> list[Progress]:
    """Of its requests, at their beginning."""
    return [
        Progress(
            request_id=name, context_tokens=150, tpot_bound_s=request.tpot_s, spent_s=spent_s,
            tokens=tokens, left=200,
        )
        for name, request in view.decodes._requests.items()
    ]  # fmt: skip


def test_a_cluster_that_keeps_its_bounds_is_left_alone() -> None:
    assert overloaded(view_of(instance(0, 9), instance(1, 2)), PREDICTOR) == []
    assert overloaded(view_of(instance(0, 30)), PREDICTOR) == [], "there is nowhere to go"


def test_from_one_that_misses_to_one_that_would_not() -> None:
    slow, fast, full = instance(0, 12), instance(1, 3), instance(2, 9)
    view = view_of(slow, fast, full)
    assert overloaded(view, PREDICTOR) == [slow]
    move = best_move(slow, progress(slow), view, PREDICTOR)
    assert move is not None
    assert (move.source, move.target, move.cause) == ("decode-0", "decode-1", "tpot")
    assert overloaded(view, PREDICTOR, for_tpot=False) == []


def test_not_where_it_would_help_nobody() -> None:
    slow = instance(0, 12)
    # All others would miss as well.
    assert best_move(slow, progress(slow), view_of(slow, instance(1, 10)), PREDICTOR) is None
    # Bounds that can't be kept any more, and bounds that are kept whatever comes.
    lost = progress(slow, spent_s=100.0, tokens=100)
    assert best_move(slow, lost, view_of(slow, instance(1, 0)), PREDICTOR) is None
    safe = progress(slow, spent_s=1.0, tokens=5000)
    assert best_move(slow, safe, view_of(slow, instance(1, 0)), PREDICTOR) is None


def test_not_to_one_without_room_or_with_a_move_under_way() -> None:
    slow, free = instance(0, 12), instance(1, 0)
    free.decodes.add("large", 9_000, 500, 1.0)
    assert best_move(slow, progress(slow), view_of(slow, free), PREDICTOR) is None
    free = instance(1, 2)
    assert best_move(slow, progress(slow), view_of(slow, free), PREDICTOR) is not None
    assert best_move(slow, progress(slow), view_of(slow, free), PREDICTOR, busy=["decode-1"]) is None


def test_out_of_memory_the_one_goes_that_still_takes_most() -> None:
    full, free = instance(0, 4, usage=0.97), instance(1, 4)
    view = view_of(full, free)
    assert overloaded(view, PREDICTOR, for_tpot=False) == [full]
    running = progress(full)
    running[2] = dataclasses.replace(running[2], left=900)
    move = best_move(full, running, view, PREDICTOR)
    assert move is not None
    assert (move.request_id, move.target, move.cause) == ("0/2", "decode-1", "memory")
    assert best_move(full, running, view_of(full, instance(1, 4, usage=0.85)), PREDICTOR) is None


def test_what_it_will_be_at_its_end() -> None:
    one = Progress(
        request_id="r", context_tokens=1, tpot_bound_s=1.0, spent_s=2.0, tokens=100, left=100
    )  # fmt: skip
    assert one.tpot_s(0.04) == (2.0 + 4.0) / 200


@settings(max_examples=100)
@given(st.lists(st.integers(0, 20), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_instances_changes_nothing(counts: list[int], random: object) -> None:
    decodes = [instance(index, count) for index, count in enumerate(counts)]
    shuffled = list(decodes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for source in overloaded(view_of(*decodes), PREDICTOR):
        running = progress(source)
        move = best_move(source, running, view_of(*decodes), PREDICTOR)
        assert move == best_move(source, running, view_of(*shuffled), PREDICTOR)
        if move is None:
            continue
        # It goes to one that is faster even with it: nobody sends it back.
        target = next(one for one in decodes if one.instance_id == move.target)
        assert PREDICTOR.iteration_s(target, 1, 150) < iteration_s(source, PREDICTOR)


def test_its_constants_make_sense() -> None:
    assert 0 < LEAST_GAIN <= 1
    assert EVERY_S > 0
