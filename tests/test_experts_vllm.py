"""Instances that share the experts of a model, for real: one prefills, a group of two decodes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster import vllm_api
from cluster.spec import ClusterSpec
from cluster.vllm_cpu_experts import own_experts
from cluster.vllm_kv_events import VllmKvEvents
from deploy.status import fetch_status, read_metric
from deploy.tiny_model_torch import build_tiny_model
from tests.test_parallel_vllm import greedy_at, parallel_spec

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(400)]

PORT = 18219


def experts_spec(model: Path) -> ClusterSpec:
    spec = parallel_spec(model)
    return spec.model_copy(
        update={
            "name": "experts",
            "decode": spec.decode.model_copy(
                update={"tensor_parallel_size": 1, "data_parallel_size": 2, "count": 2}
            ),
            "ingress": spec.ingress.model_copy(update={"port": PORT}),
        }
    )


def test_experts_of_other_ranks_weigh_nothing() -> None:
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    own_weights, own_ids = own_experts(
        weights, torch.tensor([[0, 3], [2, 1]], dtype=torch.int32), torch.tensor([-1, -1, 0, 1])
    )
    assert own_weights.tolist() == [[0.0, 0.25], [0.5, 0.0]]
    assert own_ids.tolist() == [[0, 1], [0, 0]]
    assert own_ids.dtype == torch.int32


async def test_a_rank_of_a_group_tells_of_its_prefix_cache() -> None:
    """vLLM gives each rank an endpoint of its own, and listens only at some of them."""
    events = VllmKvEvents({"data_parallel_rank": 1})
    events.open()
    publisher = vllm_api.EventPublisherFactory.create(events.config, data_parallel_rank=1)
    stored = vllm_api.BlockStored(
        block_hashes=[b"%d" % n for n in range(64)], parent_block_hash=None, token_ids=list(range(1024)),
        block_size=16, lora_id=None,
        medium="GPU", lora_name=None,
    )  # fmt: skip
    try:
        async with asyncio.timeout(10.0):
            changes = asyncio.create_task(events.changes())
            while not changes.done():  # what is published before they have met is lost
                publisher.publish(vllm_api.KVEventBatch(ts=0.0, events=[stored]))
                await asyncio.sleep(0.05)
        assert (await changes).stored
    finally:
        publisher.shutdown()
        events.close()


def wait_for(condition: Callable[[], Any], deadline_s: float) -> Any:
    end_s = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end_s, "it did not come true"
        time.sleep(0.2)
    return found


def test_a_group_decodes_what_another_instance_prefilled(tmp_path: Path) -> None:
    from deploy.ray_up import serving

    with serving(experts_spec(build_tiny_model(tmp_path / "tiny", experts=True)), say=print) as url:
        greedy = greedy_at(url)

        def decodes() -> dict[str, Any]:
            return {
                one["instance_id"]: one
                for one in fetch_status(url)["instances"]
                if one["role"] == "decode" and one["state"] == "ready"
            }

        prompts = [
            [(length + i * 37) % 3000 + 100 for i in range(length)] for length in (1, 127, 128, 129, 200, 700)
        ]
        whole = [greedy(prompt, "whole", vllm_xargs={"pdserve_unsplit": 1}) for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as several:
            assert list(several.map(greedy, prompts, repeat("split"))) == whole
        for engine in (1, 2):
            assert read_metric(url, f'vllm:generation_tokens_total{{engine="{engine}"') > 0
        assert read_metric(url, "pdserve_kv_tokens_moved_total") > 0
        assert read_metric(url, "pdserve_kv_tokens_recomputed_total") == 0

        # One can't go on without the other: both start again, and serve.
        before = decodes()
        assert len(before) == 2
        first = psutil.Process(before["decode-0"]["pid"])
        processes = first.children(recursive=True)  # the coordinator of the group among them
        assert len(processes) >= 3
        os.kill(first.pid, signal.SIGKILL)
        wait_for(
            lambda: (
                len(now := decodes()) == 2
                and all(now[name]["incarnation"] != before[name]["incarnation"] for name in now)
            ),
            120.0,
        )
        assert greedy(prompts[-1], "again") == whole[-1]
        assert psutil.wait_procs(processes, 5)[1] == []
