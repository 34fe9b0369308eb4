"""Trials on a Ray cluster: the same plan to the byte."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

# In processes of their own: Ray stays in the one that began it.
PLAN = """
import sys
from deploy.cli import main
words = "plan --model llama-3-8b --gpu h100 --gpus-total 2 --isl 3000 --osl 4 --rate 5 --parts 1 --json"
sys.exit(main([*words.split(), "--ttft", "400", "--tpot", "50", *sys.argv[1:]]))
"""


def test_the_plan_is_the_same_to_the_byte() -> None:
    here, there = (
        subprocess.run(
            [sys.executable, "-c", PLAN, *where], capture_output=True, text=True, timeout=200, check=True
        )
        for where in (["--jobs", "1"], ["--ray", "local"])
    )
    assert here.stdout.startswith("{")
    assert there.stdout == here.stdout
