"""Which model a checkpoint is."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.fingerprint import model_fingerprint


def checkpoint(directory: Path, weights: bytes, config: str = "{}") -> str:
    directory.mkdir()
    (directory / "config.json").write_text(config)
    (directory / "model.safetensors").write_bytes(weights)
    return model_fingerprint(str(directory))


@pytest.mark.parametrize("size", [10, 100_000, 3_000_000])
def test_a_model_that_was_trained_further_is_another(tmp_path: Path, size: int) -> None:
    """Of the same shape, so with the same table of tensors at the head of its file."""
    head = b"h" * (1 << 16)
    first = checkpoint(tmp_path / "a", head + b"1" * size)
    assert checkpoint(tmp_path / "b", head + b"1" * size) == first
    assert checkpoint(tmp_path / "c", head + b"2" * size) != first
    assert checkpoint(tmp_path / "d", head + b"1" * size, '{"a": 1}') != first


def test_a_name_on_a_hub_counts_as_itself() -> None:
    assert model_fingerprint("org/a") == model_fingerprint("org/a") != model_fingerprint("org/b")
