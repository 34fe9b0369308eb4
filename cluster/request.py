"""A request as router and workers see it, free of any engine's types."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """Where a request is; one state machine (`router.run`) owns the changes."""

    ADMIT = "admit"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    DECODE = "decode"
    DONE = "done"


class Handoff(StrEnum):
    """How much of a request's sampling may change engines.

    TOKENS: nothing but the tokens matters for what comes next, so a token of one engine is a prompt token
        of the next.
    KV_ONLY: the sampler keeps a state over the output (seeded generator, penalties, grammar, bad words):
        KV is handed over, but every output token must come from one engine's sampler.
    NOTHING: the request must stay on one engine.
    """

    TOKENS = "tokens"
    KV_ONLY = "kv_only"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Service-level objective of a request, in seconds; TPOT averages over the tokens after the first.

    Infinite is no bound.
    """

    ttft_s: float = math.inf
    tpot_s: float = math.inf

    def is_kept(self, ttft_s: float | None, tpot_s: float | None) -> bool:
        """Whether an answer with these times is within both bounds; one token has no TPOT and keeps any."""
        return ttft_s is not None and ttft_s <= self.ttft_s and (tpot_s is None or tpot_s <= self.tpot_s)


NO_SLO = Slo()


def slo_of_ms(ttft_ms: float | None, tpot_ms: float | None) -> Slo:
    """An SLO of bounds in milliseconds, as files have them; one that isn't given is none."""
    ttft_s, tpot_s = (math.inf if ms is None else ms / 1000 for ms in (ttft_ms, tpot_ms))
    return Slo(ttft_s=ttft_s, tpot_s=tpot_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRequest:
    """What the router needs to know of a request.

    Attributes:
        request_id: unique in the ingress for the life of the request.
        prompt_token_ids: the prompt.
        max_tokens: output tokens at most, at least 1.
        handoff: what may change engines. Unless it is TOKENS, the request is deterministic (greedy, or with
            a seed), so that running it again on another engine gives the tokens the client already has.
        slo, slo_class: what it needs, and the name of its class; empty for none.
        priority: as vLLM's, lower is more important.
        session_id, tenant: who sends it; empty where the client does not say.
        fills_slack: whether it is served only where it takes nothing from others.
        plain_prompt: whether its KV follows from its tokens alone: no adapter, image or salt.
        adapter: name of its LoRA adapter; empty for the model alone.
    """

    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int
    handoff: Handoff = Handoff.TOKENS
    slo: Slo = NO_SLO
    slo_class: str = ""
    priority: int = 0
    session_id: str = ""
    tenant: str = ""
    fills_slack: bool = False
    plain_prompt: bool = True
    adapter: str = ""


@dataclass(slots=True, kw_only=True)
class Timeline:
    """Loop times in seconds at which a request reached its stages; None where it never did."""

    arrived_s: float
    prefill_sent_s: float | None = None
    first_token_s: float | None = None
    decode_sent_s: float | None = None
    decode_first_s: float | None = None
    done_s: float | None = None

    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    def tpot_s(self, output_tokens: int) -> float | None:
        """Time per output token after the first; None for fewer than two tokens."""
        if self.first_token_s is None or self.done_s is None or output_tokens < 2:
            return None
        return (self.done_s - self.first_token_s) / (output_tokens - 1)
