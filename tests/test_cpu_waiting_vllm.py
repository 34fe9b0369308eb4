"""Processes of an engine on CPUs that wait for each other leave their core to others."""

from __future__ import annotations

import sys
import time

import pytest
import zmq

from cluster import vllm_api
from cluster.vllm_cpu_waiting import PAUSE_S, sleep_between_looks

pytestmark = pytest.mark.vllm

LOOKS = 500


def test_who_looks_for_a_message_sleeps_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of vLLM's own waiting, for someone who has just read one."""
    home = sys.modules[vllm_api.SpinCondition.__module__]
    monkeypatch.setattr(home, "sched_yield", home.sched_yield)  # back as it was, for other tests
    sleep_between_looks()
    context = zmq.Context()
    try:
        reader = vllm_api.SpinCondition(True, context, "tcp://127.0.0.1:9")
        reader.busy_loop_s = 60.0
        reader.record_read()
        began_s = time.monotonic()
        for _ in range(LOOKS):
            reader.wait()
        assert time.monotonic() - began_s >= LOOKS * PAUSE_S
    finally:
        context.destroy(linger=0)
