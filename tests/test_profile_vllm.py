"""A real vLLM engine on the CPU, profiled on a grid of a few points: structure and sanity, no timing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.latency import Batch, ProfiledLatency, load_profile
from deploy.tiny_model_torch import build_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """\
import argparse, sys
from deploy.profiler.command import add_profile
parser = argparse.ArgumentParser()
add_profile(parser.add_subparsers())
args = parser.parse_args(sys.argv[1:])
sys.exit(args.run(args))
"""


def test_a_real_engine_is_profiled(tmp_path: Path) -> None:
    """In a process of its own, for the environment that the engine sets."""
    model, out = build_tiny_model(tmp_path / "tiny"), tmp_path / "profile.json"
    words = ["--spec", "deploy/specs/cpu.yaml", "--model", str(model), "--role", "prefill", "--out", str(out)]
    limits = ["--max-prompt", "256", "--max-concurrency", "4", "--seconds", "1"]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "profile", *words, *limits],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    # Only the table, whatever vLLM prints.
    assert done.stdout.startswith("tiny (bfloat16) on ")
    assert "INFO" not in done.stdout
    profile = load_profile(out)
    assert profile.versions["torch"]
    assert profile.region["decode_requests"] == 4
    assert profile.region["prefill_tokens"] >= 4 * 256
    assert {"prefill, held out", "decode, held out", "mixed, held out"} == set(profile.residuals)
    latency = ProfiledLatency(profile)
    short = latency.iteration_s(Batch(16, 16**2, 1))
    long = latency.iteration_s(Batch(1024, 4 * 256**2, 4))
    decode = latency.iteration_s(Batch(decode_requests=4, decode_context_tokens=400))
    assert 0 < short < long < 60
    assert 0 < decode < 60
