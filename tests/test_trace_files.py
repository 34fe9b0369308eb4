"""Trace files: formats, and errors that name the line."""

import gzip
import math
import pickle
from pathlib import Path

import pytest

from deploy.trace_files import TraceError, load_lengths, load_trace
from deploy.workload import WorkloadRequest, mean_rate_rps, percentile

TRACES = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"

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


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("prompt_len,output_len\n5,7\n\n3,9\n", [(5, 7), (3, 9)]),
        (
            "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n5,7,12,0.7\n3,9,12,0.3\n",
            [(5, 7), (3, 9)],
        ),
        (PLAIN + "9,5,7\n1,3,9\n", [(5, 7), (3, 9)]),
        ('{"timestamp": 0, "input_length": 5, "output_length": 7, "hash_ids": [1]}\n', [(5, 7)]),
    ],
)
def test_lengths_of_a_lengths_file_and_of_any_trace(
    tmp_path: Path, text: str, pairs: list[tuple[int, int]]
) -> None:
    assert load_lengths(write(tmp_path, text)) == pairs


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("prompt_len,output_len\n5,0\n", 2, ["'0'", "output_len", "whole number >= 1"]),
        ("prompt_len,output_len\n5\n", 2, ["2 columns"]),
        ("prompt_len,output_len\n", 1, ["at least one row", "prompt_len,output_len"]),
        ("", 1, ["at least one row"]),
        ("a,b\n1,2\n", 1, ["'a,b'", "ContextTokens"]),
    ],
)
def test_bad_lengths(tmp_path: Path, text: str, line: int, said: list[str]) -> None:
    with pytest.raises(TraceError) as caught:
        load_lengths(write(tmp_path, text))
    assert caught.value.line == line
    assert all(words in str(caught.value) for words in said), str(caught.value)


def test_real_lengths_have_their_published_figures() -> None:
    pairs = load_lengths(real_trace("sharegpt/distserve_sharegpt_opt_lengths.csv.gz"))
    inputs, outputs = zip(*pairs, strict=True)
    assert len(pairs) == 12088
    assert [percentile(inputs, 50), percentile(inputs, 99)] == pytest.approx([695, 1940], abs=1)
    assert [percentile(outputs, 50), percentile(outputs, 99)] == pytest.approx([92, 1007], abs=1)


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
        ("prompt_len,output_len\n1,2\n", 1, ["lengths alone", "lengths=FILE"]),
        ("t_s,rate_rps,active_clients,rate_weighted_cv\n0,1,1,1\n", 1, ["servegen:rates=FILE"]),
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
