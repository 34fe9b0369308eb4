"""Turns a workload of single requests into conversations, by rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count
from random import Random

from deploy.workload import MOONCAKE_TOKENS_PER_HASH, WorkloadRequest, require_positive


@dataclass(slots=True, kw_only=True)
class _Session:
    """A conversation so far: its tokens with the last answer, and the ids of its blocks."""

    session_id: str
    tokens: int = 0
    hash_ids: list[int] = field(default_factory=list)


def attach_sessions(
    requests: Sequence[WorkloadRequest], turns_mean: float, gap_s: float, rng: Random
) -> list[WorkloadRequest]:
    """The same arrivals and answers as turns of conversations; a prompt grows by what was said before it.

    Each arrival continues the conversation whose next turn has been due longest, or begins one if none is
    due. After a turn a conversation goes on with probability 1 - 1/`turns_mean` (so the number of turns is
    geometric with that mean, less where the workload ends first) and is due after `gap_s` on average, never
    before half of it: a client does not answer an answer it does not have. A request's own `input_tokens` are
    what is new in its turn; before them come the session's prompts and answers, and the hash ids say so: turn
    k's whole prompt is the beginning of turn k+1's. (The answer inside the next prompt is of this workload,
    not what an engine generated, so a prefix cache finds the earlier prompts only.)

    Returns the requests by arrival. Raises ValueError for `turns_mean` below 1, for a gap that is not
    positive, and for requests that already have hash ids or sessions of their own.
    """
    if not 1 <= turns_mean < math.inf:
        raise ValueError(f"turns_mean is {turns_mean!r}, expected at least 1")
    require_positive("gap_s", gap_s)
    goes_on = 1.0 - 1.0 / turns_mean
    ids = count()
    sessions = 0
    due: list[tuple[float, int, _Session]] = []
    turns = []
    for index, request in enumerate(sorted(requests, key=lambda request: request.arrival_s)):
        if request.hash_ids or request.session_id is not None:
            raise ValueError(
                f"request {index} at {request.arrival_s:g} s has a session or hash ids of its own; "
                "sessions can be attached only to requests without"
            )
        if due and due[0][0] <= request.arrival_s:
            session = heappop(due)[2]
        else:
            session = _Session(session_id=f"session-{sessions}")
            sessions += 1
        turns.append(_turn(session, request, ids))
        if rng.random() < goes_on:
            # The index breaks ties of the time, so sessions are never compared.
            heappush(due, (request.arrival_s + gap_s * rng.uniform(0.5, 1.5), index, session))
    return turns


def _turn(session: _Session, request: WorkloadRequest, ids: count[int]) -> WorkloadRequest:
    input_tokens = session.tokens + request.input_tokens
    blocks = math.ceil(input_tokens / MOONCAKE_TOKENS_PER_HASH)
    session.hash_ids.extend(next(ids) for _ in range(blocks - len(session.hash_ids)))
    session.tokens = input_tokens + request.output_tokens
    return replace(
        request,
        input_tokens=input_tokens,
        hash_ids=tuple(session.hash_ids),
        tokens_per_hash=MOONCAKE_TOKENS_PER_HASH,
        session_id=session.session_id,
    )
