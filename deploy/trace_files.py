"""Reads traces: the published ones (Azure LLM inference CSV, Mooncake JSONL, BurstGPT CSV), a plain CSV, and
files that have lengths only.

A row that can't be used is a TraceError with its line; nothing is skipped or guessed.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO, TypeVar

from deploy.workload import WorkloadRequest

_Parsed = TypeVar("_Parsed")


class TraceError(ValueError):
    """A file that is no trace: where (`path`, `line` from 1), the `value`, what was `expected`."""

    def __init__(self, path: Path, line: int, value: object, expected: str) -> None:
        super().__init__(path, line, value, expected)  # all four, so that it pickles
        self.path, self.line, self.value, self.expected = path, line, value, expected

    def __str__(self) -> str:
        shown = repr(self.value)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        return f"{self.path}, line {self.line}: got {shown}, expected {self.expected}"


def load_trace(path: Path) -> list[WorkloadRequest]:
    """Read a trace, plain or gzipped; the format is recognised by content, never by file name.

    Returns the requests sorted by arrival, the first at 0 s. BurstGPT's failed calls (no response tokens) are
    left out. Raises TraceError for a bad row, an unknown header or an empty trace, OSError for an unreadable
    file.
    """
    rows = read_rows(path, _trace_rows)
    if not rows:
        raise TraceError(path, 1, "", f"at least one request; {_KNOWN_FORMATS}")
    rows.sort(key=lambda row: row.arrival_s)
    start_s = rows[0].arrival_s
    return [WorkloadRequest(**row._replace(arrival_s=row.arrival_s - start_s)._asdict()) for row in rows]


def load_lengths(path: Path) -> list[tuple[int, int]]:
    """(prompt, answer) lengths in tokens, in the file's order: of a CSV that has only them, or of any trace.

    Raises TraceError for a bad row, an unknown header or an empty file, OSError for an unreadable file.
    """
    lengths = read_rows(path, _length_rows)
    if not lengths:
        raise TraceError(path, 1, "", f"at least one row of lengths; {_KNOWN_LENGTHS}, or {_KNOWN_FORMATS}")
    return lengths


# Parts that other formats are read with, too.

Rows = Callable[[Path, TextIO], Iterator[tuple[int, _Parsed]]]


def read_rows(path: Path, rows: Rows[_Parsed]) -> list[_Parsed]:
    """Everything that `rows(path, text)` yields as (line, value), from a file that may be gzipped.

    Raises TraceError where the file can't be decoded, OSError where it can't be read.
    """
    last_line = 0
    values: list[_Parsed] = []
    try:
        with _open_text(path) as text:
            for line, value in rows(path, text):
                values.append(value)
                last_line = line
    except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile, zlib.error, EOFError) as error:
        # Decoding runs ahead of the rows, so the last good line is the nearest place that is known.
        raise TraceError(path, last_line + 1, str(error), "readable UTF-8 text, plain or gzipped") from error
    return values


def first_line(text: TextIO) -> tuple[int, str]:
    """(line number, content) of the first line that isn't blank; content is empty where there is none."""
    line = 0
    for line, content in enumerate(text, start=1):
        if content.strip():
            return line, content
    return line, ""


def csv_columns(header: str) -> list[str]:
    """Names of the columns."""
    return [column.strip() for column in next(csv.reader([header]), [])]


def csv_records(
    path: Path, header_line: int, header: str, text: TextIO
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row by column) of the rows after the header; TraceError for a row of another width."""
    columns = csv_columns(header)
    reader = csv.reader(text)
    for values in reader:
        line = header_line + reader.line_num
        if not values:
            continue
        if len(values) != len(columns):
            raise TraceError(path, line, ",".join(values), f"{len(columns)} columns: {','.join(columns)}")
        yield line, dict(zip(columns, values, strict=True))


def field(
    path: Path, line: int, row: Mapping[str, object], name: str, parse: Callable[[object], _Parsed]
) -> _Parsed:
    """`parse(row[name])`, its ValueError made a TraceError that knows the place."""
    try:
        return parse(row[name])
    except ValueError as error:
        raise TraceError(path, line, row[name], f"{name}: {error}") from None


def number(value: object) -> float:
    """A finite number from CSV text or JSON; ValueError says what was expected."""
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool) and "_" not in str(value):
            parsed = float(value)
            if math.isfinite(parsed):
                return parsed
    except (ValueError, OverflowError):
        pass
    raise ValueError("a finite number")


def whole(value: object) -> int:
    """A whole number of tokens from CSV text or JSON; ValueError says what was expected."""
    text = value.strip() if isinstance(value, str) else str(value) if type(value) is int else ""
    if text.isascii() and text.isdigit() and len(text) <= 18 and int(text) >= 1:
        return int(text)
    raise ValueError("a whole number >= 1")


# The formats.


class _Row(NamedTuple):
    """A request as the file has it: its arrival counts from wherever the file starts counting."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    session_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _CsvFormat:
    """Which columns of a CSV hold what."""

    arrival: str
    input_tokens: str
    output_tokens: str
    session_id: str
    parse_arrival_s: Callable[[object], float]
    zero_output_is_failure: bool = False


