from __future__ import annotations

import math
import pickle
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import Placement
from kv_transfer.link_model import LinkCut, LinkModel
from kv_transfer.topology import LinkRates, Topology

# p0 p1 | p2 d0 | d1 d2: pairs within a node and between nodes, narrow and wide instances, PCIe or NVLink.
GPUS = {"p0": 1, "p1": 3, "p2": 2, "d0": 1, "d1": 2, "d2": 5}
NODES = {"p0": 0, "p1": 0, "p2": 1, "d0": 1, "d1": 2, "d2": 2}
PLACEMENTS = [Placement(instance_id=name, node=NODES[name], gpus=GPUS[name]) for name in GPUS]
RATES = [
    LinkRates(nic_bytes_per_s=4.0, nvlink_bytes_per_s=9.0),
    LinkRates(nic_bytes_per_s=4.0, pcie_bytes_per_s=5.0),
    LinkRates(nic_bytes_per_s=4.0, nvlink_bytes_per_s=9.0, node_nic_bytes_per_s=7.0),
]
TICK_S = 0.731  # no end of a whole number of bytes falls on a tick after its start's


def two_to_one(latency_s: float = 0.0) -> LinkModel:
    """a and b can send 10 bytes/s each, c can take 10, d can take 100; all on nodes of their own."""
    gpus = {"a": 1, "b": 1, "c": 1, "d": 10}
    placements = [Placement(instance_id=name, node=i, gpus=gpus[name]) for i, name in enumerate(gpus)]
    rates = LinkRates(nic_bytes_per_s=10.0, nvlink_bytes_per_s=1.0)
    return LinkModel(Topology(placements, rates), latency_s=latency_s)


def steps(model: LinkModel, until_s: float = math.inf) -> Iterator[float]:
    """Every time that the model asks to be called at, up to `until_s`."""
    while (due := model.next_end()) is not None and due[0] <= until_s:
        yield due[0]


def ends(model: LinkModel, until_s: float = math.inf) -> dict[str, float]:
    """Run until nothing is to come; the end of every flow."""
    return {flow_id: at_s for at_s in steps(model, until_s) for flow_id in model.advance(at_s)}


# Examples by hand


def test_a_flow_alone_has_its_narrowest_link_after_the_latency() -> None:
    model = two_to_one(latency_s=0.5)
    model.start("f", "a", "d", 30, 1.0)
    assert model.next_end() == (4.5, "f")
    assert model.advance(1.5) == []
    assert (model.rate_bytes_per_s("f"), model.left_bytes("f")) == (10, 30)
    assert model.advance(2.5) == []
    assert model.left_bytes("f") == 20
    assert model.advance(4.5) == ["f"]
    assert model.next_end() is None
    assert len(model) == 0


def test_nothing_flows_in_the_latency() -> None:
    model = two_to_one(latency_s=0.5)
    model.start("f", "a", "c", 10, 0.0)
    model.start("g", "b", "c", 10, 0.0)
    model.advance(0.25)
    assert [model.rate_bytes_per_s(x) for x in "fg"] == [0, 0]
    assert [model.left_bytes(x) for x in "fg"] == [10, 10]
    model.advance(0.5)
    assert [model.rate_bytes_per_s(x) for x in "fg"] == [5, 5]


def test_two_into_one_share_it_and_the_rest_is_the_others_when_one_ends() -> None:
    model = two_to_one()
    model.start("short", "a", "c", 10, 0.0)
    model.start("long", "b", "c", 30, 0.0)
    assert ends(model) == pytest.approx({"short": 2.0, "long": 4.0})


def test_a_flow_held_elsewhere_leaves_what_it_cannot_use() -> None:
    model = two_to_one()
    model.scale_link("a/nic-out", 0.2, 0.0)
    model.start("slow", "a", "c", 10, 0.0)
    model.start("fast", "b", "c", 10, 0.0)
    assert [model.rate_bytes_per_s(x) for x in ("slow", "fast")] == [2, 8]


def test_a_wide_target_does_not_make_its_senders_share() -> None:
    model = two_to_one()
    model.start("f", "a", "d", 10, 0.0)
    model.start("g", "b", "d", 10, 0.0)
    assert [model.rate_bytes_per_s(x) for x in "fg"] == [10, 10]


