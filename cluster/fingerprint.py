"""Fingerprint of a checkpoint: two instances with equal fingerprints hold the same model."""

from __future__ import annotations

import hashlib
from pathlib import Path

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")
# Of all files, and of each at least: a large model has hundreds, on a file system that is far away.
_SAMPLES, _LEAST_SAMPLES, _SAMPLE_BYTES = 256, 2, 4096
_HEAD_BYTES = 1 << 16


def model_fingerprint(model: str) -> str:
    """16 hex digits over a checkpoint: its `config.json` and the name, size, head and samples of each weight
    file.

    The first 64 KiB of a safetensors file hold its table of tensors; the samples tell a model from another of
    the same shape, as one that was trained further. A hub name that is no directory counts as itself.
    """
    digest = hashlib.sha256()
    directory = Path(model)
    if not directory.is_dir():
        digest.update(model.encode())
        return digest.hexdigest()[:16]
    config = directory / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    files = sorted(p for p in directory.iterdir() if p.suffix in _WEIGHTS)
    samples = max(_LEAST_SAMPLES, _SAMPLES // max(1, len(files)))
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as weights:
            digest.update(weights.read(_HEAD_BYTES))
            for sample in range(samples):
                weights.seek(path.stat().st_size * sample // samples)
                digest.update(weights.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
