"""Who may fill the slack: requests without an SLO of their own, where others would not notice.

A policy that predicts says what a request costs the others that are there. Those that are not there yet count
as well: what is left to a batch must not be more than what the tightest of the requests of late could bear,
should they come the next moment, and a prompt that could not give way leaves another instance free for them.
With a policy that predicts nothing, a few such requests per instance is all that can be said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from cluster.errors import NoSlack
from cluster.instance import Role
from cluster.request import ServeRequest, Slo
from router.policy import Decision
from router.predictor import Prediction
from router.view import InstanceView

# Others' expected loss by one request, in requests: at the edge of a bound each further one costs as much,
# and they come by the dozen.
MOST_HARM = 0.005
# Behind others it would be among those that delay the next; so much is the error of what is predicted.
MOST_QUEUE_S = 0.05
# Of the tightest bounds of late: what is left is for prompts and answers longer than usual.
BOUND_SHARE = 0.65
# Of an instance's KV cache and of its batch: the rest is for those who come.
ROOM_SHARE = 0.7
# Bounds that nobody has asked for since are forgotten, after one to two times this.
MEMORY_S = 300.0
# Requests per instance of the smaller pool, where nothing is predicted.
PER_INSTANCE = 4


class Instances(Protocol):
    """What is asked of a `Fleet`, whatever its links are."""

    def of(self, role: Role) -> Sequence[InstanceView]:
        """The READY ones of a role."""
        ...

    def view_of(self, instance_id: str) -> InstanceView | None:
        """One of them."""
        ...


class Slack:
    """What there is to fill.

    Attributes:
        running: requests that fill it now.
    """

    def __init__(self, fleet: Instances, promised_tpot_s: float = math.inf) -> None:
        """
        Args:
            fleet: the instances.
            promised_tpot_s: the tightest bound that is promised to anybody: answers are long, so room for it
                is left even when nobody has asked for it of late.
        """
        self._fleet = fleet
        self._promised_tpot_s = promised_tpot_s
        self.running = 0
        # The tightest bounds of this period and of the one before.
        self._tightest = self._before = Slo()
        self._since_s = -math.inf

    def came(self, slo: Slo, now_s: float) -> None:
        """A request with these bounds came, to be served or not."""
        self._turn(now_s)
        seen = self._tightest
        if slo.ttft_s < seen.ttft_s or slo.tpot_s < seen.tpot_s:
            self._tightest = Slo(ttft_s=min(slo.ttft_s, seen.ttft_s), tpot_s=min(slo.tpot_s, seen.tpot_s))

    def require(self, request: ServeRequest, decision: Decision, now_s: float) -> None:
        """Raises NoSlack where the request, decided on like this, would take something from others."""
        self._turn(now_s)
        prefill, decode = (self._fleet.view_of(name) for name in (decision.prefill, decision.decode))
        if prefill is None or decode is None:
            return
        predicted = decision.predicted
        output = request.max_tokens if predicted is None else predicted.output_tokens
        why = _said_busy(prefill) or _said_busy(decode)
        why = why or _no_room(decode, len(request.prompt_token_ids) + output)
        if why is None:
            if predicted is None or not predicted.ttft_s:  # a policy that counts tokens
                why = self._too_many()
            else:
                why = self._harmful(predicted, prefill)
        if why is not None:
            raise NoSlack(why=why)

    def _turn(self, now_s: float) -> None:
        if now_s - self._since_s >= MEMORY_S:
            # After a long silence both are over.
            is_next = now_s - self._since_s < 2 * MEMORY_S
            self._before = self._tightest if is_next else Slo()
            self._tightest, self._since_s = Slo(), now_s

    def _too_many(self) -> str | None:
        most = PER_INSTANCE * max(1, min(len(self._fleet.of(role)) or 1 for role in Role))
        return None if self.running < most else f"{self.running} of its kind run already"

    def _harmful(self, predicted: Prediction, prefill: InstanceView) -> str | None:
        if predicted.harm > MOST_HARM:
            return f"others would lose {predicted.harm:.2g} of a request"
        if predicted.queue_s > MOST_QUEUE_S:
            return f"prompts are waiting for {predicted.queue_s * 1e3:.0f} ms"
        tpot_s = BOUND_SHARE * min(self._tightest.tpot_s, self._before.tpot_s, self._promised_tpot_s)
        if predicted.tpot_s > tpot_s:
            return (
                f"a token would take {predicted.tpot_s * 1e3:.1f} ms, and is to leave others room in theirs"
            )
        ttft_s = BOUND_SHARE * min(self._tightest.ttft_s, self._before.ttft_s)
        if predicted.ttft_s > ttft_s and not (prefill.prompts.by_deadline or self._spare(prefill)):
            return f"its prompt takes {predicted.ttft_s * 1e3:.0f} ms, and no other prefill instance is free"
        return None

    def _spare(self, taken: InstanceView) -> bool:
        """Whether a prefill instance has nothing to do."""
        return any(not one.prompts and one is not taken for one in self._fleet.of(Role.PREFILL))


def _said_busy(instance: InstanceView) -> str | None:
    """What the instance says of itself, which has other routers' requests in it; old news where it has none
    of ours, so that one is tried then."""
    if not instance.outstanding_requests:
        return None
    # On a decode instance those that wait for their KV are counted, which is no queue.
    if instance.info.role is Role.PREFILL and instance.load.waiting:
        return f"requests wait on {instance.instance_id}"
    if instance.load.kv_usage > ROOM_SHARE:
        return f"the KV cache of {instance.instance_id} is {instance.load.kv_usage:.0%} full"
    return None


def _no_room(decode: InstanceView, tokens: int) -> str | None:
    facts = decode.info.facts
    # Alone it may be as long as it can be.
    if decode.decodes and not decode.has_room(tokens, ROOM_SHARE):
        return f"the KV cache of {decode.instance_id} is to have room for others"
    if facts is not None and decode.outstanding_requests >= max(1, ROOM_SHARE * facts.max_num_seqs):
        return f"the batch of {decode.instance_id} is to have room for others"
    return None