def test_flows_of_one_pair_share_it_and_end_by_size() -> None:
    model = two_to_one()
    for size in (40, 10, 20):
        model.start(f"f{size}", "a", "c", size, 0.0)
    assert ends(model) == pytest.approx({"f10": 3.0, "f20": 5.0, "f40": 7.0})


def test_no_bytes_take_the_latency_only_and_slow_nobody() -> None:
    model = two_to_one(latency_s=0.5)
    model.start("f", "a", "c", 10, 0.0)
    model.start("empty", "b", "c", 0, 0.25)
    assert ends(model) == {"empty": 0.75, "f": 1.5}
    now = two_to_one()
    now.start("empty", "a", "c", 0, 3.0)
    assert now.next_end() == (3.0, "empty")
    assert now.advance(3.0) == ["empty"]


def test_an_abort_gives_the_rest_to_the_others_and_is_not_reported() -> None:
    model = two_to_one()
    model.start("gone", "a", "c", 100, 0.0)
    model.start("stays", "b", "c", 20, 0.0)
    model.abort("gone", 2.0)
    assert model.rate_bytes_per_s("stays") == 10
    assert ends(model) == pytest.approx({"stays": 3.0})


def test_an_abort_in_the_latency_leaves_no_trace() -> None:
    model = two_to_one(latency_s=1.0)
    model.start("f", "a", "c", 10, 0.0)
    model.start("g", "a", "c", 10, 0.25)
    model.abort("f", 0.5)
    model.abort("g", 0.5)
    model.start("h", "a", "c", 10, 0.75)
    assert ends(model) == pytest.approx({"h": 2.75})


def test_a_flow_in_its_latency_takes_nothing_from_one_that_began() -> None:
    model = two_to_one(latency_s=1.0)
    model.start("f", "a", "c", 10, 0.0)
    model.start("g", "b", "c", 10, 0.25)
    model.abort("f", 0.5)
    model.start("h", "a", "c", 10, 0.75)
    assert ends(model) == pytest.approx({"g": 2.75, "h": 3.25})


def test_an_abort_of_the_one_that_would_end_first() -> None:
    model = two_to_one()
    model.start("short", "a", "c", 10, 0.0)
    model.start("long", "a", "c", 30, 0.0)
    model.abort("short", 1.0)
    assert ends(model) == pytest.approx({"long": 3.5})


def test_one_ends_as_another_begins() -> None:
    model = two_to_one(latency_s=1.0)
    model.start("f", "a", "c", 100, 0.0)
    model.start("g", "a", "c", 10, 0.0)
    model.start("h", "a", "c", 20, 2.0)
    assert ends(model) == pytest.approx({"g": 3.0, "h": 7.0, "f": 14.0})


def test_an_abort_at_the_very_end_wins() -> None:
    model = two_to_one()
    model.start("f", "a", "c", 10, 0.0)
    model.abort("f", 1.0)
    assert model.advance(1.0) == []


def test_an_end_during_another_call_is_kept_for_the_next_advance() -> None:
    model = two_to_one()
    model.start("f", "a", "c", 10, 0.0)
    model.start("g", "b", "d", 100, 5.0)
    assert len(model) == 1
    assert model.next_end() == (5.0, "f")
    assert model.advance(5.0) == ["f"]


def test_a_cut_fails_what_is_on_the_path_and_what_comes_until_it_is_restored() -> None:
    model = two_to_one(latency_s=0.5)
    model.start("f", "a", "c", 10, 0.0)
    model.start("other", "b", "c", 10, 0.0)
    model.start("waits", "a", "c", 10, 0.75)
    assert model.cut("a", "c", 1.0) == ["f", "waits"]
    assert model.rate_bytes_per_s("other") == 10
    with pytest.raises(LinkCut, match="from a to c is cut") as caught:
        model.start("late", "a", "c", 10, 1.0)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    model.start("back", "c", "a", 10, 1.0)  # the other direction is another path
    model.restore("a", "c")
    model.start("late", "a", "c", 10, 2.0)
    assert set(ends(model)) == {"other", "back", "late"}


