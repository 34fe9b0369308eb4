"""Quantiles of answer lengths."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.output_lengths import LEAST, PRIOR_TOKENS, WINDOW, OutputLengths


def lengths_of(**classes: list[int]) -> OutputLengths:
    found = OutputLengths()
    for name, lengths in classes.items():
        for tokens in lengths:
            found.add(name, tokens)
    return found


def test_before_anything_has_ended_there_is_a_prior() -> None:
    nothing = OutputLengths()
    assert nothing.quantile("chat", 0.5, limit=10_000) == PRIOR_TOKENS
    assert nothing.quantile("chat", 0.5, limit=10) == 10
    assert nothing.quantile("chat", 0.5, limit=10_000, generated=1000) == 2000


def test_quantiles_are_those_of_the_class() -> None:
    found = lengths_of(chat=list(range(1, 101)), code=[1000] * 100)
    assert [found.quantile("chat", share, limit=10_000) for share in (0.0, 0.5, 0.9, 1.0)] == [1, 50, 90, 100]
    assert found.quantile("code", 0.5, limit=10_000) == 1000
    assert found.quantile("code", 0.5, limit=300) == 300


def test_a_class_of_which_little_is_known_is_as_all() -> None:
    found = lengths_of(chat=[10] * 100, code=[1000] * (LEAST - 1))
    assert found.quantile("code", 0.5, limit=10_000) == 10
    found.add("code", 1000)
    assert found.quantile("code", 0.5, limit=10_000) == 1000
    assert found.quantile("never seen", 0.5, limit=10_000) == 10


def test_what_has_not_ended_is_longer_than_what_it_has() -> None:
    found = lengths_of(chat=[10] * 50 + [100] * 50)
    assert found.quantile("chat", 0.25, limit=10_000) == 10
    assert found.quantile("chat", 0.25, limit=10_000, generated=10) == 100
    assert found.quantile("chat", 0.25, limit=10_000, generated=100) == 200
    assert found.quantile("chat", 0.25, limit=150, generated=100) == 150


def test_the_window_follows_the_traffic() -> None:
    found = lengths_of(chat=[10] * WINDOW + [500] * WINDOW)
    assert found.quantile("chat", 0.0, limit=10_000) == 500


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.floats(0, 1),
    st.integers(1, 60),
    st.integers(0, 59),
)
def test_a_quantile_is_more_than_there_is_and_at_most_the_limit(
    lengths: list[int], share: float, limit: int, generated: int
) -> None:
    generated = min(generated, limit - 1)
    found = lengths_of(chat=lengths).quantile("chat", share, limit=limit, generated=generated)
    assert generated < found <= limit
