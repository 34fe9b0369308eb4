"""A long prompt is sent to its decode instance while it is computed."""

from __future__ import annotations

import asyncio

import pytest

from cluster.handle import FOLLOWER_PARAM, FOLLOWS_PARAM, follow
from cluster.request import Handoff
from router.hop import HopKind
from tests.twins import TwinCluster, expected_tokens, until

PROMPT = list(range(100, 140))
CHUNK = 16


@pytest.mark.parametrize("handoff", [Handoff.TOKENS, Handoff.KV_ONLY])
async def test_the_tokens_are_those_of_one_engine(handoff: Handoff) -> None:
    cluster = TwinCluster("prefill-0", "decode-0", chunk=CHUNK)
    cluster.submit("r", PROMPT, 9, handoff)
    await until(lambda: cluster.instances["decode-0"].sent)
    prefill, decode = (cluster.instances[i] for i in ("prefill-0", "decode-0"))
    (hop,) = decode.sent
    assert hop.kind is HopKind.DECODE
    assert hop.follows == len(PROMPT) - (handoff is Handoff.KV_ONLY)
    assert hop.kv_params == follow(hop.follows)
    await until(lambda: prefill.sent)
    assert prefill.sent[0].kv_params[FOLLOWER_PARAM] == ("twin", hop.hop_id)
    assert FOLLOWS_PARAM not in prefill.sent[0].kv_params
    assert not decode.tasks  # it waits
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 9)
    (word,) = decode.gone_on
    assert word.token_ids == (expected_tokens(PROMPT, 1) if handoff is Handoff.TOKENS else [])
    assert word.kv_params["remote_request_id"] == prefill.sent[0].hop_id
    assert cluster.metrics.kv_tokens_moved._value.get() == hop.source.handle.tokens
    cluster.assert_nothing_held()


async def test_a_prompt_that_is_computed_at_once_is_not_followed() -> None:
    cluster = TwinCluster("prefill-0", "decode-0", chunk=len(PROMPT))
    cluster.submit("r", PROMPT, 9)
    await cluster.settle()
    assert not cluster.instances["decode-0"].gone_on
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 9)


async def test_the_second_engine_is_asked_for_one_token_less() -> None:
    cluster = TwinCluster("prefill-0", "decode-0", chunk=CHUNK)
    cluster.submit("r", PROMPT, 2)
    await cluster.settle()
    assert cluster.instances["decode-0"].sent[0].max_tokens == 1
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 2)


async def test_a_client_that_leaves_during_prefill_frees_both() -> None:
    cluster = TwinCluster("prefill-0", "decode-0", chunk=CHUNK)
    cluster.instances["prefill-0"].stalls_at = 0
    cluster.submit("r", PROMPT, 9)
    await until(lambda: cluster.instances["prefill-0"].tasks)
    assert cluster.instances["decode-0"].following
    cluster.router.abort(["r"])
    await cluster.settle()
    cluster.assert_nothing_held()


@pytest.mark.parametrize("dies", ["prefill-0", "decode-0"])
async def test_either_side_dies_during_prefill(dies: str) -> None:
    cluster = TwinCluster("prefill-0", "decode-0", "prefill-1", "decode-1", chunk=CHUNK)
    cluster.instances["prefill-0"].stalls_at = 0
    cluster.submit("r", PROMPT, 9)
    await until(lambda: cluster.instances["prefill-0"].tasks)
    assert cluster.instances["decode-0"].following
    cluster.instances[dies].kill()
    if dies == "decode-0":  # its prompt goes on; then it is found out
        twin = cluster.instances["prefill-0"]
        twin.abort(list(twin.tasks))
        twin.stalls_at = 1 << 30
        twin.tasks[twin.sent[0].hop_id] = asyncio.create_task(twin._run(twin.sent[0]))
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 9)
    cluster.assert_nothing_held()


async def test_who_is_refused_by_prefill_is_taken_back_at_decode() -> None:
    cluster = TwinCluster("prefill-0", "prefill-1", "decode-0", chunk=CHUNK)
    cluster.instances["prefill-0"].waits_s = [5.0]
    cluster.submit("r", PROMPT, 9)
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 9)
    assert len(cluster.instances["decode-0"].sent) == 2
    assert len(cluster.instances["decode-0"].gone_on) == 1
    cluster.assert_nothing_held()
