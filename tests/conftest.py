"""Fixtures for all tests, and the check that a test leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

# Before vLLM is imported anywhere: the first request with logprobs otherwise compiles for half a minute.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
async def no_task_left(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """After an async test, no task may be pending."""
    before = asyncio.all_tasks()
    yield
    await asyncio.sleep(0)
    left = {task for task in asyncio.all_tasks() - before if not task.done()} - {asyncio.current_task()}
    names = sorted(task.get_name() for task in left)
    assert not names, f"tasks left behind: {names}"
