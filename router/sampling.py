"""What of a request's sampling may change engines in mid-request."""

from __future__ import annotations

from typing import Any

from cluster.request import Handoff

# In a request's `vllm_xargs`: serve it on one instance, for comparison.
UNSPLIT = "pdserve_unsplit"


def handoff_of(params: Any) -> Handoff:
    """How a request with these sampling parameters (vLLM's `SamplingParams`) may be handed over.

    A sampler whose next token depends on more than the tokens so far keeps that state in its engine: the
    position of a seeded generator, the counts behind presence and frequency penalties (which look at output
    tokens only; a repetition penalty looks at the prompt too, and so carries over), a grammar's state, bad
    words in part matched, a thinking budget. Prompt logprobs need the whole prompt computed in one place,
    unless its first token can go with them.
    """
    if (params.extra_args or {}).get(UNSPLIT):
        return Handoff.NOTHING
    keeps_state = (
        params.seed is not None
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.structured_outputs is not None
        or bool(params.bad_words)
        or params.repetition_detection is not None
        or params.thinking_token_budget is not None
        or params.trace_decode_token_ids is not None
    )
    if not keeps_state:
        return Handoff.TOKENS
    return Handoff.NOTHING if params.prompt_logprobs is not None else Handoff.KV_ONLY


def needs_seed(params: Any, handoff: Handoff) -> bool:
    """Whether a seed must be chosen for the request so that it can be replayed after a failure."""
    return handoff is not Handoff.TOKENS and params.temperature > 0.0 and params.seed is None
