"""Estimators over the arrival times of streamed tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.latency import Batch, DecodeCost, PrefillCost
from deploy.profiler.grid import Point
from deploy.profiler.streams import (
    PointStreams,
    Stream,
    burst_s,
    decode_segments,
    handover,
    handover_beside,
    handover_each,
    split_fixed_part,
)


def stream(
    first_s: float, every_s: float, tokens: int, *, sent_s: float = 0.0, prompt_tokens: int = 100
) -> Stream:
    times = [first_s + every_s * n for n in range(tokens)]
    return Stream(prompt_tokens=prompt_tokens, sent_s=sent_s, times_s=tuple(times))


def prompt(sent_s: float, first_s: float) -> Stream:
    return Stream(prompt_tokens=10, sent_s=sent_s, times_s=(first_s,), decodes=False)


def test_a_burst_lasts_until_its_last_first_token() -> None:
    assert burst_s([prompt(1.0, 1.5), prompt(1.01, 1.7), prompt(1.02, 1.6)]) == pytest.approx(0.7)


def test_a_lone_stream_is_one_segment() -> None:
    (segment,) = decode_segments([stream(1.0, 0.01, 42)])
    assert segment.seconds == pytest.approx(0.01)
    # From the second token on, which is 1 token of answer in the cache, over 40 iterations.
    assert segment.batch == Batch(decode_requests=1, decode_context_tokens=100 + 2 + 20)
    assert not segment.beside


def test_streams_that_join_and_leave_make_segments() -> None:
    """Iterations take 10 ms alone and 20 ms for two."""
    alone = [1.0 + 0.01 * n for n in range(21)]
    shared = [alone[-1] + 0.02 * (n + 1) for n in range(20)]
    last = [shared[-1] + 0.01 * (n + 1) for n in range(20)]
    long = Stream(prompt_tokens=50, sent_s=0.0, times_s=(*alone, *shared, *last))
    short = Stream(prompt_tokens=80, sent_s=0.5, times_s=(alone[-2], alone[-1], *shared))
    first, both, rest = decode_segments([long, short])
    assert [s.batch.decode_requests for s in (first, both, rest)] == [1, 2, 1]
    assert [s.seconds for s in (first, both, rest)] == pytest.approx([0.01, 0.02, 0.01])
    assert both.batch.decode_context_tokens == 50 + 21 + 10 + 80 + 2 + 10


def test_tokens_that_come_together_count_each() -> None:
    times = tuple(1.0 + 0.02 * (n // 2) for n in range(62))
    (segment,) = decode_segments([Stream(prompt_tokens=1, sent_s=0.0, times_s=times)])
    assert segment.seconds == pytest.approx(0.01, rel=0.05)


def test_a_segment_of_few_iterations_is_left_out() -> None:
    assert decode_segments([stream(1.0, 0.01, 8)]) == []
    assert decode_segments([stream(1.0, 0.01, 2), prompt(0.0, 1.0)]) == []


@pytest.mark.parametrize(
    ("others", "beside"),
    [
        ([], 0.0),
        ([prompt(1.0, 1.11)], 0.25),
        ([prompt(0.0, 1.31)], 0.75),
        ([prompt(0.5, 2.0)], 1.0),
        ([prompt(1.0, 1.15), prompt(1.15, 1.31)], 0.75),
        # One that covers another is not counted twice.
        ([prompt(1.0, 1.11), prompt(1.05, 1.11)], 0.25),
    ],
)
def test_how_much_of_the_time_prompts_were_under_way(others: list[Stream], beside: float) -> None:
    (segment,) = decode_segments([stream(1.0, 0.01, 42), *others])
    assert segment.beside == pytest.approx(beside)


def test_the_fixed_part_beyond_an_iteration_is_the_front_ends() -> None:
    decode = (
        DecodeCost(up_to_requests=8, base_s=0.002, request_s=0.001),
        DecodeCost(base_s=0.5, request_s=0.001),
    )
    costs, frontend_s = split_fixed_part((PrefillCost(base_s=0.010, token_s=1e-5),), decode)
    assert frontend_s == pytest.approx(0.007)
    assert costs[0].base_s == pytest.approx(0.003)
    assert costs[0].token_s == 1e-5


def test_a_front_end_never_costs_less_than_nothing() -> None:
    small = PrefillCost(up_to_tokens=100, base_s=0.010, token_s=1e-5)
    large = PrefillCost(base_s=0.001, token_s=1e-5)
    costs, frontend_s = split_fixed_part((small, large), (DecodeCost(base_s=0.003),))
    assert frontend_s == 0.0
    assert costs == (small, large)


def test_handover_has_a_fixed_part_and_one_per_token() -> None:
    noise_s = (-3e-3, -1e-3, 0.0, 4e-3, 0.05)  # more than a hand-over takes, and a disturbance
    gaps = [(n, 0.01 + 0.004 + n * 2e-6 + noise) for n in (16, 128, 1024) for noise in noise_s]
    fixed_s, token_s = handover(gaps, lambda tokens: 0.01)
    assert fixed_s == pytest.approx(0.004, rel=0.01)
    assert token_s == pytest.approx(2e-6, rel=0.01)


def test_a_handover_beside_is_what_iterations_do_not_explain() -> None:
    decodes = [stream(0.0, 0.02, 100), stream(0.0, 0.02, 100)]
    handed_over = [
        Stream(prompt_tokens=64, sent_s=0.1, times_s=(0.3, 0.3 + gap_s), decodes=False)
        for gap_s in (0.07, 0.08, 0.09, 0.9)  # the last was disturbed
    ]
    point = Point("mixed", 2, 128, 64)
    visits = [PointStreams(point=point, streams=(*decodes, *handed_over))]
    assert handover_beside(visits) == pytest.approx(0.08 - 2.5 * 0.02)
    quick = [replace(s, times_s=(0.3, 0.34)) for s in handed_over]
    assert handover_beside([PointStreams(point=point, streams=(*decodes, *quick))]) == 0.0
    assert handover_beside([PointStreams(point=point, streams=tuple(decodes))]) == 0.0


def test_hand_overs_at_one_time_are_told_apart_by_those_that_decode_together() -> None:
    def visit(joined: int, late: int) -> PointStreams:
        """Prompts of one iteration: some decode at once, 3 ms for each after the first, the others later."""
        gap_s = 0.02 + 0.01 + 0.003 * (joined - 1)
        streams = [
            Stream(prompt_tokens=64, sent_s=0.0, times_s=(1.0, 1.0 + gap, 1.05 + gap))
            for gap in [gap_s] * joined + [gap_s + 0.04] * late
        ]
        return PointStreams(point=Point("decode", joined + late, 64), streams=tuple(streams))

    visits = [visit(joined, late) for joined, late in ((2, 0), (3, 2), (6, 1), (1, 5))]
    assert handover_each(visits, lambda tokens: 0.01, lambda requests, context: 0.02) == pytest.approx(0.003)
    assert handover_each(visits, lambda tokens: 0.05, lambda requests, context: 0.02) == 0.0
    assert handover_each([visit(1, 3)], lambda tokens: 0.01, lambda requests, context: 0.02) == 0.0


def test_no_handover_where_the_second_token_comes_as_any_other() -> None:
    assert handover([(16, 0.0099), (128, 0.0098)], lambda tokens: 0.01) == (0.0, 0.0)
    assert handover([], lambda tokens: 0.01) == (0.0, 0.0)
