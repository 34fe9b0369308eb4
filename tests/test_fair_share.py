from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.fair_share import Flow, Link, Path, fair_shares


def flow_on(path: Path, order: int = 0) -> Flow:
    flow = Flow(flow_id=f"f{order}", path=path, size_bytes=1.0, begin_s=0.0, order=order)
    path.add(flow, 0.0)
    return flow


def settle_shares(links: tuple[Link, ...]) -> dict[Path, None]:
    chosen = fair_shares(links)
    for path in chosen:
        path.rate_bytes_per_s, path.dirty = path.share, False
    return chosen


def assert_fair(links: list[Link], paths: list[Path]) -> None:
    """1: no link is over its capacity. 2: every path with flows has a full link on which none is faster."""
    load = {link: sum(p.rate_bytes_per_s * p.flowing for p in link.paths) for link in links}
    for link in links:
        assert load[link] <= link.capacity_bytes_per_s * (1 + 1e-8)
    for path in paths:
        if path.flowing:
            assert any(
                load[link] >= link.capacity_bytes_per_s * (1 - 1e-8)
                and all(p.rate_bytes_per_s <= path.rate_bytes_per_s * (1 + 1e-8) for p in link.paths)
                for link in path.links
            )


@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=8),
    st.lists(st.integers(1, 4), min_size=1, max_size=14),
    st.lists(st.tuples(st.integers(0, 13), st.integers(0, 2), st.integers(0, 12)), max_size=40),
    st.randoms(use_true_random=False),
)
def test_rates_stay_max_min_fair_from_change_to_change(
    capacities: list[int], lengths: list[int], changes: list[tuple[int, int, int]], rng: random.Random
) -> None:
    links = [Link(c, c) for c in capacities]
    paths = [Path("", "", tuple(rng.sample(links, min(n, len(links))))) for n in lengths]
    for order, (which, kind, capacity) in enumerate(changes):
        path = paths[which % len(paths)]
        if kind == 0 and path.flowing:
            path.remove()
            settle_shares(path.links)
        elif kind == 1:
            link = path.links[0]
            link.resize(capacity)
            settle_shares((link,))
        else:
            flow_on(path, order)
            settle_shares(path.links)
        assert_fair(links, paths)


def test_a_change_is_felt_only_where_a_bottleneck_breaks() -> None:
    narrow, wide, far = Link(10, 10), Link(100, 100), Link(30, 30)
    a, b, c, d = (Path("", "", links) for links in ((narrow, wide), (wide, far), (far,), (far,)))
    for order, path in enumerate((a, b, c)):
        flow_on(path, order)
        settle_shares(path.links)
    assert [p.rate_bytes_per_s for p in (a, b, c)] == pytest.approx([10, 15, 15])
    flow_on(d, 3)
    assert a not in settle_shares(d.links)  # `wide` joins it to the others, but has room
    assert [p.rate_bytes_per_s for p in (a, b, c, d)] == pytest.approx([10, 10, 10, 10])


def test_a_change_is_felt_along_a_chain_of_bottlenecks() -> None:
    x, y, z = Link(10, 10), Link(30, 30), Link(60, 60)
    xy, yz, only_z = Path("", "", (x, y)), Path("", "", (y, z)), Path("", "", (z,))
    for order, path in enumerate((xy, yz, only_z)):
        flow_on(path, order)
        settle_shares(path.links)
    assert [p.rate_bytes_per_s for p in (xy, yz, only_z)] == pytest.approx([10, 20, 40])
    x.resize(4)
    settle_shares((x,))
    assert [p.rate_bytes_per_s for p in (xy, yz, only_z)] == pytest.approx([4, 26, 34])


def test_two_links_that_change_at_once_leave_nobody_behind() -> None:
    a, b, middle = Link(3, 3), Link(3, 3), Link(10, 10)
    by_a, by_b, alone = Path("", "", (a, middle)), Path("", "", (b, middle)), Path("", "", (middle,))
    for order, path in enumerate((by_a, by_b, alone)):
        flow_on(path, order)
        settle_shares(path.links)
    assert [p.rate_bytes_per_s for p in (by_a, by_b, alone)] == pytest.approx([3, 3, 4])
    a.resize(0)
    b.resize(20)
    settle_shares((a, b))
    assert [p.rate_bytes_per_s for p in (by_a, by_b, alone)] == pytest.approx([0, 5, 5])


def test_flows_of_a_path_count_each() -> None:
    link = Link(30, 30)
    one, two = Path("", "", (link,)), Path("", "", (link,))
    flow_on(one, 0)
    flow_on(two, 1)
    flow_on(two, 2)
    settle_shares((link,))
    assert (one.rate_bytes_per_s, two.rate_bytes_per_s) == pytest.approx((10, 10))
