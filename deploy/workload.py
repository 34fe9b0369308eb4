"""Workloads: which request arrives when, and how long its prompt and its answer are.

Reads the published traces (Azure LLM inference CSV, Mooncake JSONL, BurstGPT CSV) and a plain CSV, makes
Poisson arrivals, changes the rate of a workload, shrinks one for a small model, and makes the prompts.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from random import Random
from typing import NamedTuple, TextIO, TypeVar

_Parsed = TypeVar("_Parsed")
MOONCAKE_TOKENS_PER_HASH = 512  # Mooncake FAST'25 traces, README: one id per block of 512 prompt tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRequest:
    """One request of a workload.

    `arrival_s` counts from the start of the workload. `hash_ids` names the prompt's blocks of
    `tokens_per_hash` tokens each, first block first: equal id means equal prompt up to that block's end.
    Raises ValueError for a negative or infinite arrival and for a length below one token.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    session_id: str | None = None
    tokens_per_hash: int = MOONCAKE_TOKENS_PER_HASH

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_s < math.inf:
            raise ValueError(f"arrival_s is {self.arrival_s!r}, expected a finite number of seconds >= 0")
        for name in ("input_tokens", "output_tokens", "tokens_per_hash"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected at least 1")


class TraceError(ValueError):
    """A file that is no trace: where (`path`, `line` from 1), the `value`, what was `expected`."""

    def __init__(self, path: Path, line: int, value: object, expected: str) -> None:
        super().__init__(path, line, value, expected)  # all four, so that it pickles
        self.path, self.line, self.value, self.expected = path, line, value, expected

    def __str__(self) -> str:
        shown = repr(self.value)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        return f"{self.path}, line {self.line}: got {shown}, expected {self.expected}"


class _Row(NamedTuple):
    """A request as the file has it: its arrival counts from wherever the file starts counting."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    session_id: str | None = None


def load_trace(path: Path) -> list[WorkloadRequest]:
    """Read a trace, plain or gzipped; the format is recognised by content, never by file name.

    Returns the requests sorted by arrival, the first at 0 s. BurstGPT's failed calls (no response tokens) are
    left out. Raises TraceError for a bad row, an unknown header or an empty trace, OSError for an unreadable
    file.
    """
    last_line = 0
    rows: list[_Row] = []
    try:
        with _open_text(path) as text:
            for line, row in _rows(path, text):
                rows.append(row)
                last_line = line
    except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile, zlib.error, EOFError) as error:
        # Decoding runs ahead of the rows, so the last good line is the nearest place that is known.
        raise TraceError(path, last_line + 1, str(error), "readable UTF-8 text, plain or gzipped") from error
    if not rows:
        raise TraceError(path, 1, "", f"at least one request; {_KNOWN_FORMATS}")
    rows.sort(key=lambda row: row.arrival_s)
    start_s = rows[0].arrival_s
    return [WorkloadRequest(**row._replace(arrival_s=row.arrival_s - start_s)._asdict()) for row in rows]


def poisson(
    rate_rps: float, count: int, input_tokens: int, output_tokens: int, rng: Random
) -> list[WorkloadRequest]:
    """`count` equal requests with exponential gaps of mean 1/`rate_rps` s, the first at 0 s.

    Raises ValueError unless the rate is positive and finite and the count and both lengths are at least 1.
    """
    _positive("rate_rps", rate_rps)
    if count < 1:
        raise ValueError(f"count is {count!r}, expected at least 1")
    requests = []
    arrival_s = 0.0
    for _ in range(count):
        requests.append(
            WorkloadRequest(arrival_s=arrival_s, input_tokens=input_tokens, output_tokens=output_tokens)
        )
        arrival_s += rng.expovariate(rate_rps)
    return requests


def from_zero(requests: Sequence[WorkloadRequest]) -> list[WorkloadRequest]:
    """The same requests, say a slice of a trace, sorted by arrival and moved so that the first is at 0 s."""
    start_s = min((request.arrival_s for request in requests), default=0.0)
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    return [replace(request, arrival_s=request.arrival_s - start_s) for request in ordered]


def mean_rate_rps(requests: Sequence[WorkloadRequest]) -> float:
    """Gaps per second: (count - 1) / (last arrival - first). ValueError when all arrive at one time."""
    arrivals = [request.arrival_s for request in requests]
    span_s = max(arrivals) - min(arrivals) if arrivals else 0.0
    if span_s <= 0:
        raise ValueError(f"{len(requests)} request(s) with a single arrival time have no rate")
    return (len(arrivals) - 1) / span_s


def rescale(
    requests: Sequence[WorkloadRequest], *, rate_rps: float | None = None, speedup: float | None = None
) -> list[WorkloadRequest]:
    """Stretch or squeeze the arrival times; order, burstiness and lengths stay.

    Give one of `rate_rps` (the new `mean_rate_rps`) and `speedup` (2 halves every arrival time). Raises
    ValueError for none or both, for a value not positive and finite, and for a workload without a rate.
    """
    if rate_rps is not None and speedup is None:
        _positive("rate_rps", rate_rps)
        speedup = rate_rps / mean_rate_rps(requests)
    elif rate_rps is not None or speedup is None:
        raise ValueError("give either rate_rps or speedup")
    _positive("speedup", speedup)
    return [replace(request, arrival_s=request.arrival_s / speedup) for request in requests]


def fit_to_model(
    requests: Sequence[WorkloadRequest], *, max_model_len: int, max_output: int
) -> list[WorkloadRequest]:
    """Scale lengths down so that every request fits a small model: a production trace on a tiny one.

    Answers are limited to `max_output` tokens, prompts to the remaining `max_model_len - max_output`.
    Prompts get one factor for the whole workload and answers another, so requests keep their proportions: the
    factor brings the 99th percentile to the limit (never up) and the longest 1 % are capped there; scaling by
    the maximum would let one outlier shrink all others to nothing. At least 1 token remains.
    `tokens_per_hash` shrinks with the prompts, so two prompts go on sharing the same part of their length.
    Arrivals stay. Raises ValueError when the limits leave no room for a prompt or an answer.
    """
    max_input = max_model_len - max_output
    if max_output < 1 or max_input < 1:
        raise ValueError(
            f"max_model_len {max_model_len} with max_output {max_output}: "
            "expected room for at least 1 token of prompt and 1 of answer"
        )
    if not requests:
        return []
    input_factor = min(1.0, max_input / percentile([request.input_tokens for request in requests], 99))
    output_factor = min(1.0, max_output / percentile([request.output_tokens for request in requests], 99))
    block_tokens = min((request.tokens_per_hash for request in requests if request.hash_ids), default=None)
    if block_tokens is not None:  # whole tokens per block, else shared prefixes would drift by rounding
        input_factor = max(1, math.floor(block_tokens * input_factor)) / block_tokens
    fitted = []
    for request in requests:
        input_tokens = _shrink(request.input_tokens, input_factor, max_input)
        tokens_per_hash = request.tokens_per_hash
        if request.hash_ids:
            tokens_per_hash = max(1, round(tokens_per_hash * input_factor))
        fitted.append(
            replace(
                request,
                input_tokens=input_tokens,
                output_tokens=_shrink(request.output_tokens, output_factor, max_output),
                hash_ids=request.hash_ids[: math.ceil(input_tokens / tokens_per_hash)],
                tokens_per_hash=tokens_per_hash,
            )
        )
    return fitted


def prompt_tokens(
    request: WorkloadRequest, index: int, *, seed: int, vocab_low: int, vocab_high: int
) -> list[int]:
    """The prompt of request `index`: `input_tokens` ids, `vocab_low <= id < vocab_high`.

    Equal arguments give equal prompts. Blocks with a hash id depend on the seed and that id only, so prefixes
    are really shared; what the hash ids do not cover depends on seed and index, and is shared with nobody.
    """
    vocab = range(vocab_low, vocab_high)
    tokens: list[int] = []
    for hash_id in request.hash_ids[: math.ceil(request.input_tokens / request.tokens_per_hash)]:
        # A text seed is hashed with SHA-512: equal on every machine, unlike hash().
        tokens += Random(f"{seed}/block/{hash_id}").choices(vocab, k=request.tokens_per_hash)
    del tokens[request.input_tokens :]
    rest = request.input_tokens - len(tokens)
    return tokens + Random(f"{seed}/request/{index}").choices(vocab, k=rest)


def percentile(values: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile with linear interpolation (`numpy.percentile`'s default method).

    Raises ValueError for no values and for a percentage outside 0..100.
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent!r} of {len(values)} values")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def _shrink(tokens: int, factor: float, limit: int) -> int:
    return max(1, min(limit, round(tokens * factor)))


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a positive finite number")


# Reading files.


@dataclass(frozen=True, slots=True, kw_only=True)
class _CsvFormat:
    """Which columns of a CSV hold what."""

    arrival: str
    input_tokens: str
    output_tokens: str
    session_id: str
    parse_arrival_s: Callable[[object], float]
    zero_output_is_failure: bool = False


def _number(value: object) -> float:
    """A finite number from CSV text or JSON; ValueError says what was expected."""
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool) and "_" not in str(value):
            number = float(value)
            if math.isfinite(number):
                return number
    except (ValueError, OverflowError):
        pass
    raise ValueError("a finite number")


def _instant_s(value: object) -> float:
    """Seconds since 1970 of a time stamp such as '2023-11-16 18:17:03.9799600', with or without an offset."""
    try:
        instant = datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError("a time stamp like 2023-11-16 18:17:03.9799600") from None
    # Without an offset it is UTC: the machine's own zone could put a summer-time jump into the trace.
    return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp()


def _whole(value: object) -> int:
    """A whole number of tokens from CSV text or JSON; ValueError says what was expected."""
    text = value.strip() if isinstance(value, str) else str(value) if type(value) is int else ""
    if text.isascii() and text.isdigit() and len(text) <= 18 and int(text) >= 1:
        return int(text)
    raise ValueError("a whole number >= 1")


_CSV_FORMATS = (
    _CsvFormat(  # Azure/AzurePublicDataset, AzureLLMInferenceTrace_{code,conv}
        arrival="TIMESTAMP",
        input_tokens="ContextTokens",
        output_tokens="GeneratedTokens",
        session_id="",
        parse_arrival_s=_instant_s,
    ),
    _CsvFormat(  # HPMLL/BurstGPT; its README: failed calls have no response tokens
        arrival="Timestamp",
        input_tokens="Request tokens",
        output_tokens="Response tokens",
        session_id="Session ID",
        parse_arrival_s=_number,
        zero_output_is_failure=True,
    ),
    _CsvFormat(
        arrival="arrival_s",
        input_tokens="input_tokens",
        output_tokens="output_tokens",
        session_id="session_id",
        parse_arrival_s=_number,
    ),
)
_MOONCAKE_KEYS = ("timestamp", "input_length", "output_length")
_KNOWN_FORMATS = (
    "a CSV header with "
    + " or ".join(",".join((f.arrival, f.input_tokens, f.output_tokens)) for f in _CSV_FORMATS)
    + " or JSON lines with "
    + ", ".join(_MOONCAKE_KEYS)
)


def _open_text(path: Path) -> TextIO:
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    # utf-8-sig: spreadsheets put a byte order mark before the header
    if is_gzip:
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _rows(path: Path, text: TextIO) -> Iterator[tuple[int, _Row]]:
    """(line number, row) of every request in the file; none for a file of blank lines."""
    for line, first in enumerate(text, start=1):
        if first.strip():
            read = _mooncake_rows if first.lstrip().startswith("{") else _csv_rows
            yield from read(path, line, first, text)  # reads the text to its end


def _csv_rows(path: Path, header_line: int, header: str, text: TextIO) -> Iterator[tuple[int, _Row]]:
    columns = [column.strip() for column in next(csv.reader([header]))]
    for layout in _CSV_FORMATS:
        if {layout.arrival, layout.input_tokens, layout.output_tokens} <= set(columns):
            break
    else:
        raise TraceError(path, header_line, header.strip(), _KNOWN_FORMATS)
    reader = csv.reader(text)
    for values in reader:
        line = header_line + reader.line_num
        if not values:
            continue
        if len(values) != len(columns):
            raise TraceError(path, line, ",".join(values), f"{len(columns)} columns: {','.join(columns)}")
        row = dict(zip(columns, values, strict=True))
        if layout.zero_output_is_failure and row[layout.output_tokens].strip() == "0":
            continue  # the source got no answer: there is no length to ask for
        arrival_s = _field(path, line, row, layout.arrival, layout.parse_arrival_s)
        input_tokens = _field(path, line, row, layout.input_tokens, _whole)
        output_tokens = _field(path, line, row, layout.output_tokens, _whole)
        yield line, _Row(arrival_s, input_tokens, output_tokens, (), row.get(layout.session_id) or None)


def _mooncake_rows(path: Path, first_line: int, first: str, text: TextIO) -> Iterator[tuple[int, _Row]]:
    for line, content in enumerate(chain([first], text), start=first_line):
        if content.strip():
            yield line, _mooncake_row(path, line, content)


def _mooncake_row(path: Path, line: int, content: str) -> _Row:
    row: object
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not row.keys() >= set(_MOONCAKE_KEYS):
        raise TraceError(path, line, content.strip(), f"a JSON object with {', '.join(_MOONCAKE_KEYS)}")
    session_id = row.get("session_id")
    return _Row(
        arrival_s=_field(path, line, row, "timestamp", _number) / 1000,
        input_tokens=_field(path, line, row, "input_length", _whole),
        output_tokens=_field(path, line, row, "output_length", _whole),
        hash_ids=_field(path, line, {"hash_ids": row.get("hash_ids", [])}, "hash_ids", _hash_ids),
        session_id=None if session_id is None else str(session_id),
    )


def _hash_ids(value: object) -> tuple[int, ...]:
    if isinstance(value, list) and all(type(hash_id) is int and hash_id >= 0 for hash_id in value):
        return tuple(value)
    raise ValueError("a list of whole numbers >= 0")


def _field(
    path: Path, line: int, row: Mapping[str, object], name: str, parse: Callable[[object], _Parsed]
) -> _Parsed:
    try:
        return parse(row[name])
    except ValueError as error:
        raise TraceError(path, line, row[name], f"{name}: {error}") from None
