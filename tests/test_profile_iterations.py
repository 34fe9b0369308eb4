"""Which batch was in which iteration, from outputs and counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.latency import Batch
from cluster.wire import TokenOutput
from deploy.profiler.iterations import IterationTracker, PromptCount


def tokens(*request_ids: str, count: int = 1) -> list[TokenOutput]:
    return [TokenOutput(request_id=request_id, new_token_ids=[7] * count) for request_id in request_ids]


def tracker(**prompts: int) -> IterationTracker:
    tracker = IterationTracker()
    for request_id, prompt_tokens in prompts.items():
        tracker.add(request_id, prompt_tokens, 10.0)
    return tracker


def test_whole_prompts_and_then_their_decodes() -> None:
    both = tracker(a=100, b=50)
    first = both.step(tokens("a", "b"), PromptCount(requests=2, tokens=150), 10.5)
    assert first is not None
    assert first.batch == Batch(150, 100**2 + 50**2, 2)
    assert first.seconds == 0.5
    second = both.step(tokens("a", "b"), PromptCount(requests=0, tokens=0), 10.75)
    assert second is not None
    # The KV of the tokens before the one that is computed.
    assert second.batch == Batch(decode_requests=2, decode_context_tokens=150)
    assert second.seconds == 0.25
    third = both.step(tokens("a", "b"), None, 11.0)
    assert third is not None
    assert third.batch.decode_context_tokens == 152


def test_chunks_go_to_prompts_in_the_order_of_arrival() -> None:
    queue = tracker(a=100, b=50)
    first = queue.step([], PromptCount(requests=1, tokens=80), 11.0)
    assert first is not None
    assert first.batch == Batch(80, 80**2, 1)
    second = queue.step(tokens("a"), PromptCount(requests=2, tokens=60), 12.0)
    assert second is not None
    assert second.batch == Batch(60, (100**2 - 80**2) + 40**2, 2)
    third = queue.step(tokens("a", "b"), PromptCount(requests=1, tokens=10), 13.0)
    assert third is not None
    assert third.batch == Batch(10, 50**2 - 40**2, 1, 1, 100)


def test_a_count_that_contradicts_is_not_believed_and_the_next_one_is() -> None:
    queue = tracker(a=100, b=50)
    assert queue.step(tokens("a"), PromptCount(requests=1, tokens=40), 11.0) is None  # a has its token
    assert queue.step(tokens("a", "b"), PromptCount(requests=2, tokens=50), 12.0) is None
    after = queue.step(tokens("a", "b"), PromptCount(requests=0, tokens=0), 13.0)
    assert after is not None
    assert after.batch == Batch(decode_requests=2, decode_context_tokens=151)


def test_without_counts_an_iteration_that_others_may_share_is_unknown() -> None:
    queue = tracker(a=100, b=50)
    assert queue.step(tokens("a"), None, 11.0) is None
    assert queue.step(tokens("a", "b"), None, 12.0) is None  # a part of b may have been in the first
    after = queue.step(tokens("a", "b"), None, 13.0)
    assert after is not None


def test_outputs_of_an_unknown_request_make_an_iteration_unknown() -> None:
    one = tracker(a=10)
    assert one.step(tokens("a", "stranger"), None, 11.0) is None


def test_an_idle_engine_begins_when_work_comes() -> None:
    one = tracker(a=10)
    one.step(tokens("a"), None, 10.5)
    one.forget(["a", "never seen"])
    assert one.open == 0
    one.add("b", 20, 99.0)
    one.add("c", 20, 99.5)
    again = one.step(tokens("b", "c"), None, 100.0)
    assert again is not None
    assert again.seconds == 1.0


def test_several_iterations_told_at_once_are_averaged() -> None:
    one = tracker(a=10)
    one.step(tokens("a"), None, 11.0)
    run = one.step(tokens("a", count=5), None, 16.0)
    assert run is not None
    assert run.seconds == 1.0
    assert run.batch == Batch(decode_requests=1, decode_context_tokens=12)
    assert one.generated("a") == 6
    assert one.generated("nobody") == 0


@given(
    prompts=st.lists(st.integers(1, 300), min_size=1, max_size=8),
    budget=st.integers(1, 256),
)
def test_chunks_add_up_to_the_prompts(prompts: list[int], budget: int) -> None:
    """Computed first come first served under a budget of prompt tokens, as vLLM does."""
    tracked = IterationTracker()
    left = {}
    for number, length in enumerate(prompts):
        tracked.add(str(number), length, 0.0)
        left[str(number)] = length
    total = Batch()
    now_s = 0.0
    while left:
        now_s += 1.0
        room, requests, done = budget, 0, []
        for name in left:
            size = min(room, left[name])
            left[name] -= size
            room -= size
            requests += size > 0
            if not left[name]:
                done.append(name)
        counted = PromptCount(requests=requests, tokens=budget - room)
        iteration = tracked.step(tokens(*done), counted, now_s)
        assert iteration is not None
        assert iteration.batch.prefill_tokens == budget - room
        total = Batch(*(a + b for a, b in zip(total, iteration.batch, strict=True)))
        for name in done:
            del left[name]
            tracked.forget([name])
    assert total.prefill_tokens == sum(prompts)
    assert total.prefill_attention == sum(length**2 for length in prompts)
