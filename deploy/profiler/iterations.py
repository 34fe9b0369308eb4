"""Which batch an engine computed in each of its iterations, and how long that took. It is told the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.latency import Batch


class TokensOut(Protocol):
    """One request's part of a step's outputs: vLLM's `EngineCoreOutput`, or `wire.TokenOutput`."""

    request_id: str
    new_token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCount:
    """The prompt chunks of one iteration, as the engine counts them.

    Attributes:
        requests: chunks.
        tokens: prompt tokens over all chunks.
    """

    requests: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """One iteration: what was in it, and the seconds from its start to its tokens."""

    batch: Batch
    seconds: float


@dataclass(slots=True, eq=False)
class _Open:
    """`late`: it came while an iteration ran, which it is not in. `waited`: an iteration passed that may have
    computed a part of its prompt."""

    prompt_tokens: int
    computed_tokens: int = 0
    generated: int = 0
    late: bool = False
    waited: bool = False


class IterationTracker:
    """Follows the requests of one engine that nobody else uses.

    An iteration begins when the one before it ends, or when work comes to an idle engine. Where the engine
    counts its prompt chunks, they are attributed to the prompts in the order of their arrival, which is the
    order in which vLLM's scheduler takes them. Where it does not, the prompts of the requests that got their
    first token were computed whole in that iteration, unless others wait: parts of theirs may have been, too.
    Such an engine must be given no prompt alone that is longer than an iteration's budget of tokens.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}
        self._began_s = 0.0
        self._runs = False

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def add(self, request_id: str, prompt_tokens: int, now_s: float) -> None:
        """A request was given to the engine."""
        if not self._open:
            self._began_s = max(self._began_s, now_s)
            self._runs = False
        self._open[request_id] = _Open(prompt_tokens, late=self._runs)

    def forget(self, request_ids: Sequence[str]) -> None:
        """These ended, or were aborted."""
        for request_id in request_ids:
            self._open.pop(request_id, None)

    def generated(self, request_id: str) -> int:
        """Tokens that a request has got; 0 for one that is not open."""
        request = self._open.get(request_id)
        return 0 if request is None else request.generated

    def step(
        self, outputs: Sequence[TokensOut], prompts: PromptCount | None, ended_s: float
    ) -> Iteration | None:
        """An iteration ended at `ended_s`; None when what was in it is not known.

        Args:
            outputs: tokens of each request that got any.
            prompts: the engine's count of prompt chunks, None from an engine that does not count.
        """
        self._runs = True  # the next one began as this one ended
        seconds = ended_s - self._began_s
        self._began_s = ended_s
        known = [(self._open[o.request_id], o) for o in outputs if o.request_id in self._open]
        complete = len(known) == len(outputs)
        firsts = [request for request, output in known if output.new_token_ids and not request.generated]
        decodes = [
            (request, output) for request, output in known if output.new_token_ids and request.generated
        ]
        chunks = self._chunks(firsts, prompts)
        context_tokens = sum(request.prompt_tokens + request.generated - 1 for request, _ in decodes)
        tokens = {len(output.new_token_ids) for request, output in known if output.new_token_ids}
        for request, output in known:
            request.generated += len(output.new_token_ids)
        if not complete or chunks is None or len(tokens) > 1 or not (chunks or decodes) or seconds <= 0:
            return None
        # An engine may tell several iterations at once; their contexts are, on average, those of the middle.
        steps = max(tokens, default=1)
        if steps > 1 and chunks:
            return None
        return Iteration(
            batch=Batch(
                prefill_tokens=sum(after - before for before, after in chunks),
                prefill_attention=sum(after**2 - before**2 for before, after in chunks),
                prefill_requests=len(chunks),
                decode_requests=len(decodes),
                decode_context_tokens=context_tokens + len(decodes) * (steps - 1) // 2,
            ),
            seconds=seconds / steps,
        )

    def _chunks(self, firsts: list[_Open], prompts: PromptCount | None) -> list[tuple[int, int]] | None:
        """(tokens before, tokens after) of each chunk; None if they are not known or contradict the count."""
        if prompts is None:
            waiting = [r for r in self._open.values() if not (r.generated or r.late or r in firsts)]
            for request in self._open.values():
                request.late = False
            known = not waiting and not any(request.waited for request in firsts)
            for request in waiting:
                request.waited = True
            chunks = [(0, request.prompt_tokens) for request in firsts]
        else:
            chunks = self._in_order(prompts.tokens)
            known = len(chunks) == prompts.requests and sum(b - a for a, b in chunks) == prompts.tokens
            known = known and all(request.computed_tokens == request.prompt_tokens for request in firsts)
        for request in firsts:
            request.computed_tokens = request.prompt_tokens
        return chunks if known else None

    def _in_order(self, tokens: int) -> list[tuple[int, int]]:
        """Give so many prompt tokens to the open prompts, first come first served."""
        chunks = []
        for request in self._open.values():
            before = request.computed_tokens
            if size := min(tokens, request.prompt_tokens - before):
                request.computed_tokens += size
                tokens -= size
                chunks.append((before, request.computed_tokens))
        return chunks