def test_a_link_at_zero_holds_its_flows_until_it_is_back() -> None:
    model = two_to_one()
    model.start("f", "a", "c", 20, 0.0)
    model.start("g", "b", "d", 10, 0.0)
    model.scale_link("c/nic-in", 0.0, 1.0)
    assert ends(model) == {"g": 1.0}
    assert model.rate_bytes_per_s("f") == 0
    model.start("h", "b", "c", 10, 2.0)
    assert model.next_end() is None
    model.scale_link("c/nic-in", 1.0, 3.0)
    assert ends(model) == pytest.approx({"f": 5.0, "h": 5.0})


def test_a_faster_link_during_the_latency_counts_from_the_first_byte() -> None:
    model = two_to_one(latency_s=1.0)
    model.scale_link("a/nic-out", 0.1, 0.0)
    model.start("f", "a", "c", 10, 0.0)
    model.scale_link("a/nic-out", 0.5, 0.5)
    assert model.next_end() == (3.0, "f")


def test_what_cannot_be_is_refused() -> None:
    model = two_to_one()
    model.start("f", "a", "c", 10, 1.0)
    with pytest.raises(ValueError, match="'f' is under way already"):
        model.start("f", "b", "c", 10, 1.0)
    with pytest.raises(ValueError, match="size_bytes is -1"):
        model.start("g", "a", "c", -1, 1.0)
    with pytest.raises(ValueError, match="'x' is not placed"):
        model.start("g", "a", "x", 1, 1.0)
    with pytest.raises(ValueError, match="'g' is not under way"):
        model.abort("g", 1.0)
    with pytest.raises(ValueError, match="no link 'wire'"):
        model.scale_link("wire", 1.0, 1.0)
    with pytest.raises(ValueError, match=r"factor is -0\.5"):
        model.scale_link("a/nic-out", -0.5, 1.0)
    with pytest.raises(ValueError, match="only goes forward"):
        model.advance(0.5)
    with pytest.raises(ValueError, match="latency_s is -1"):
        two_to_one(latency_s=-1)
    assert ends(model) == {"f": 2.0}


# An oracle: every flow by itself, the whole graph at every event, exact fractions.


@dataclass
class OracleFlow:
    links: tuple[str, ...]
    begin_s: Fraction
    left_bytes: Fraction
    pair: tuple[str, str]


