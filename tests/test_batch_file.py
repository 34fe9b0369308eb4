"""Reading a batch's input: every error has its line."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.batch_file import (
    BLOCK_CHARS,
    NAME_BYTES,
    BadLine,
    Line,
    block_names,
    custom_ids,
    parse_line,
    prompt_text,
    read_lines,
)

CHAT = "/v1/chat/completions"


def line(custom_id: object = "a", **keys: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 7}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | keys


def read(*lines: object, most: int = 100) -> list[Line | BadLine | None]:
    raw = b"".join(one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in lines)
    return list(read_lines(io.BytesIO(raw), CHAT, most))


def test_a_good_line_says_where_it_is_and_how_long_it_will_take() -> None:
    first, empty, second = read(line("a"), b"  \n", line("b", body={"messages": [], "max_tokens": 9, "n": 3}))
    assert isinstance(first, Line)
    assert isinstance(second, Line)
    assert empty is None
    assert (first.number, first.offset, first.output_tokens) == (1, 0, 7)
    assert (second.number, second.offset, second.output_tokens) == (3, first.size + 3, 27)
    assert first.input_tokens == len("user:Hello") / 4


@pytest.mark.parametrize(
    ("bad", "code", "says"),
    [
        (b"{nonsense\n", "invalid_json_line", "not JSON"),
        (b"\xff\xfe\n", "invalid_json_line", "not JSON"),
        ([1], "invalid_json_line", "not a JSON object"),
        (line(None), "invalid_custom_id", "custom_id is to be a text"),
        ({"url": CHAT, "body": {}}, "invalid_custom_id", "missing"),
        (line("x" * 513), "invalid_custom_id", "1 to 512 characters"),
        (line(method="GET"), "invalid_method", "'GET' is not POST"),
        (line(url="/v1/completions"), "invalid_url", f"not the batch's endpoint {CHAT}"),
        (line(body="hello"), "invalid_body", "JSON object"),
        (line(body={"stream": True}), "invalid_body", "no streams"),
        (line("first"), "duplicate_custom_id", "'first' is that of line 1"),
    ],
)
def test_a_bad_line_is_told_with_its_number(bad: object, code: str, says: str) -> None:
    first, second, third = read(line("first"), bad, line("third"))
    assert isinstance(first, Line)
    assert isinstance(third, Line)
    assert isinstance(second, BadLine)
    assert (second.code, second.line) == (code, 2)
    assert second.message.startswith("line 2: ")
    assert says in second.message


def test_a_file_may_be_bad_as_a_whole() -> None:
    assert read(b"\n") == [None, BadLine("empty_file", "the file has no requests", None)]
    found = read(line("a"), b"bad\n", line("c"), line("d"), most=2)
    assert [type(one) for one in found] == [Line, BadLine, BadLine]
    assert found[-1] == BadLine("too_many_tasks", "a batch has at most 2 requests", None)


def test_the_custom_ids_of_the_good_lines() -> None:
    raw = json.dumps(line("a")).encode() + b"\nbad\n" + json.dumps(line("c")).encode() + b"\n"
    assert list(custom_ids(io.BytesIO(raw), CHAT)) == [(1, "a"), (3, "c")]
    assert parse_line(raw.splitlines()[0], CHAT).body["max_tokens"] == 7


@pytest.mark.parametrize(
    ("body", "begins"),
    [
        (
            {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]},
            "system:S\x1euser:U",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "T"}]}]},
            'user:[{"type": "text"',
        ),
        (
            {"tools": [{"type": "function"}], "messages": [{"role": "user", "content": "U"}]},
            '[{"type": "function"}]',
        ),
        ({"prompt": "P"}, "P"),
        ({"prompt": [1, 2]}, "1\x1e2"),
        ({"prompt": ["P", "Q"]}, "P\x1eQ"),
        ({"instructions": "I", "input": "U"}, "I\x1eU"),
        ({"messages": ["nonsense"]}, '"nonsense"'),
        ({"messages": 3, "prompt": None}, ""),
    ],
)
def test_the_prompt_in_the_order_of_templates(body: dict[str, Any], begins: str) -> None:
    assert prompt_text(body).startswith(begins)


@given(st.text(max_size=3), st.text(max_size=600), st.text(max_size=600))
def test_names_are_equal_as_far_as_blocks_are(head: str, one: str, other: str) -> None:
    head = (head * BLOCK_CHARS)[: 2 * BLOCK_CHARS]
    names = [block_names(head + rest) for rest in (one, other)]
    shared = len(head) // BLOCK_CHARS * NAME_BYTES
    assert names[0][:shared] == names[1][:shared]
    assert (names[0] == names[1]) == (one == other)


def test_half_a_character_is_no_reason_to_fail() -> None:
    assert block_names(json.loads('"\\ud800"'))


def test_nesting_without_end_is_a_bad_line_and_a_huge_number_is_none() -> None:
    nested = b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"
    (bad,) = [
        one for one in read_lines(io.BytesIO(nested), "/v1/completions", 10) if isinstance(one, BadLine)
    ]
    assert bad.code == "invalid_json_line"
    (good,) = [one for one in read(line(body={"max_tokens": 10**400})) if isinstance(one, Line)]
    assert float(good.output_tokens) < 1e9


def test_a_line_that_is_too_long_is_bad_and_the_next_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.batch_file.MOST_LINE_BYTES", 200)
    good = line("z")
    size = len(json.dumps(good)) + 1
    for extra in (150, 200, 201, 250, 400, 1000):
        long = json.dumps(line("long", pad="x" * extra)).encode() + b"\n"
        bad, last = read(long, good)
        assert isinstance(bad, BadLine)
        assert (bad.code, bad.line) == ("line_too_long", 1)
        assert isinstance(last, Line)
        assert (last.number, last.offset, last.size) == (2, len(long), size)
        raw = io.BytesIO(long + json.dumps(good).encode())
        assert list(custom_ids(raw, CHAT)) == [(2, "z")]
    # One without an end.
    (bad,) = read(json.dumps(line("long", pad="x" * 500)).encode())
    assert isinstance(bad, BadLine)
    assert bad.code == "line_too_long"


def test_what_is_wrong_is_not_sent_back_whole() -> None:
    (bad,) = read(line(url="x" * 10_000))
    assert isinstance(bad, BadLine)
    assert len(bad.message) < 300
