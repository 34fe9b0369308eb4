"""Sessions by rule: who continues whom, and that prefixes are real."""

from collections import defaultdict
from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.sessions import attach_sessions
from deploy.trace_shapes import fixed_lengths, steady_arrivals_s, with_lengths
from deploy.workload import WorkloadRequest, fit_to_model, prompt_tokens


def workload(count: int, rate_rps: float = 2.0, seed: int = 0) -> list[WorkloadRequest]:
    times = islice(steady_arrivals_s(rate_rps, 1.0, Random(seed)), count)
    return with_lengths(times, fixed_lengths(100, 20), Random(seed))


def by_session(requests: list[WorkloadRequest]) -> dict[str, list[WorkloadRequest]]:
    sessions = defaultdict(list)
    for request in requests:
        assert request.session_id is not None
        sessions[request.session_id].append(request)
    return sessions


def test_turns_and_gaps_are_as_asked() -> None:
    sessions = by_session(attach_sessions(workload(20_000), 4.0, 30.0, Random(1)))
    assert 20_000 / len(sessions) == pytest.approx(4.0, rel=0.05)
    gaps = [b.arrival_s - a.arrival_s for turns in sessions.values() for a, b in pairwise(turns)]
    assert min(gaps) >= 15.0
    assert sum(gaps) / len(gaps) == pytest.approx(30.0, rel=0.1)


def test_one_turn_is_no_session_to_speak_of() -> None:
    before = workload(50)
    after = attach_sessions(before, 1.0, 1.0, Random(1))
    assert len(by_session(after)) == 50
    assert [r.input_tokens for r in after] == [r.input_tokens for r in before]


REQUESTS = st.lists(
    st.builds(
        WorkloadRequest,
        arrival_s=st.floats(0, 100),
        input_tokens=st.integers(1, 1500),
        output_tokens=st.integers(1, 400),
    ),
    max_size=40,
)


@given(REQUESTS, st.floats(1, 20), st.floats(0.01, 50), st.integers(0, 9))
def test_a_turn_adds_to_what_was_said(
    requests: list[WorkloadRequest], turns_mean: float, gap_s: float, seed: int
) -> None:
    attached = attach_sessions(requests, turns_mean, gap_s, Random(seed))
    before = sorted(requests, key=lambda r: r.arrival_s)
    assert [r.arrival_s for r in attached] == [r.arrival_s for r in before]
    assert [r.output_tokens for r in attached] == [r.output_tokens for r in before]
    said: dict[str | None, int] = {}
    for own, turn in zip(before, attached, strict=True):
        assert turn.input_tokens == said.get(turn.session_id, 0) + own.input_tokens
        said[turn.session_id] = turn.input_tokens + turn.output_tokens
    assert attached == attach_sessions(requests, turns_mean, gap_s, Random(seed))


@given(REQUESTS, st.integers(0, 9))
def test_a_prompt_begins_with_the_one_before_and_with_no_strangers(
    requests: list[WorkloadRequest], seed: int
) -> None:
    attached = attach_sessions(requests, 5.0, 1.0, Random(seed))
    prompts = [prompt_tokens(r, i, seed=0, vocab_low=0, vocab_high=2**50) for i, r in enumerate(attached)]
    latest: dict[str | None, list[int]] = {}
    for request, prompt in zip(attached, prompts, strict=True):
        previous = latest.get(request.session_id, [])
        assert prompt[: len(previous)] == previous
        latest[request.session_id] = prompt
    assert len({prompt[0] for prompt in latest.values()}) == len(latest)


def test_prefixes_stay_when_the_lengths_are_fitted_to_a_small_model() -> None:
    fitted = fit_to_model(
        attach_sessions(workload(300), 6.0, 5.0, Random(1)), max_model_len=100, max_output=20
    )
    turns = max(by_session(fitted).values(), key=len)
    first, second = (
        prompt_tokens(r, i, seed=0, vocab_low=0, vocab_high=2**50) for i, r in enumerate(turns[:2])
    )
    assert len(first) < len(second) <= 80
    assert second[: len(first)] == first


@pytest.mark.parametrize(
    ("turns_mean", "gap_s", "said"),
    [(0.5, 1.0, "turns_mean"), (float("nan"), 1.0, "turns_mean"), (2.0, 0.0, "gap_s")],
)
def test_impossible_rules_are_refused(turns_mean: float, gap_s: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attach_sessions(workload(2), turns_mean, gap_s, Random(0))


def test_real_prefixes_are_not_overwritten() -> None:
    real = WorkloadRequest(arrival_s=3.0, input_tokens=5, output_tokens=5, hash_ids=(1,))
    with pytest.raises(ValueError, match="request 1 at 3 s has a session or hash ids of its own"):
        attach_sessions([*workload(1), real], 2.0, 1.0, Random(0))
