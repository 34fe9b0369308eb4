"""What a request will take where: time to first token, time per output token, length of its answer.

Times of iterations are the latency model's; each instance has its own factor on them, learned from what
happened there. The parts: a prompt waits for the prompts before it and takes what its uncached tokens take;
its KV moves; it waits for the iteration that runs on the decode instance; and then every iteration of the
batch, with this request in it, gives one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.instance import Role
from cluster.latency import Batch, ConstantLatency, LatencyModel
from cluster.learned_latency import LearnedLatency
from cluster.request import ServeRequest
from router.links import NETWORK, HandOvers
from router.output_lengths import OutputLengths
from router.view import InstanceView

# What a further prompt adds to a batch that is large already is its part of a queue; alone it would pay an
# iteration's fixed part again.
FULL_BATCH_TOKENS = 2048
# Of answers of the class: half are longer, so that a sum over many requests is right.
LENGTH_SHARE = 0.5
# What loading an adapter takes: each that was seen moves the estimate by this part, within this bound.
LOAD_GAIN, MOST_LOAD_S = 0.2, 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What was expected of a request when it was decided on.

    Attributes:
        queue_s: until its prompt begins to be computed.
        work_s: what it adds to the queue, without the instance's factor.
        ttft_s, tpot_s: as its SLO counts them.
        iteration_s: of the decode batch with it, without the instance's factor.
        output_tokens: of its answer.
        chance: to keep its SLO, 0 to 1.
        cached_tokens: of its prompt, that need no computing where it is to be computed.
        harm: others' expected loss by it, in requests; 0 from policies that don't ask.
        load_s: of `ttft_s`, for loading its adapter; 0 where it is loaded.
    """

    queue_s: float
    work_s: float
    ttft_s: float
    tpot_s: float
    iteration_s: float
    output_tokens: int
    chance: float
    cached_tokens: int = 0
    harm: float = 0.0
    load_s: float = 0.0

    @classmethod
    def counted(cls, output_tokens: int, cached_tokens: int = 0) -> Prediction:
        """Of a policy that counts tokens and predicts no times."""
        return cls(
            queue_s=0.0,
            work_s=0.0,
            ttft_s=0.0,
            tpot_s=0.0,
            iteration_s=0.0,
            output_tokens=output_tokens,
            chance=1.0,
            cached_tokens=cached_tokens,
        )


class Predictor:
    """Latency models of both roles, and the lengths of answers.

    Attributes:
        lengths: of the answers that ended.
        load_s: what loading a LoRA adapter takes.
        hand_overs: what they take; told of each that ended.
    """

    def __init__(self, latency: Mapping[Role, LatencyModel] | None = None, *, load_s: float = 0.1) -> None:
        """
        Args:
            load_s: what loading an adapter takes until it was seen.
        """
        constant = ConstantLatency()
        self._latency = latency or dict.fromkeys(Role, constant)
        # Of the last length: a decision asks for the same prompt once for every instance.
        self._prefill: dict[Role, tuple[int, dict[int, tuple[float, float]]]] = {}
        self.lengths = OutputLengths()
        self.load_s = load_s
        self.hand_overs = HandOvers()
        self._learns = isinstance(self._latency.get(Role.DECODE), LearnedLatency)

    @classmethod
    def learning(cls, *, load_s: float = 0.1) -> Predictor:
        """One that begins with a guess and learns from what happens."""
        return cls({role: LearnedLatency() for role in Role}, load_s=load_s)

    def prefilled(self, role: Role, tokens: int, seconds: float) -> None:
        """A prompt that waited for no other, and of which so many tokens were computed, took so long."""
        latency = self._latency[role]
        if isinstance(latency, LearnedLatency):
            latency.prefilled(tokens, seconds)
            self._prefill.pop(role, None)

    def decoded(self, role: Role, requests: int, iteration_s: float) -> None:
        """Iterations with so many requests took so long each."""
        latency = self._latency[role]
        if isinstance(latency, LearnedLatency):
            latency.decoded(requests, iteration_s)

    def loaded(self, seconds: float) -> None:
        """Loading an adapter took so long."""
        self.load_s += LOAD_GAIN * (min(MOST_LOAD_S, max(0.0, seconds)) - self.load_s)

    def delay_s(self, link: str, tokens: int, iteration_s: float) -> float:
        """By how much a hand-over of so many tokens delays the second one, which would come an iteration
        after the first. With a model of the times, what its way takes more than the shortest."""
        if self._learns:
            return max(0.0, self.hand_overs.seconds(link, tokens) - iteration_s) if link else 0.0
        return self.hand_overs.more_s(link, tokens) if link == NETWORK else 0.0

    def output_tokens(self, request: ServeRequest) -> int:
        """Expected length of its answer."""
        return self.lengths.quantile(request.slo_class, LENGTH_SHARE, limit=request.max_tokens)

    def prefill_s(self, role: Role, tokens: int, cached: int = 0) -> tuple[float, float]:
        """(alone, in a queue) seconds of a prompt of which `cached` tokens need no computing, without any
        instance's factor."""
        known = self._prefill.get(role)
        if known is None or known[0] != tokens:
            known = self._prefill[role] = tokens, {}
        if (found := known[1].get(cached)) is not None:
            return found
        latency = self._latency[role]
        fresh = max(1, tokens - cached)
        attention = tokens * tokens - cached * cached
        alone_s = latency.iteration_s(Batch(fresh, attention, 1))
        full = FULL_BATCH_TOKENS
        base_s = latency.iteration_s(Batch(full, full * full, 1))
        both_s = latency.iteration_s(Batch(full + fresh, full * full + attention, 2))
        found = known[1][cached] = alone_s, max(0.0, both_s - base_s)
        return found

    def batch_s(self, instance: InstanceView) -> float:
        """An iteration of the instance's decodes as they are, without its factor."""
        batch = instance.decodes
        if batch.iteration_s is None:
            batch.iteration_s = self.iteration_s(instance, 0, 0)
        return batch.iteration_s

    def iteration_s(self, instance: InstanceView, requests: int, context_tokens: int) -> float:
        """Of so many requests more than the instance has, without its factor."""
        batch = instance.decodes
        requests += len(batch)
        if not requests:
            return 0.0
        return self._latency[instance.info.role].iteration_s(
            Batch(0, 0, 0, requests, batch.context_tokens + context_tokens)
        )
