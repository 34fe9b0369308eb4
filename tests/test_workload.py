"""Workloads: scaling, fitting a small model, prompts, percentiles."""

import math
import statistics
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.workload import (
    WorkloadRequest,
    fast_prompt_tokens,
    fit_to_model,
    from_zero,
    mean_rate_rps,
    percentile,
    prompt_tokens,
    rescale,
)

REPOSITORY = Path(__file__).parent.parent


def request(arrival_s: float = 0.0, input_tokens: int = 8, output_tokens: int = 4) -> WorkloadRequest:
    return WorkloadRequest(arrival_s=arrival_s, input_tokens=input_tokens, output_tokens=output_tokens)


def lengths(requests: list[WorkloadRequest]) -> list[tuple[int, int]]:
    return [(r.input_tokens, r.output_tokens) for r in requests]


@pytest.mark.parametrize(
    "bad",
    [
        {"arrival_s": -1.0},
        {"arrival_s": math.nan},
        {"arrival_s": math.inf},
        {"input_tokens": 0},
        {"output_tokens": 0},
        {"tokens_per_hash": 0},
    ],
)
def test_a_request_is_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        WorkloadRequest(**({"arrival_s": 0.0, "input_tokens": 1, "output_tokens": 1} | bad))  # type: ignore[arg-type]


# Scaling.


def test_from_zero_sorts_and_shifts() -> None:
    assert [r.arrival_s for r in from_zero([request(7.0), request(5.0)])] == [0.0, 2.0]
    assert from_zero([]) == []


WORKLOADS = st.lists(st.just(0.0) | st.floats(1e-3, 1e6), min_size=1, max_size=30).map(
    lambda gaps: [request(math.fsum([*gaps, 1.0][:i]), input_tokens=i + 1) for i in range(len(gaps) + 2)]
)
RATES = st.floats(1e-3, 1e4)


@given(WORKLOADS, RATES)
def test_rescale_reaches_the_rate_and_keeps_the_rest(
    workload: list[WorkloadRequest], rate_rps: float
) -> None:
    scaled = rescale(workload, rate_rps=rate_rps)
    assert mean_rate_rps(scaled) == pytest.approx(rate_rps, rel=1e-9)
    assert lengths(scaled) == lengths(workload)
    arrivals = [r.arrival_s for r in scaled]
    assert arrivals == sorted(arrivals)
    factor = arrivals[-1] / workload[-1].arrival_s
    assert arrivals == pytest.approx([r.arrival_s * factor for r in workload])


@given(WORKLOADS, st.floats(1e-3, 1e3))
def test_speedup_there_and_back(workload: list[WorkloadRequest], speedup: float) -> None:
    back = rescale(rescale(workload, speedup=speedup), speedup=1 / speedup)
    assert [r.arrival_s for r in back] == pytest.approx([r.arrival_s for r in workload])


@pytest.mark.parametrize(
    "asked",
    [{}, {"rate_rps": 1.0, "speedup": 2.0}, {"rate_rps": 0.0}, {"speedup": -1.0}, {"speedup": math.inf}],
)
def test_rescale_refuses(asked: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"rate_rps|speedup"):
        rescale([request(0.0), request(1.0)], **asked)


@pytest.mark.parametrize("workload", [[], [request()], [request(2.0), request(2.0)]])
def test_a_single_arrival_time_has_no_rate(workload: list[WorkloadRequest]) -> None:
    with pytest.raises(ValueError, match="have no rate"):
        rescale(workload, rate_rps=1.0)


# Fitting a small model.


@given(
    st.lists(st.tuples(st.integers(1, 200_000), st.integers(1, 5000)), min_size=1, max_size=50),
    st.integers(1, 4096),
    st.integers(1, 512),
)
def test_fitted_requests_fit_and_keep_their_order(
    shape: list[tuple[int, int]], room: int, max_output: int
) -> None:
    workload = [
        WorkloadRequest(
            arrival_s=0.0, input_tokens=i, output_tokens=o, hash_ids=tuple(range(math.ceil(i / 512)))
        )
        for i, o in shape
    ]
    fitted = fit_to_model(workload, max_model_len=room + max_output, max_output=max_output)
    for before, after in zip(workload, fitted, strict=True):
        assert 1 <= after.input_tokens <= min(room, before.input_tokens)
        assert 1 <= after.output_tokens <= min(max_output, before.output_tokens)
        assert len(after.hash_ids) == math.ceil(after.input_tokens / after.tokens_per_hash)
    by_length = sorted(zip(workload, fitted, strict=True), key=lambda pair: pair[0].input_tokens)
    assert [b.input_tokens for _, b in by_length] == sorted(r.input_tokens for r in fitted)


def test_what_fits_is_left_alone() -> None:
    workload = [request(1.0, 100, 20), request(2.0, 50, 10)]
    assert fit_to_model(workload, max_model_len=120, max_output=20) == workload
    assert fit_to_model([], max_model_len=2, max_output=1) == []


def test_one_outlier_does_not_shrink_the_others() -> None:
    workload = [request(0.0, 100, 10)] * 999 + [request(0.0, 100_000, 9000)]
    assert lengths(fit_to_model(workload, max_model_len=164, max_output=64)) == [(100, 10)] * 999 + [
        (100, 64)
    ]


