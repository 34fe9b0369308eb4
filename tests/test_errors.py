from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import errors
from cluster.engine import EngineDied
from cluster.errors import ServingError

FACTS: dict[str, Any] = {
    "file": "f", "path": "p", "value": 1, "allowed": "a", "problem": "p", "remedy": "r", "ours": 1,
    "theirs": 2, "known": ("decode-0",), "instance": "decode-0", "role": "decode", "detail": "d",
    "stage": "decode",
    "deadline_s": 1.5, "position": 3, "part": "decode-0", "bad_spec": True, "request_id": "r", "held": "h",
    "transport": "nixl",
    "ttft_s": 2.0, "tpot_s": 0.1, "ttft_bound_s": 1.0, "tpot_bound_s": 0.2, "retry_after_s": 3,
    "header": "x", "why": "w", "limit_s": 0.7, "wait_s": 0.5, "chance": 0.4, "harm": 0.6,
    "waited_s": 3.0, "bound_s": 1.0, "request": "r", "asked": 2,
    "kind": "file", "name": "n", "batch": "b", "status": "failed", "param": "p", "bytes": 5, "most_bytes": 4,
    "now_s": 1.0, "waiting": ["main in f"], "callbacks": 3, "last": "l", "source": "a", "target": "b",
}  # fmt: skip


def kinds(base: type[ServingError] = ServingError) -> Iterator[type[ServingError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


def example(kind: type[ServingError]) -> ServingError:
    names = [name for name in kind.__annotations__ if name in FACTS]
    return kind(**{name: FACTS[name] for name in names})


@pytest.mark.parametrize("kind", sorted(set(kinds()) | {EngineDied}, key=lambda k: k.__name__))
def test_an_error_survives_pickling_with_its_facts(kind: type[ServingError]) -> None:
    error = example(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.facts == error.facts
    assert str(again) == str(error) != ""
    assert "\n" not in str(error)


def test_facts_are_attributes() -> None:
    error = errors.StageTimeout(stage="transfer", instance="decode-0", deadline_s=30.0)
    assert (error.stage, error.instance, error.deadline_s) == ("transfer", "decode-0", 30.0)
    assert str(error) == "stage transfer on decode-0 made no progress for 30 s"
