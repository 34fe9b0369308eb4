"""Where batches are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.batch_spec import BatchSpec
from cluster.errors import SpecError
from cluster.spec import parse_spec


def test_the_directory_is_the_users_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/u")
    assert BatchSpec().path("chat") == Path("/var/cache/u/pdserve/batches/chat")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/u")
    assert BatchSpec().path("chat") == Path("/home/u/.cache/pdserve/batches/chat")
    assert BatchSpec(directory="/shared/b").path("chat") == Path("/shared/b")


def test_it_is_a_part_of_the_spec() -> None:
    assert parse_spec({"model": "m", "batch": {"most_at_once": 3}}).batch.most_at_once == 3
    with pytest.raises(SpecError, match=r"batch\.most_at_once"):
        parse_spec({"model": "m", "batch": {"most_at_once": 0}})
