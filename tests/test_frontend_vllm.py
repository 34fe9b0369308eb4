"""Our side of vLLM's types: the table of names, the wire's prefixes, what a hop asks of an engine."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgspec
import pytest

from cluster import vllm_api, wire
from cluster.request import Handoff, ServeRequest
from cluster.wire import KEEP_PARAM
from router.hop import Hop, HopKind
from router.sampling import UNSPLIT, handoff_of, needs_seed
from router.vllm_frontend import hop_request

pytestmark = pytest.mark.vllm

PROMPT = [5, 6, 7, 8]


@pytest.mark.parametrize("name", vllm_api._HOME)
def test_every_name_of_the_table_exists(name: str) -> None:
    assert getattr(vllm_api, name) is not None


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (wire.TokenRequest, "EngineCoreRequest"),
        (wire.TokenOutput, "EngineCoreOutput"),
        (wire.StepOutputs, "EngineCoreOutputs"),
    ],
)
def test_the_wire_is_a_positional_prefix_of_vllms(ours: type, theirs: str) -> None:
    fields = getattr(vllm_api, theirs).__struct_fields__
    assert fields[: len(ours.__struct_fields__)] == ours.__struct_fields__


def test_what_a_twin_sends_decodes_as_vllms() -> None:
    sent = wire.StepOutputs(
        outputs=[
            wire.TokenOutput(
                request_id="r",
                new_token_ids=[1, 2],
                finish_reason=wire.FINISH_LENGTH,
                kv_transfer_params={"a": 1},
                prefill_stats=wire.PrefillCounts(num_prompt_tokens=9, num_external_cached_tokens=4),
            )
        ]
    )
    step = vllm_api.MsgpackDecoder(vllm_api.EngineCoreOutputs).decode([msgspec.msgpack.encode(sent)])
    output = step.outputs[0]
    assert (output.request_id, output.new_token_ids, output.kv_transfer_params) == ("r", [1, 2], {"a": 1})
    assert output.finish_reason is vllm_api.FinishReason.LENGTH
    assert output.prefill_stats.num_external_cached_tokens == 4


def test_the_finish_reasons_are_vllms() -> None:
    reasons = vllm_api.FinishReason
    assert (wire.FINISH_STOP, wire.FINISH_LENGTH, wire.FINISH_ABORT, wire.FINISH_ERROR) == (
        reasons.STOP,
        reasons.LENGTH,
        reasons.ABORT,
        reasons.ERROR,
    )


@pytest.mark.parametrize(
    ("arguments", "handoff"),
    [
        ({}, Handoff.TOKENS),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1}, Handoff.TOKENS),
        ({"repetition_penalty": 1.3, "min_tokens": 8, "logit_bias": {5: 1.0}}, Handoff.TOKENS),
        ({"stop_token_ids": [4], "logprobs": 3, "prompt_logprobs": 1}, Handoff.TOKENS),
        ({"seed": 4}, Handoff.KV_ONLY),
        ({"presence_penalty": 0.5}, Handoff.KV_ONLY),
        ({"frequency_penalty": 0.5}, Handoff.KV_ONLY),
        ({"bad_words": ["x"]}, Handoff.KV_ONLY),
        ({"seed": 4, "prompt_logprobs": 1}, Handoff.NOTHING),
        ({"extra_args": {UNSPLIT: 1}}, Handoff.NOTHING),
    ],
)
def test_what_may_change_engines(arguments: dict[str, Any], handoff: Handoff) -> None:
    assert handoff_of(vllm_api.SamplingParams(**arguments)) is handoff


def test_a_sampler_with_state_gets_a_seed_unless_it_is_greedy_or_has_one() -> None:
    def seeded(**arguments: Any) -> bool:
        params = vllm_api.SamplingParams(**arguments)
        return needs_seed(params, handoff_of(params))

    assert seeded(temperature=1.0, presence_penalty=1.0)
    assert not seeded(temperature=0.0, presence_penalty=1.0)
    assert not seeded(temperature=1.0, seed=3)
    assert not seeded(temperature=1.0)


def original(**arguments: Any) -> Any:
    return vllm_api.EngineCoreRequest(
        request_id="r",
        prompt_token_ids=PROMPT,
        mm_features=None,
        sampling_params=vllm_api.SamplingParams(max_tokens=20, **arguments),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt="salt",
        data_parallel_rank=None,
        priority=3,
        external_req_id="client-id",
    )


async def hop(kind: HopKind, sent: list[int], *, carries: bool = True, source: Hop | None = None) -> Hop:
    request = ServeRequest(
        request_id="r",
        prompt_token_ids=PROMPT,
        max_tokens=20,
        handoff=Handoff.TOKENS if carries else Handoff.KV_ONLY,
        priority=4,
    )
    return Hop(
        hop_id="r~1",
        instance_id="decode-0",
        kind=kind,
        request=request,
        prompt_token_ids=PROMPT + sent if carries else PROMPT,
        generated=sent,
        max_tokens=1 if kind is HopKind.PREFILL else 20 - len(sent),
        deliver=kind is not HopKind.PREFILL or carries,
        swallow=0 if carries else len(sent),
        source=source,
    )


async def test_a_hop_says_how_long_its_blocks_are_worth_keeping() -> None:
    one = await hop(HopKind.PREFILL, [])
    assert KEEP_PARAM not in hop_request(original(), one).sampling_params.extra_args
    one.keep_s = 2.5
    assert hop_request(original(), one).sampling_params.extra_args[KEEP_PARAM] == 2.5


async def test_a_prefill_hop_asks_for_one_token_and_keeps_its_blocks() -> None:
    client = original(temperature=0.5, min_tokens=6, logprobs=2, prompt_logprobs=1, stop_token_ids=[9])
    request = hop_request(client, await hop(HopKind.PREFILL, []))
    params = request.sampling_params
    assert request.request_id == "r~1"
    assert (params.max_tokens, params.min_tokens, params.logprobs, params.prompt_logprobs) == (1, 1, 2, 1)
    assert params.extra_args["kv_transfer_params"]["do_remote_decode"]
    # What the router has made of the client's priority and its class's.
    assert (request.cache_salt, request.priority) == ("salt", 4)
    # The client's own request is as it was: the next hop starts from it again.
    assert (client.request_id, client.sampling_params.max_tokens, client.sampling_params.extra_args) == (
        "r",
        20,
        None,
    )


async def test_a_token_for_nobody_is_sampled_the_cheapest_way() -> None:
    client = original(temperature=0.5, seed=1, presence_penalty=1.0, logprobs=2)
    params = hop_request(client, await hop(HopKind.PREFILL, [], carries=False)).sampling_params
    assert (params.temperature, params.seed, params.presence_penalty, params.logprobs) == (0, None, 0, None)
    assert params.ignore_eos


async def test_a_decode_hop_asks_for_the_rest() -> None:
    source = await hop(HopKind.PREFILL, [])
    source.handle = wire_handle()
    request = hop_request(
        original(min_tokens=6, prompt_logprobs=1), await hop(HopKind.DECODE, [11], source=source)
    )
    params = request.sampling_params
    assert request.prompt_token_ids == [*PROMPT, 11]
    assert (params.max_tokens, params.min_tokens, params.prompt_logprobs) == (19, 5, None)
    assert not params.skip_reading_prefix_cache  # else the engine computes the prompt that it was sent
    assert params.extra_args["kv_transfer_params"]["do_remote_prefill"]


def wire_handle() -> Any:
    from cluster.handle import handle_of

    return handle_of(
        {
            "do_remote_prefill": True,
            "remote_block_ids": [[1]],
            "remote_request_id": "r~1",
            "remote_num_tokens": len(PROMPT),
        }
    )


def test_the_counts_we_read_are_vllms() -> None:
    from vllm.v1.metrics.stats import PrefillStats

    names = {f.name for f in dataclasses.fields(PrefillStats)}
    assert set(wire.PrefillCounts.__struct_fields__) <= names
