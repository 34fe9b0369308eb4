"""The state machine of a request, on twins: every exit gives back what it held."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import (
    Draining,
    EngineFailure,
    NoInstance,
    Rejected,
    ReplayDiverged,
    StageTimeout,
    TooLate,
)
from cluster.request import Handoff, ServeRequest, Slo
from cluster.spec import DeadlineSpec
from router.hop import HopKind
from router.policy import Decision
from tests.twins import TwinCluster, expected_tokens, until

PROMPT = list(range(100, 140))
QUICK = DeadlineSpec(prefill_s=0.05, transfer_s=0.05, stall_s=0.05)


@pytest.mark.parametrize("handoff", list(Handoff))
async def test_a_request_gets_the_tokens_of_one_engine(handoff: Handoff) -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.submit("r", PROMPT, 20, handoff)
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 20)
    assert cluster.finished == {"r"}
    assert cluster.forgotten == ["r"]
    cluster.assert_nothing_held()


async def test_the_first_token_comes_from_prefill() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.instances["decode-0"].stalls_at = 0
    cluster.submit("r", PROMPT, 20)
    await until(lambda: cluster.instances["decode-0"].sent)
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 1)
    assert not cluster.finished
    cluster.router.abort(["r"])
    await cluster.settle()


async def test_a_stateful_sampler_gets_all_its_tokens_from_the_decode_instance() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.submit("r", PROMPT, 5, Handoff.KV_ONLY)
    await cluster.settle()
    prefill, decode = (cluster.instances[i].sent[0] for i in ("prefill-0", "decode-0"))
    assert not prefill.deliver
    assert prefill.prompt_token_ids == PROMPT[:-1]
    assert decode.prompt_token_ids == PROMPT
    assert decode.max_tokens == 5
    # The statistics shown are of the engine that computed the prompt, not of the one that read it.
    assert cluster.first_outputs["r"].prefill_stats.num_external_cached_tokens == 0
    assert decode.stats.num_external_cached_tokens == len(PROMPT) - 1


async def test_one_token_needs_no_decode() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.submit("r", PROMPT, 1)
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 1)
    assert [hop.kind for hop in cluster.instances["prefill-0"].sent] == [HopKind.WHOLE]
    assert not cluster.instances["decode-0"].sent
    cluster.assert_nothing_held()


async def test_kv_is_counted_as_moved() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.submit("r", PROMPT, 3)
    await cluster.settle()
    assert cluster.metrics.kv_tokens_moved._value.get() == len(PROMPT)
    # Nothing says that they are on different nodes.
    assert cluster.metrics.kv_bytes_moved.labels(link="node")._value.get() == len(PROMPT) * 2048
    assert cluster.metrics.kv_tokens_recomputed._value.get() == 0


async def test_what_the_reader_has_in_its_own_cache_is_released_at_the_source() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.instances["decode-0"].has_them = True
    cluster.submit("r", PROMPT, 3)
    await cluster.settle()
    cluster.assert_nothing_held()
    assert cluster.metrics.kv_tokens_recomputed._value.get() == 0


async def test_recomputing_what_was_sent_is_a_fault(caplog: pytest.LogCaptureFixture) -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.instances["decode-0"].recomputes = True
    cluster.submit("r", PROMPT, 3)
    await cluster.settle()
    cluster.assert_nothing_held()  # an engine that recomputes does not tell the source: the router does
    assert cluster.metrics.kv_tokens_recomputed._value.get() == len(PROMPT)
    assert "fault: decode-0 recomputed 40 of 40" in caplog.text


@pytest.mark.parametrize("handoff", list(Handoff))
async def test_decode_dies_in_mid_stream(handoff: Handoff) -> None:
    cluster = TwinCluster("prefill-0", "decode-0", "decode-1")
    cluster.instances["decode-0"].stalls_at = 7
    cluster.submit("r", PROMPT, 20, handoff)
    await until(lambda: len(cluster.tokens.get("r", [])) >= 7)
    cluster.instances["decode-0"].kill()
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 20)
    assert cluster.finished == {"r"}
    cluster.assert_nothing_held()


async def test_prefill_dies_while_it_works() -> None:
    cluster = TwinCluster("prefill-0", "prefill-1", "decode-0")
    cluster.instances["prefill-0"].stalls_at = 0
    cluster.submit("r", PROMPT, 4)
    await until(lambda: cluster.instances["prefill-0"].sent)
    cluster.instances["prefill-0"].kill()
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 4)
    cluster.assert_nothing_held()


async def test_prefill_dies_before_its_blocks_are_read() -> None:
    cluster = TwinCluster("prefill-0", "prefill-1", "decode-0")
    cluster.instances["decode-0"].stalls_at = 0
    cluster.submit("r", PROMPT, 4)
    await until(lambda: cluster.instances["decode-0"].sent)
    cluster.instances["decode-0"].stalls_at = 1 << 30
    cluster.instances["prefill-0"].kill()
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 4)
    cluster.assert_nothing_held()


async def test_prefill_may_die_once_its_blocks_are_read() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.submit("r", PROMPT, 50)
    await until(lambda: len(cluster.tokens.get("r", [])) > 3)
    cluster.instances["prefill-0"].kill()
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 50)


async def test_no_decode_left_is_a_typed_error() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.instances["decode-0"].stalls_at = 3
    cluster.submit("r", PROMPT, 20)
    await until(lambda: len(cluster.tokens.get("r", [])) >= 3)
    cluster.instances["decode-0"].kill()
    await cluster.settle()
    assert isinstance(cluster.errors["r"], NoInstance)
    assert cluster.errors["r"].role == "decode"
    cluster.assert_nothing_held()


async def test_a_policy_that_fails_is_an_error_of_the_request_and_counted() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")

    def fail(*_: object) -> Decision:
        raise ZeroDivisionError("a bug")

    cluster.router._policy.decide = fail  # type: ignore[method-assign]
    with pytest.raises(EngineFailure, match="a bug"):
        cluster.router.submit(ServeRequest(request_id="r", prompt_token_ids=PROMPT, max_tokens=4))
    assert cluster.metrics.requests.labels(outcome="engine-failure")._value.get() == 1
    cluster.assert_nothing_held()


async def test_nothing_ready_is_refused_at_once() -> None:
    cluster = TwinCluster("prefill-0")
    with pytest.raises(NoInstance, match="no decode instance is ready"):
        cluster.submit("r", PROMPT, 20)
    assert cluster.router.pending == 0


@pytest.mark.parametrize("handoff", list(Handoff))
async def test_who_waits_far_beyond_its_bound_is_told(handoff: Handoff) -> None:
    """Whichever engine its first token shall come from; and nobody else is tried, as it is too late there."""
    cluster = TwinCluster("prefill-0", "prefill-1", "decode-0", "decode-1")
    for instance in cluster.instances.values():
        instance.stalls_at = 0
    cluster.submit("r", PROMPT, 9, handoff, slo=Slo(ttft_s=0.02))
    await cluster.settle()
    error = cluster.errors["r"]
    assert isinstance(error, TooLate)
    # Counted from when it was sent, a moment after it came.
    assert error.waited_s > 1.9 * error.bound_s
    assert (error.http_status, error.reason) == (429, "rejected-ttl-expired")
    assert len([hop for i in cluster.instances.values() for hop in i.sent]) == 1
    cluster.assert_nothing_held()


async def test_who_has_a_token_is_not_too_late() -> None:
    cluster = TwinCluster("prefill-0", "decode-0", deadlines=QUICK)
    cluster.instances["decode-0"].stalls_at = 0
    cluster.submit("r", PROMPT, 9, slo=Slo(ttft_s=0.001))
    await cluster.settle()
    assert isinstance(cluster.errors["r"], StageTimeout)
    cluster.assert_nothing_held()


@pytest.mark.parametrize("stalled", ["prefill-0", "decode-0"])
async def test_a_stalled_stage_moves_the_request(stalled: str) -> None:
    cluster = TwinCluster("prefill-0", "prefill-1", "decode-0", "decode-1", deadlines=QUICK)
    cluster.instances[stalled].stalls_at = 0
    cluster.submit("r", PROMPT, 6)
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 6)
    cluster.assert_nothing_held()


async def test_a_stall_everywhere_ends_with_the_stage_that_stalled() -> None:
    cluster = TwinCluster("prefill-0", "decode-0", deadlines=QUICK.model_copy(update={"attempts": 2}))
    cluster.instances["decode-0"].stalls_at = 2
    cluster.submit("r", PROMPT, 9)
    await cluster.settle()
    error = cluster.errors["r"]
    assert isinstance(error, StageTimeout)
    assert (error.stage, error.instance) == ("decode", "decode-0")
    cluster.assert_nothing_held()


async def test_a_slow_decode_that_makes_progress_is_left_alone() -> None:
    cluster = TwinCluster("prefill-0", "decode-0", deadlines=QUICK)
    decode = cluster.instances["decode-0"]
    decode.stalls_at = 3
    cluster.submit("r", PROMPT, 8)
    await until(lambda: len(cluster.tokens.get("r", [])) >= 4)
    hop = decode.sent[0]
    loop = asyncio.get_running_loop()
    began = loop.time()
    while loop.time() < began + 0.15:  # three times the stall deadline
        hop.progress_s = loop.time()
        await asyncio.sleep(0.01)
    assert "r" not in cluster.errors
    assert len(decode.sent) == 1
    cluster.router.abort(["r"])
    await cluster.settle()
    cluster.assert_nothing_held()


async def test_a_replay_that_differs_is_told_and_not_shown() -> None:
    cluster = TwinCluster("prefill-0", "decode-0", "decode-1")
    cluster.instances["decode-0"].stalls_at = 5
    cluster.instances["decode-1"].wrong_from = 2
    cluster.submit("r", PROMPT, 20, Handoff.KV_ONLY)
    await until(lambda: len(cluster.tokens.get("r", [])) >= 5)
    cluster.instances["decode-0"].kill()
    await cluster.settle()
    error = cluster.errors["r"]
    assert isinstance(error, ReplayDiverged)
    assert error.position == 2
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 5)
    cluster.assert_nothing_held()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 6, 9, 15])
@pytest.mark.parametrize("handoff", list(Handoff))
async def test_a_client_that_leaves_frees_both_legs(steps: int, handoff: Handoff) -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.submit("r", PROMPT, 200, handoff)
    for _ in range(steps):
        await asyncio.sleep(0)
    cluster.router.abort(["r"])
    await cluster.settle()
    for _ in range(5):
        await asyncio.sleep(0)
    # A decode aborted before it read tells the source itself; the twins' source is told by the router.
    cluster.assert_nothing_held()


async def test_blocks_kept_after_the_client_left_are_released() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    prefill = cluster.instances["prefill-0"]
    prefill.abort = lambda request_ids: None  # type: ignore[method-assign] - the abort comes too late
    cluster.submit("r", PROMPT, 200)
    await until(lambda: prefill.sent)
    cluster.router.abort(["r"])
    await until(lambda: not prefill.tasks)
    await cluster.settle()
    cluster.assert_nothing_held()


async def test_draining_lets_running_requests_end() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.submit("r", PROMPT, 30)
    draining = asyncio.create_task(cluster.router.drain(5.0))
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        cluster.submit("late", PROMPT, 3)
    await draining
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 30)


async def test_draining_cuts_off_what_does_not_end() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.instances["decode-0"].stalls_at = 1
    cluster.submit("r", PROMPT, 30)
    await cluster.router.drain(0.05)
    assert cluster.router.pending == 0
    assert isinstance(cluster.errors["r"], Draining)
    cluster.assert_nothing_held()


async def test_a_timeout_with_nobody_else_left_is_not_queued_again() -> None:
    cluster = TwinCluster("prefill-0", "prefill-1", "decode-0", deadlines=QUICK)
    cluster.instances["decode-0"].stalls_at = 0
    cluster.submit("r", PROMPT, 9)
    await cluster.settle()
    assert isinstance(cluster.errors["r"], StageTimeout)
    assert len(cluster.instances["decode-0"].sent) == 1
    cluster.assert_nothing_held()


async def test_a_one_token_prompt_has_nothing_to_hand_over_for_a_stateful_sampler() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.submit("r", [7], 5, Handoff.KV_ONLY)
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens([7], 5)
    assert not cluster.instances["prefill-0"].sent


@pytest.mark.parametrize("handoff", [Handoff.TOKENS, Handoff.KV_ONLY])
async def test_who_is_refused_is_offered_elsewhere_at_once(
    handoff: Handoff, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = TwinCluster("prefill-0", "prefill-1", "decode-0", deadlines=DeadlineSpec(attempts=1))
    cluster.instances["prefill-0"].waits_s = [60.0]
    cluster.submit("r", PROMPT, 6, handoff)
    cluster.submit("other", PROMPT, 6, handoff)
    await cluster.settle()
    assert cluster.tokens["r"] == cluster.tokens["other"] == expected_tokens(PROMPT, 6)
    # It was no failure: no attempt, no move, no warning; and it concerned one request.
    assert cluster.metrics.refusals.labels(role="prefill")._value.get() == 1
    assert cluster.metrics.moves._metrics == {}
    assert caplog.text == ""
    cluster.submit("later", PROMPT, 6, handoff)
    await cluster.settle()
    assert cluster.instances["prefill-0"].sent[-1].request.request_id == "later"
    cluster.assert_nothing_held()


async def test_whom_all_refuse_waits_for_the_first_to_have_room() -> None:
    cluster = TwinCluster("prefill-0", "prefill-1", "decode-0")
    cluster.instances["prefill-0"].waits_s = [60.0]
    cluster.instances["prefill-1"].waits_s = [0.02]
    began_s = asyncio.get_running_loop().time()
    cluster.submit("r", PROMPT, 6)
    await until(lambda: len(cluster.router.line) == 1)
    assert dict(cluster.router.reservations.outstanding()) == {}
    await cluster.settle()
    assert asyncio.get_running_loop().time() >= began_s + 0.02
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 6)
    assert [len(cluster.instances[name].sent) for name in ("prefill-0", "prefill-1")] == [1, 2]
    cluster.assert_nothing_held()


async def test_who_waits_goes_on_when_a_prompt_has_ended() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.instances["prefill-0"].waits_s = [60.0]
    cluster.submit("r", PROMPT, 6)
    await until(lambda: len(cluster.router.line) == 1)
    cluster.submit("other", PROMPT, 6)
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 6)


async def test_who_waits_goes_on_when_an_instance_comes() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.instances["prefill-0"].waits_s = [60.0, 60.0]
    cluster.submit("r", PROMPT, 6)
    await until(lambda: len(cluster.router.line) == 1)
    cluster.add("prefill-1")
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 6)


async def test_whom_nobody_takes_in_time_is_rejected_and_told_when_to_come_back() -> None:
    cluster = TwinCluster("prefill-0", "prefill-1", "decode-0")
    cluster.instances["prefill-0"].waits_s = [7.5]
    cluster.instances["prefill-1"].waits_s = [60.0]
    cluster.submit("r", PROMPT, 6, slo=Slo(ttft_s=4.0))
    await cluster.settle()
    error = cluster.errors["r"]
    assert isinstance(error, Rejected)
    assert error.ttft_s == pytest.approx(7.5, abs=0.5)
    assert (error.http_status, error.ttft_bound_s, error.retry_after_s) == (429, 4.0, 4)
    assert cluster.metrics.requests.labels(outcome="rejected-saturated")._value.get() == 1
    cluster.assert_nothing_held()


async def test_who_waits_is_rejected_when_its_time_is_up() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.instances["prefill-0"].waits_s = [0.01] * 1000
    cluster.submit("r", PROMPT, 6, slo=Slo(ttft_s=0.1))
    await cluster.settle()
    assert isinstance(cluster.errors["r"], Rejected)
    assert 2 <= len(cluster.instances["prefill-0"].sent) <= 11
    cluster.assert_nothing_held()


async def test_a_client_that_leaves_the_line_leaves_nothing() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.instances["prefill-0"].waits_s = [60.0]
    cluster.submit("r", PROMPT, 6)
    await until(lambda: len(cluster.router.line) == 1)
    cluster.router.abort(["r"])
    await cluster.settle()
    cluster.assert_nothing_held()


async def test_who_has_tokens_is_not_refused() -> None:
    cluster = TwinCluster("prefill-0", "decode-0", "decode-1")
    cluster.instances["decode-0"].stalls_at = 3
    cluster.submit("r", PROMPT, 20)
    await until(lambda: len(cluster.tokens.get("r", [])) >= 3)
    cluster.instances["prefill-0"].waits_s = [60.0]
    cluster.instances["decode-0"].kill()
    await cluster.settle()
    assert cluster.tokens["r"] == expected_tokens(PROMPT, 20)
    assert cluster.instances["prefill-0"].waits_s == [60.0]
    cluster.assert_nothing_held()


async def test_a_refusal_of_a_request_that_has_left_is_no_news() -> None:
    cluster = TwinCluster("prefill-0", "decode-0")
    cluster.router.refused("gone~1", "prefill-0", 1.0)
    cluster.router.refused("gone~1", "prefill-7", 1.0)
    assert cluster.metrics.refusals._metrics == {}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_happens_nothing_is_held_and_no_token_is_wrong(data: st.DataObject) -> None:
    """Invariants: 1 each request ends once; 2 what was sent is a prefix of the right tokens; 3 a request that
    ended well has all of them; 4 nothing is held at the end."""

    async def scenario() -> None:
        cluster = TwinCluster("prefill-0", "prefill-1", "decode-0", "decode-1", deadlines=QUICK, chunk=20)
        wanted: dict[str, tuple[list[int], int]] = {}
        for number in range(data.draw(st.integers(1, 8), label="requests")):
            length = data.draw(st.integers(1, 60), label="prompt")
            count = data.draw(st.integers(1, 25), label="tokens")
            handoff = data.draw(st.sampled_from(list(Handoff)), label="handoff")
            wanted[f"r{number}"] = [number * 7 + 100] * length, count
            cluster.submit(f"r{number}", wanted[f"r{number}"][0], count, handoff)
        aborted = set()
        for _ in range(data.draw(st.integers(0, 4), label="events")):
            for _ in range(data.draw(st.integers(0, 12), label="steps")):
                await asyncio.sleep(0)
            event = data.draw(st.sampled_from(["abort", "kill", "stall", "join", "busy"]), label="event")
            instance_id = data.draw(st.sampled_from(sorted(cluster.instances)), label="instance")
            if event == "abort":
                request_id = data.draw(st.sampled_from(sorted(wanted)), label="request")
                aborted.add(request_id)
                cluster.router.abort([request_id])
            elif event == "kill":
                cluster.instances[instance_id].kill()
            elif event == "stall":
                cluster.instances[instance_id].stalls_at = data.draw(st.integers(0, 5), label="at")
            elif event == "busy":
                waits = st.lists(st.sampled_from([0.0, 0.01, 0.04, 9.0]), max_size=9)
                cluster.instances[instance_id].waits_s += data.draw(waits, label="waits")
            else:
                cluster.add(instance_id)
        await cluster.settle(20.0)
        for _ in range(4):
            await asyncio.sleep(0)
        for request_id, (prompt, count) in wanted.items():
            right = expected_tokens(prompt, count)
            sent = cluster.tokens.get(request_id, [])
            assert sent == right[: len(sent)]
            if request_id not in aborted and request_id not in cluster.errors:
                assert sent == right
        assert sorted(cluster.forgotten) == sorted(wanted)
        cluster.assert_nothing_held()

    asyncio.run(scenario())
