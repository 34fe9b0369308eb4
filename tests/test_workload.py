"""Workloads: trace formats and their errors, arrival processes, scaling, prompts."""

import gzip
import math
import pickle
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.workload import (
    TraceError,
    WorkloadRequest,
    fit_to_model,
    from_zero,
    load_trace,
    mean_rate_rps,
    percentile,
    poisson,
    prompt_tokens,
    rescale,
)

REPOSITORY = Path(__file__).parent.parent
TRACES = REPOSITORY / ".." / "shared" / "traces"

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
PLAIN = "arrival_s,input_tokens,output_tokens\n"


def write(tmp_path: Path, text: str, name: str = "trace") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def real_trace(name: str) -> Path:
    path = TRACES / name
    if not path.exists():
        pytest.skip(f"the trace {name} is not beside the repository (../shared/traces)")
    return path


def request(arrival_s: float = 0.0, input_tokens: int = 8, output_tokens: int = 4) -> WorkloadRequest:
    return WorkloadRequest(arrival_s=arrival_s, input_tokens=input_tokens, output_tokens=output_tokens)


def lengths(requests: list[WorkloadRequest]) -> list[tuple[int, int]]:
    return [(r.input_tokens, r.output_tokens) for r in requests]


# Formats.


def test_azure_rows_are_sorted_and_start_at_zero(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 18:17:04.0319600,3180,8\r\n2023-11-16 18:17:03.9799600,4808,10\r\n"
    first, second = load_trace(write(tmp_path, text))
    assert (first.arrival_s, first.input_tokens, first.output_tokens) == (0.0, 4808, 10)
    assert second.arrival_s == pytest.approx(0.052, abs=1e-6)


def test_azure_of_2024_has_an_offset(tmp_path: Path) -> None:
    text = AZURE + "2024-05-10 00:00:00.5+00:00,1,2\n2024-05-10 02:00:01+02:00,3,4\n"
    assert [r.arrival_s for r in load_trace(write(tmp_path, text))] == pytest.approx([0.0, 0.5])


def test_mooncake_times_are_milliseconds_and_hash_ids_are_kept(tmp_path: Path) -> None:
    text = (
        '{"timestamp": 27000, "input_length": 600, "output_length": 5, "hash_ids": [0, 7], "extra": 1}\n\n'
        '{"timestamp": 28500.5, "input_length": 1, "output_length": 2, "session_id": "s"}\n'
    )
    first, second = load_trace(write(tmp_path, text))
    assert first == WorkloadRequest(arrival_s=0.0, input_tokens=600, output_tokens=5, hash_ids=(0, 7))
    assert second.arrival_s == pytest.approx(1.5005)
    assert (second.hash_ids, second.session_id) == ((), "s")


def test_burstgpt_leaves_out_failed_calls(tmp_path: Path) -> None:
    text = (
        BURSTGPT + "5,ChatGPT,472,18,490,Conversation log\n9,GPT-4,80,0,80,API log\n45,GPT-4,7,3,10,API log\n"
    )
    requests = load_trace(write(tmp_path, text))
    assert [r.arrival_s for r in requests] == [0.0, 40.0]
    assert lengths(requests) == [(472, 18), (7, 3)]


def test_plain_csv_with_any_column_order_sessions_and_byte_order_mark(tmp_path: Path) -> None:
    text = "\ufeffoutput_tokens,session_id,arrival_s,input_tokens\n4,abc,1.5,3\n\n5,,1.0,6\n"
    first, second = load_trace(write(tmp_path, text))
    assert (first.arrival_s, first.input_tokens, first.output_tokens, first.session_id) == (0.0, 6, 5, None)
    assert (second.arrival_s, second.session_id) == (0.5, "abc")


def test_gzip_is_recognised_by_content(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"  # no .gz in the name
    path.write_bytes(gzip.compress((PLAIN + "0,1,1\n").encode()))
    assert lengths(load_trace(path)) == [(1, 1)]


@pytest.mark.parametrize(
    ("name", "count", "span_s", "rate_rps", "p50_in", "p99_in", "p50_out", "p99_out"),
    [  # figures of the traces' own README
        ("azure2023/AzureLLMInferenceTrace_code.csv.gz", 8819, 3436, 2.57, 1469, 7436, 13, 251),
        ("azure2023/AzureLLMInferenceTrace_conv.csv.gz", 19366, 3502, 5.53, 1020, 4142, 129, 601),
        ("mooncake/synthetic_trace.jsonl.gz", 3993, 1022, 3.91, 11587, 66456, 69, 768),
    ],
)
def test_real_traces_have_their_published_figures(
    name: str,
    count: int,
    span_s: float,
    rate_rps: float,
    p50_in: int,
    p99_in: int,
    p50_out: int,
    p99_out: int,
) -> None:
    requests = load_trace(real_trace(name))
    arrivals = [r.arrival_s for r in requests]
    assert len(requests) == count
    assert arrivals[0] == 0.0
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(span_s, abs=1)
    assert mean_rate_rps(requests) == pytest.approx(rate_rps, abs=0.01)
    inputs, outputs = zip(*lengths(requests), strict=True)
    assert [percentile(inputs, 50), percentile(inputs, 99)] == pytest.approx([p50_in, p99_in], abs=1)
    assert [percentile(outputs, 50), percentile(outputs, 99)] == pytest.approx([p50_out, p99_out], abs=1)


def test_real_mooncake_and_burstgpt() -> None:
    mooncake = load_trace(real_trace("mooncake/conversation_trace_first6000.jsonl.gz"))
    assert len(mooncake) == 6000
    assert {r.hash_ids[0] for r in mooncake} == {0}, "all conversations share their first block"
    assert all(len(r.hash_ids) == math.ceil(r.input_tokens / 512) for r in mooncake)
    burstgpt = load_trace(real_trace("burstgpt/burstgpt_1_head54.csv"))
    assert len(burstgpt) == 51, "54 rows, 3 of them failed calls"


# Errors.


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (
            AZURE + "2023-11-16 18:17:03,10,20\nyesterday,10,20\n",
            3,
            ["'yesterday'", "TIMESTAMP", "time stamp"],
        ),
        (AZURE + "2023-11-16 18:17:03,-10,20\n", 2, ["'-10'", "ContextTokens", "whole number >= 1"]),
        (AZURE + "2023-11-16 18:17:03,10,0\n", 2, ["'0'", "GeneratedTokens"]),
        (AZURE + "2023-11-16 18:17:03,10\n", 2, ["'2023-11-16 18:17:03,10'", "3 columns"]),
        (BURSTGPT + "x,m,1,2,3,log\n", 2, ["'x'", "Timestamp", "finite number"]),
        (PLAIN + "0,1,1\n\nnan,1,1\n", 4, ["'nan'", "arrival_s", "finite number"]),
        (PLAIN + "1_0,1,1\n", 2, ["'1_0'"]),
        (PLAIN + "0,1.5,1\n", 2, ["'1.5'", "input_tokens", "whole number"]),
        (PLAIN + "0,1," + "9" * 5000 + "\n", 2, ["output_tokens", "..."]),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"time', 2, ["JSON object", "timestamp"]),
        ('{"timestamp": 0, "input_length": 1}\n', 1, ["JSON object", "output_length"]),
        ('{"timestamp": true, "input_length": 1, "output_length": 1}', 1, ["True", "timestamp"]),
        ('{"timestamp": 1e999, "input_length": 1, "output_length": 1}', 1, ["inf", "timestamp"]),
        ('{"timestamp": 0, "input_length": 2.0, "output_length": 1}', 1, ["2.0", "input_length"]),
        (
            '{"timestamp": 0, "input_length": 2, "output_length": 1, "hash_ids": [1, -1]}',
            1,
            ["-1", "hash_ids"],
        ),
        ('{"timestamp": 0, "input_length": 2, "output_length": 1, "hash_ids": 3}', 1, ["got 3", "list"]),
        (
            "time,in,out\n1,2,3\n",
            1,
            ["'time,in,out'", "TIMESTAMP,ContextTokens,GeneratedTokens", "arrival_s"],
        ),
        ("", 1, ["at least one request"]),
        ("\n\n", 1, ["at least one request"]),
        (PLAIN, 1, ["at least one request"]),
    ],
)
def test_bad_traces_say_where_what_and_what_was_expected(
    tmp_path: Path, text: str, line: int, said: list[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    message = str(caught.value)
    assert (caught.value.path, caught.value.line) == (path, line)
    assert f"{path}, line {line}: got " in message
    assert all(words in message for words in said), message
    assert len(message) < 500 + len(str(path))


def test_unreadable_bytes(tmp_path: Path) -> None:
    whole = gzip.compress((PLAIN + "0,1,1\n" * 5000).encode())
    damaged = {
        "cut": whole[: len(whole) // 2],
        "broken": whole[:12] + b"\xff" * 20 + whole[32:],
        "binary": PLAIN.encode() + b"\xff\xfe\x00",
    }
    for name, content in damaged.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(TraceError, match="readable UTF-8 text"):
            load_trace(path)
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "absent")


def test_trace_error_pickles() -> None:
    error = TraceError(Path("t"), 3, "x", "y")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.path, copy.line, copy.value, copy.expected) == (
        str(error),
        Path("t"),
        3,
        "x",
        "y",
    )


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


# Arrival processes and scaling.


def test_poisson_has_its_rate_and_variation() -> None:
    requests = poisson(20.0, 5000, 100, 10, Random(1))
    gaps = [b.arrival_s - a.arrival_s for a, b in pairwise(requests)]
    assert requests[0].arrival_s == 0.0
    assert set(lengths(requests)) == {(100, 10)}
    assert mean_rate_rps(requests) == pytest.approx(20.0, rel=0.05)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(1.0, rel=0.05)
    assert requests == poisson(20.0, 5000, 100, 10, Random(1))


@pytest.mark.parametrize(("rate_rps", "count"), [(0.0, 1), (-1.0, 1), (math.nan, 1), (math.inf, 1), (1.0, 0)])
def test_poisson_refuses(rate_rps: float, count: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        poisson(rate_rps, count, 1, 1, Random(0))


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


def test_importing_workload_loads_nothing_heavy() -> None:
    heavy = {"ray", "torch", "vllm", "zmq", "numpy", "aiohttp", "pydantic"}
    code = f"import sys, deploy.workload; sys.exit(str(sorted({heavy} & set(sys.modules))))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert run.stderr.strip() == "[]"
