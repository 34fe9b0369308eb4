"""Lines through what was seen."""

from __future__ import annotations

from random import Random

import pytest

from cluster.latency import Batch
from cluster.learned_latency import LearnedLatency, Line


def test_nothing_is_known_of_nothing() -> None:
    assert Line().seconds(100) == 0.0


def test_of_one_size_no_base_is_known() -> None:
    line = Line()
    for _ in range(5):
        line.learn(100, 1.0)
    assert line.seconds(100) == pytest.approx(1.0)
    assert line.seconds(300) == pytest.approx(3.0)


def test_it_finds_the_line_and_follows_a_change() -> None:
    rng, line = Random(1), Line()
    for base_s, slope_s in ((0.02, 1e-4), (0.05, 3e-4)):
        for _ in range(1500):
            count = rng.randrange(1, 2048)
            line.learn(count, (base_s + slope_s * count) * rng.uniform(0.95, 1.05))
        assert line.seconds(1000) == pytest.approx(base_s + slope_s * 1000, rel=0.05)
        assert line.seconds(10) == pytest.approx(base_s, rel=0.25)


def test_noise_gives_no_negative_times() -> None:
    line = Line()
    for count, seconds in [(1000, 0.1), (10, 0.2)] * 10:  # the more the less
        line.learn(count, seconds)
    assert line.seconds(2000) > line.seconds(1000) > line.seconds(1) > 0


def test_a_guess_is_left_for_what_is_seen() -> None:
    latency = LearnedLatency()
    one, many = Batch(100, 10_000, 1), Batch(0, 0, 0, 32, 32_000)
    assert latency.iteration_s(one) == pytest.approx(0.02)
    assert latency.iteration_s(many) == pytest.approx(0.0132)
    rng = Random(2)
    for _ in range(50):
        tokens, requests = rng.randrange(50, 1000), rng.randrange(1, 60)
        latency.prefilled(tokens, 0.1 + 0.001 * tokens)
        latency.decoded(requests, 0.05 + 0.002 * requests)
    assert latency.iteration_s(one) == pytest.approx(0.2, rel=0.1)
    assert latency.iteration_s(many) == pytest.approx(0.114, rel=0.1)
    assert latency.iteration_s(Batch(100, 10_000, 1, 32, 32_000)) == pytest.approx(0.314, rel=0.1)