@dataclass
class Oracle:
    topology: Topology
    latency_s: Fraction
    now_s: Fraction = Fraction(0)
    flows: dict[str, OracleFlow] = field(default_factory=dict)
    capacities: dict[str, Fraction] = field(default_factory=dict)
    ends: dict[str, Fraction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.capacities = {name: Fraction(rate) for name, rate in self.topology.links.items()}

    def start(self, flow_id: str, source: str, target: str, size_bytes: int) -> None:
        links = self.topology.path(source, target)
        begin_s = self.now_s + self.latency_s
        self.flows[flow_id] = OracleFlow(links, begin_s, Fraction(size_bytes), (source, target))

    def rates(self) -> dict[str, Fraction]:
        """All flows rise at one speed; those on a link that fills up stay where they are."""
        rising = {i for i, f in self.flows.items() if f.begin_s <= self.now_s and f.left_bytes}
        rates = dict.fromkeys(self.flows, Fraction(0))
        while rising:
            steps = []
            for link, capacity in self.capacities.items():
                on_it = [i for i, f in self.flows.items() if link in f.links]
                if moving := [i for i in on_it if i in rising]:
                    steps.append(((capacity - sum(rates[i] for i in on_it)) / len(moving), moving))
            rise = min(step for step, _ in steps)
            for i in rising:
                rates[i] += rise
            rising -= {i for step, moving in steps if step == rise for i in moving}
        return rates

    def run_to(self, now_s: Fraction) -> None:
        while True:
            rates = self.rates()
            due = [f.begin_s for f in self.flows.values() if f.begin_s > self.now_s]
            due += [self.now_s + f.left_bytes / rates[i] for i, f in self.flows.items() if rates[i]]
            step_to = min([*due, now_s])
            for i, f in self.flows.items():
                f.left_bytes -= rates[i] * (step_to - self.now_s)
            self.now_s = step_to
            for i in [i for i, f in self.flows.items() if not f.left_bytes and f.begin_s <= step_to]:
                self.ends[i] = step_to
                del self.flows[i]
            if step_to == now_s:
                return


pairs = st.tuples(st.sampled_from(list(GPUS)), st.sampled_from(list(GPUS))).filter(lambda p: p[0] != p[1])
starts = st.tuples(st.just("start"), pairs, st.integers(0, 60))
changes = st.one_of(
    starts,
    starts,
    st.tuples(st.just("abort"), pairs, st.integers(0, 99)),
    st.tuples(st.just("cut"), pairs, st.just(0)),
    st.tuples(st.just("scale"), pairs, st.integers(0, 3)),
    st.tuples(st.just("wait"), pairs, st.integers(1, 5)),
)
networks = st.builds(Topology, st.just(PLACEMENTS), st.sampled_from(RATES))
latencies = st.sampled_from([0.0, 0.25, 1.5])


def assert_fair(model: LinkModel, oracle: Oracle) -> None:
    """1: no link is over its capacity. 2: every flow under way has a full link on which none is faster."""
    rates = {i: model.rate_bytes_per_s(i) for i in oracle.flows}
    moving = [i for i, f in oracle.flows.items() if f.begin_s <= oracle.now_s]
    on_it = {link: [i for i in moving if link in oracle.flows[i].links] for link in oracle.capacities}
    load = {link: sum(rates[i] for i in on_it[link]) for link in on_it}
    for link, capacity in oracle.capacities.items():
        assert load[link] <= float(capacity) * (1 + 1e-8)
    for i in moving:
        assert any(
            load[link] >= float(oracle.capacities[link]) * (1 - 1e-8)
            and all(rates[other] <= rates[i] * (1 + 1e-8) for other in on_it[link])
            for link in oracle.flows[i].links
        )


def assert_agree(model: LinkModel, oracle: Oracle, seen: dict[str, float]) -> None:
    assert seen == pytest.approx({i: float(at_s) for i, at_s in oracle.ends.items()}, rel=1e-9)
    assert len(model) == len(oracle.flows)
    rates = oracle.rates()
    for i, f in oracle.flows.items():
        assert model.rate_bytes_per_s(i) == pytest.approx(float(rates[i]), rel=1e-9)
        assert model.left_bytes(i) == pytest.approx(float(f.left_bytes), rel=1e-9, abs=1e-6)


@given(networks, latencies, st.lists(changes, min_size=1, max_size=25))
def test_it_does_what_the_oracle_does(
    topology: Topology, latency_s: float, script: list[tuple[str, tuple[str, str], int]]
) -> None:
    model, oracle = LinkModel(topology, latency_s=latency_s), Oracle(topology, Fraction(latency_s))
    seen: dict[str, float] = {}
    ticks = 0
    for number, (what, (source, target), amount) in enumerate(script):
        now_s = ticks * TICK_S
        if what == "start":
            model.start(f"f{number}", source, target, amount, now_s)
            oracle.start(f"f{number}", source, target, amount)
        elif what == "abort" and oracle.flows:
            flow_id = list(oracle.flows)[amount % len(oracle.flows)]
            model.abort(flow_id, now_s)
            del oracle.flows[flow_id]
        elif what == "cut":
            gone = [i for i, f in oracle.flows.items() if f.pair == (source, target)]
            assert model.cut(source, target, now_s) == gone
            model.restore(source, target)
            for flow_id in gone:
                del oracle.flows[flow_id]
        elif what == "scale":
            link = topology.path(source, target)[0]
            model.scale_link(link, amount / 2, now_s)
            oracle.capacities[link] = Fraction(topology.links[link]) * amount / 2
        ticks += amount if what == "wait" else 0
        seen |= ends(model, ticks * TICK_S)
        model.advance(ticks * TICK_S)
        oracle.run_to(Fraction(ticks * TICK_S))
        assert_agree(model, oracle, seen)
        assert_fair(model, oracle)


# Properties of a batch of flows

batches = st.lists(st.tuples(pairs, st.integers(0, 60), st.integers(0, 6)), min_size=1, max_size=20)
Batch = list[tuple[tuple[str, str], int, int]]


def started(topology: Topology, latency_s: float, batch: Iterable[tuple[int, tuple[str, str], int, int]]):
    """Start each flow at its tick, in the order given; the model and the ends until the last start."""
    model = LinkModel(topology, latency_s=latency_s)
    seen: dict[str, float] = {}
    for number, (source, target), size, tick in batch:
        seen |= ends(model, tick * TICK_S)
        model.start(f"f{number}", source, target, size, tick * TICK_S)
    return model, seen


def in_time_order(batch: Batch) -> list[tuple[int, tuple[str, str], int, int]]:
    numbered = [(number, *flow) for number, flow in enumerate(batch)]
    return sorted(numbered, key=lambda flow: flow[3])


@given(networks, latencies, batches)
def test_every_flow_ends_and_none_before_it_could(topology: Topology, latency_s: float, batch: Batch) -> None:
    model, seen = started(topology, latency_s, in_time_order(batch))
    seen |= ends(model)
    assert len(seen) == len(batch)
    assert len(model) == 0
    for number, ((source, target), size, tick) in enumerate(batch):
        alone_s = latency_s + size / topology.path_bytes_per_s(source, target)
        assert seen[f"f{number}"] >= (tick * TICK_S + alone_s) * (1 - 1e-12)


@given(networks, latencies, batches)
def test_what_is_moved_is_what_was_to_be_moved(topology: Topology, latency_s: float, batch: Batch) -> None:
    model, moved = LinkModel(topology, latency_s=latency_s), dict.fromkeys(range(len(batch)), 0.0)
    for number, ((source, target), size, _) in enumerate(batch):
        model.start(f"f{number}", source, target, size, 0.0)
    seen, before_s = set(model.advance(latency_s)), latency_s
    for at_s in steps(model):
        for number in moved:
            if f"f{number}" not in seen:
                moved[number] += model.rate_bytes_per_s(f"f{number}") * (at_s - before_s)
        seen.update(model.advance(at_s))
        before_s = at_s
    assert [moved[n] for n in range(len(batch))] == pytest.approx([size for _, size, _ in batch], rel=1e-9)


@given(networks, latencies, batches, st.randoms(use_true_random=False))
def test_the_order_of_equal_starts_does_not_matter(
    topology: Topology, latency_s: float, batch: Batch, rng: random.Random
) -> None:
    model, seen = started(topology, latency_s, in_time_order(batch))
    seen |= ends(model)
    shuffled = in_time_order(batch)
    rng.shuffle(shuffled)
    shuffled.sort(key=lambda flow: flow[3])
    other, seen_other = started(topology, latency_s, shuffled)
    seen_other |= ends(other)
    assert seen_other == pytest.approx(seen, rel=1e-9)


@given(networks, latencies, batches)
def test_equal_calls_give_equal_bits_and_one_long_step_the_order_of_many(
    topology: Topology, latency_s: float, batch: Batch
) -> None:
    model, seen = started(topology, latency_s, in_time_order(batch))
    again, seen_again = started(topology, latency_s, in_time_order(batch))
    at_once, first = started(topology, latency_s, in_time_order(batch))
    many = list((seen | ends(model)).items())
    assert many == list((seen_again | ends(again)).items())
    assert [*first, *at_once.advance(1e6)] == [flow_id for flow_id, _ in many]


@given(networks, latencies, batches)
def test_two_of_the_same_size_on_one_path_end_together(
    topology: Topology, latency_s: float, batch: Batch
) -> None:
    model, seen = started(topology, latency_s, in_time_order(batch))
    now_s = 6 * TICK_S
    for twin in ("x", "y"):
        model.start(twin, "p0", "d2", 17, now_s)
    seen |= ends(model)
    assert seen["x"] == pytest.approx(seen["y"], rel=1e-12)


def test_events_that_no_longer_hold_are_not_hoarded() -> None:
    model = two_to_one()
    model.start("long", "a", "c", 1e9, 0.0)
    for number in range(2000):
        model.start(f"f{number}", "b", "c", 1, number * 1.0)
        model.advance(number + 0.5)
    assert len(model._events) < 200