def _instant_s(value: object) -> float:
    """Seconds since 1970 of a time stamp such as '2023-11-16 18:17:03.9799600', with or without an offset."""
    try:
        instant = datetime.fromisoformat(str(value))
    except ValueError:
        raise ValueError("a time stamp like 2023-11-16 18:17:03.9799600") from None
    # Without an offset it is UTC: the machine's own zone could put a summer-time jump into the trace.
    return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp()


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
        parse_arrival_s=number,
        zero_output_is_failure=True,
    ),
    _CsvFormat(
        arrival="arrival_s",
        input_tokens="input_tokens",
        output_tokens="output_tokens",
        session_id="session_id",
        parse_arrival_s=number,
    ),
)
_MOONCAKE_KEYS = ("timestamp", "input_length", "output_length")
_KNOWN_FORMATS = (
    "a CSV header with "
    + " or ".join(",".join((f.arrival, f.input_tokens, f.output_tokens)) for f in _CSV_FORMATS)
    + " or JSON lines with "
    + ", ".join(_MOONCAKE_KEYS)
)
# Prompt and answer: DistServe's and vLLM's ShareGPT samples; microsoft/vidur's processed traces.
_LENGTH_COLUMNS = (("prompt_len", "output_len"), ("num_prefill_tokens", "num_decode_tokens"))
_KNOWN_LENGTHS = "a CSV header with " + " or ".join(",".join(columns) for columns in _LENGTH_COLUMNS)
# What has no arrivals or no lengths is an argument of a synthetic workload.
_OTHER_FILES = {
    "prompt_len": "arrivals, too; lengths alone are for poisson:rate=4,count=1000,lengths=FILE",
    "rate_rps": "requests; rates alone are for servegen:rates=FILE,duration=600,input=512,output=128",
}


def _open_text(path: Path) -> TextIO:
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    # utf-8-sig: spreadsheets put a byte order mark before the header
    if is_gzip:
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _trace_rows(path: Path, text: TextIO) -> Iterator[tuple[int, _Row]]:
    """(line number, row) of every request in the file; none for a file of blank lines."""
    yield from _rows_after(path, *first_line(text), text)


def _rows_after(path: Path, line: int, first: str, text: TextIO) -> Iterator[tuple[int, _Row]]:
    if first:
        read = _mooncake_rows if first.lstrip().startswith("{") else _csv_rows
        yield from read(path, line, first, text)


def _length_rows(path: Path, text: TextIO) -> Iterator[tuple[int, tuple[int, int]]]:
    header_line, first = first_line(text)
    columns = csv_columns(first)
    for prompt, answer in _LENGTH_COLUMNS:
        if {prompt, answer} <= set(columns):
            for line, record in csv_records(path, header_line, first, text):
                yield (
                    line,
                    (field(path, line, record, prompt, whole), field(path, line, record, answer, whole)),
                )
            return
    for line, row in _rows_after(path, header_line, first, text):
        yield line, (row.input_tokens, row.output_tokens)


def _csv_rows(path: Path, header_line: int, header: str, text: TextIO) -> Iterator[tuple[int, _Row]]:
    columns = csv_columns(header)
    for layout in _CSV_FORMATS:
        if {layout.arrival, layout.input_tokens, layout.output_tokens} <= set(columns):
            break
    else:
        hints = [hint for column, hint in _OTHER_FILES.items() if column in columns]
        raise TraceError(path, header_line, header.strip(), hints[0] if hints else _KNOWN_FORMATS)
    for line, row in csv_records(path, header_line, header, text):
        if layout.zero_output_is_failure and row[layout.output_tokens].strip() == "0":
            continue  # the source got no answer: there is no length to ask for
        arrival_s = field(path, line, row, layout.arrival, layout.parse_arrival_s)
        input_tokens = field(path, line, row, layout.input_tokens, whole)
        output_tokens = field(path, line, row, layout.output_tokens, whole)
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
        arrival_s=field(path, line, row, "timestamp", number) / 1000,
        input_tokens=field(path, line, row, "input_length", whole),
        output_tokens=field(path, line, row, "output_length", whole),
        hash_ids=field(path, line, {"hash_ids": row.get("hash_ids", [])}, "hash_ids", _hash_ids),
        session_id=None if session_id is None else str(session_id),
    )


def _hash_ids(value: object) -> tuple[int, ...]:
    if isinstance(value, list) and all(type(hash_id) is int and hash_id >= 0 for hash_id in value):
        return tuple(value)
    raise ValueError("a list of whole numbers >= 0")
