"""On CPUs, let a process that waits for another one's message sleep between two looks.

vLLM's ranks and engine cores look for messages without a pause for a second after each, and an engine that
waits for KV, or keeps it, sends them a thousand a second. On a GPU's host they have a core each. On CPUs the
thread that looks is the one that computes, bound to a core: threads of its process have the same one, and
hardly ever get it, nor the interpreter. A first handshake between two engines then took 20 s, or minutes.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from cluster import vllm_api

PAUSE_S = 20e-6


def sleep_between_looks() -> None:
    """For this process."""
    home: Any = sys.modules[vllm_api.SpinCondition.__module__]
    home.sched_yield = _pause


def _pause() -> None:
    time.sleep(PAUSE_S)