def test_prefixes_shrink_with_their_prompts() -> None:
    share = WorkloadRequest(arrival_s=0.0, input_tokens=5120, output_tokens=1, hash_ids=tuple(range(10)))
    other = WorkloadRequest(
        arrival_s=0.0, input_tokens=5120, output_tokens=1, hash_ids=(*range(5), *range(90, 95))
    )
    fitted = fit_to_model([share, other], max_model_len=101, max_output=1)
    a, b = (prompt_tokens(r, i, seed=0, vocab_low=100, vocab_high=4000) for i, r in enumerate(fitted))
    assert len(a) == len(b) == 100
    assert a[:50] == b[:50], "half of the prompt was shared, half is"
    assert a[50:] != b[50:]


@pytest.mark.parametrize(("max_model_len", "max_output"), [(10, 10), (10, 0), (0, 1)])
def test_fit_refuses_limits_without_room(max_model_len: int, max_output: int) -> None:
    with pytest.raises(ValueError, match="expected room"):
        fit_to_model([request()], max_model_len=max_model_len, max_output=max_output)


# Prompts and percentiles.


def prompt(workload_request: WorkloadRequest, index: int = 0, seed: int = 0) -> list[int]:
    return prompt_tokens(workload_request, index, seed=seed, vocab_low=100, vocab_high=200)


def test_prompts_have_their_length_and_range_and_repeat() -> None:
    plain = request(input_tokens=1000)
    tokens = prompt(plain)
    assert len(tokens) == 1000
    assert 100 <= min(tokens) <= max(tokens) < 200
    assert tokens == prompt(plain)
    assert len({tuple(t) for t in (tokens, prompt(plain, index=1), prompt(plain, seed=1))}) == 3
    assert prompt_tokens(plain, 0, seed=0, vocab_low=5, vocab_high=6) == [5] * 1000


def test_equal_hash_ids_are_equal_blocks() -> None:
    def of(tokens: int, *hash_ids: int) -> WorkloadRequest:
        return WorkloadRequest(arrival_s=0.0, input_tokens=tokens, output_tokens=1, hash_ids=hash_ids)

    long, short, beyond = prompt(of(1500, 1, 2, 3)), prompt(of(700, 1, 2), 1), prompt(of(1500, 1, 9), 2)
    assert [len(long), len(short), len(beyond)] == [1500, 700, 1500]
    assert short == long[:700], "the last block may be partly filled"
    assert beyond[:512] == long[:512]
    assert beyond[512:1024] != long[512:1024]
    assert beyond[1024:] != prompt(of(1500, 1, 9), 3)[1024:], "what has no hash id is shared with nobody"
    assert prompt(of(100, 1, 2, 3)) == long[:100], "more hash ids than tokens"


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(
    st.lists(
        st.builds(
            WorkloadRequest,
            arrival_s=st.just(0.0),
            input_tokens=st.integers(1, 40),
            output_tokens=st.just(1),
            hash_ids=st.lists(st.integers(0, 3), max_size=6).map(tuple),
            tokens_per_hash=st.just(7),
        ),
        min_size=2,
        max_size=6,
    )
)
def test_fast_prompts_share_exactly_what_prompts_share(requests: list[WorkloadRequest]) -> None:
    # A vocabulary in which two random tokens never meet by chance.
    slow = [prompt_tokens(r, i, seed=0, vocab_low=0, vocab_high=2**50) for i, r in enumerate(requests)]
    fast = [fast_prompt_tokens(r, i) for i, r in enumerate(requests)]
    assert [len(tokens) for tokens in fast] == [r.input_tokens for r in requests]
    for a, b in combinations(range(len(requests)), 2):
        assert common_prefix(fast[a], fast[b]) == common_prefix(slow[a], slow[b])


def test_a_fast_prompts_own_tokens_are_in_no_other_prompt() -> None:
    def of(*hash_ids: int) -> WorkloadRequest:
        return WorkloadRequest(arrival_s=0.0, input_tokens=600, output_tokens=1, hash_ids=hash_ids)

    assert fast_prompt_tokens(of(5), 9) == [10] * 512 + [19] * 88
    own = [set(fast_prompt_tokens(of(), index)) for index in range(100)]
    blocks = [set(fast_prompt_tokens(of(hash_id, hash_id), 0)) for hash_id in range(100)]
    assert len(set().union(*own, *blocks)) == 200


def test_percentile_of_known_values() -> None:
    assert percentile([3.0], 99) == 3.0
    assert [percentile([4, 1, 3, 2], q) for q in (0, 50, 90, 100)] == pytest.approx([1, 2.5, 3.7, 4])
    for values, percent in (([], 50), ([1.0], -1), ([1.0], 101), ([1.0], math.nan)):
        with pytest.raises(ValueError, match="percentile"):
            percentile(values, percent)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_percentile_agrees_with_inclusive_quantiles(values: list[float]) -> None:
    hundredths = [percentile(values, percent) for percent in range(1, 100)]
    assert hundredths == pytest.approx(statistics.quantiles(values, n=100, method="inclusive"), abs=1e-6)


def test_making_a_workload_loads_nothing_heavy() -> None:
    heavy = {"ray", "torch", "vllm", "zmq", "numpy", "aiohttp", "pydantic"}
    code = f"import sys, deploy.workload_grammar; sys.exit(str(sorted({heavy} & set(sys.modules))))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert run.stderr.strip() == "[]"
