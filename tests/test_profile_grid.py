"""The grid of batches that a profile measures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.profiler.grid import Limits, batch_sizes, grid, steps


@given(
    max_prompt=st.integers(16, 20_000), max_requests=st.integers(1, 512), kv_tokens=st.integers(0, 1_000_000)
)
def test_every_point_is_within_the_limits_and_there_once(
    max_prompt: int, max_requests: int, kv_tokens: int
) -> None:
    points = grid(Limits(max_prompt=max_prompt, max_requests=max_requests, kv_tokens=kv_tokens))
    assert len(set(points)) == len(points)
    for point in points:
        assert 1 <= point.tokens <= max_prompt
        assert 0 <= point.beside <= max_prompt
        assert 1 <= point.requests <= max_requests
        if point.kind != "prefill":
            assert point.requests * point.tokens < kv_tokens


def test_the_extremes_are_measured() -> None:
    points = grid(Limits(max_prompt=3000, max_requests=48, kv_tokens=10**7))
    prefill = [point for point in points if point.kind == "prefill"]
    decode = [point for point in points if point.kind == "decode"]
    assert max(point.tokens for point in prefill) == 3000
    assert {1, 48} <= {point.requests for point in decode}
    assert max(point.tokens for point in decode) == 3000
    assert any(point.kind == "mixed" for point in points)


def test_steps_end_at_the_end() -> None:
    assert list(steps(1, 10, 2)) == [1, 2, 4, 8, 10]
    assert list(steps(4, 4, 2)) == [4]


def test_decoding_batches_are_measured_in_half_octaves() -> None:
    assert batch_sizes(32) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert batch_sizes(5) == [1, 2, 3, 4, 5]
    assert batch_sizes(1) == [1]


@pytest.mark.parametrize(("max_prompt", "max_requests"), [(15, 4), (100, 0)])
def test_limits_without_points_are_refused(max_prompt: int, max_requests: int) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        Limits(max_prompt=max_prompt, max_requests=max_requests, kv_tokens=1000)
