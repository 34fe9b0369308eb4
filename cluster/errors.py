"""The one tree of errors that a request, a worker or a spec can end with.

Facts are attributes, so that callers act on them and logs can be searched; `__reduce__` rebuilds an error
from those facts, so it crosses a Ray actor as itself.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, dataclass_transform


@dataclass_transform(kw_only_default=True)
class ServingError(Exception):
    """Base of the tree. A subclass annotates its facts; they are its keyword arguments and attributes.

    Attributes:
        facts: the facts by name.
        retryable: whether the same request may succeed if sent again.
        http_status: status of the response when the error ends a request.
        reason: short name for the `x-pdserve-reason` header and the metric label.
    """

    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    reason: ClassVar[str] = "internal"

    def __init__(self, **facts: Any) -> None:
        names = [name for name in inspect.get_annotations(type(self)) if name not in _CLASS_FACTS]
        self.facts = {name: facts.pop(name) if name in facts else getattr(type(self), name) for name in names}
        if facts:
            raise TypeError(f"{type(self).__name__} has no fact {', '.join(facts)}")
        for name, value in self.facts.items():
            setattr(self, name, value)
        super().__init__(self.describe())

    def describe(self) -> str:
        """One line: what happened, where, what to do."""
        return ", ".join(f"{name}={value}" for name, value in self.facts.items()) or type(self).__name__

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.facts)


_CLASS_FACTS = ("retryable", "http_status", "reason")


def _rebuild(kind: type[ServingError], facts: dict[str, Any]) -> ServingError:
    return kind(**facts)


class SpecError(ServingError):
    """A spec (or a command line) that can't be deployed.

    Facts: `file`, `path` (where in the file), `value`, `allowed`.
    """

    http_status = 400
    reason = "bad-spec"

    file: str
    path: str
    value: object
    allowed: str

    def describe(self) -> str:
        return f"{self.file}: {self.path or '(top level)'}: {self.value!r} is not allowed; {self.allowed}"


class EnvironmentProblem(ServingError):
    """This machine or environment can't do what was asked. Facts: `problem`, `remedy`."""

    reason = "environment"

    problem: str
    remedy: str

    def describe(self) -> str:
        return f"{self.problem}; {self.remedy}"


class IncompatiblePeer(ServingError):
    """Two sides that would misread each other's KV or messages. Facts: `ours`, `theirs`, `instance`."""

    reason = "incompatible-peer"

    ours: object
    theirs: object
    instance: str

    def describe(self) -> str:
        return f"instance {self.instance} does not fit: it has {self.theirs}, the cluster has {self.ours}"


class NoInstance(ServingError):
    """No READY instance of a role that the request needs. Facts: `role`, `detail`."""

    retryable = True
    http_status = 503
    reason = "rejected-no-endpoints"

    role: str
    detail: str = ""

    def describe(self) -> str:
        return f"no {self.role} instance is ready{': ' + self.detail if self.detail else ''}"


class UnknownInstance(ServingError):
    """There is no READY instance of that name. Facts: `instance`, `known` (places of the spec)."""

    http_status = 404
    reason = "unknown-instance"

    instance: str
    known: tuple[str, ...]

    def describe(self) -> str:
        return f"{self.instance!r} is no instance that is ready; there are {', '.join(self.known)}"


class Rejected(ServingError):
    """The cluster is too busy to keep the request's SLO. Facts: `ttft_s`, `tpot_s` (predicted),
    `ttft_bound_s`, `tpot_bound_s`, `retry_after_s`."""

    retryable = True
    http_status = 429
    reason = "rejected-saturated"

    ttft_s: float
    tpot_s: float
    ttft_bound_s: float
    tpot_bound_s: float
    retry_after_s: int

    def describe(self) -> str:
        kept = (("TTFT", self.ttft_s, self.ttft_bound_s), ("TPOT", self.tpot_s, self.tpot_bound_s))
        said = [
            f"{name} would be {value * 1e3:.0f} ms, its bound is {bound * 1e3:g} ms"
            for name, value, bound in kept
            if bound < float("inf")
        ]
        return f"too busy for this request's SLO: {'; '.join(said)}; try again in {self.retry_after_s} s"


class RejectedAsCostly(ServingError):
    """It might keep its SLO, and more of the others' would be lost by it. Facts: `chance` (to keep its own),
    `harm` (what others lose, in requests), `ttft_s` (predicted), `retry_after_s`."""

    retryable = True
    http_status = 429
    reason = "rejected-costly"

    chance: float
    harm: float
    ttft_s: float
    retry_after_s: int

    def describe(self) -> str:
        return (
            f"too busy for this request now: TTFT would be {self.ttft_s * 1e3:.0f} ms, its chance to keep "
            f"its SLO {self.chance:.0%}, and others would lose {self.harm:.2f} of theirs; "
            f"try again in {self.retry_after_s} s"
        )


class RejectedForOthers(ServingError):
    """There is room, and it is reserved for others. Facts: `why`, `ttft_s` (predicted), `limit_s` (the
    longest that this request may wait now), `retry_after_s`."""

    retryable = True
    http_status = 429
    reason = "rejected-reserved"

    why: str
    ttft_s: float
    limit_s: float
    retry_after_s: int

    def describe(self) -> str:
        return (
            f"too busy for this request now, as {self.why}: TTFT would be {self.ttft_s * 1e3:.0f} ms, "
            f"and what comes later than {self.limit_s * 1e3:.0f} ms is for others; "
            f"try again in {self.retry_after_s} s"
        )


class TooLate(ServingError):
    """The first token did not come within the time that its SLO makes sense of. Facts: `stage`, `waited_s`,
    `bound_s` (on its TTFT)."""

    retryable = True
    http_status = 429
    reason = "rejected-ttl-expired"

    stage: str
    waited_s: float
    bound_s: float

    def describe(self) -> str:
        return (
            f"no first token after {self.waited_s:.3g} s (stage {self.stage}), its bound was "
            f"{self.bound_s * 1e3:g} ms: the answer would be too late"
        )


class InstanceBusy(ServingError):
    """An instance refused a request, as it would be late there. Facts: `instance`, `wait_s` (until its
    prompt could begin), `retry_after_s`."""

    retryable = True
    http_status = 429
    reason = "rejected-saturated"

    instance: str
    wait_s: float
    retry_after_s: int = 1

    def describe(self) -> str:
        return (
            f"instance {self.instance} is busy for {self.wait_s:.3g} s; try again in {self.retry_after_s} s"
        )


class NoSlack(ServingError):
    """The request is to be served only where it takes nothing from others, and there is no such place now.
    Facts: `why`, `retry_after_s`."""

    retryable = True
    http_status = 429
    reason = "rejected-no-slack"

    why: str
    retry_after_s: int = 1

    def describe(self) -> str:
        return f"no slack for this request now, as {self.why}; try again in {self.retry_after_s} s"


class InstanceLost(ServingError):
    """An instance died or became unreachable while it held the request. Facts: `instance`, `stage`."""

    retryable = True
    http_status = 503
    reason = "instance-lost"

    instance: str
    stage: str

    def describe(self) -> str:
        return f"instance {self.instance} was lost in stage {self.stage}"


class StageTimeout(ServingError):
    """A stage did not end within its deadline. Facts: `stage`, `instance`, `deadline_s`."""

    retryable = True
    http_status = 504
    reason = "stage-timeout"

    stage: str
    instance: str
    deadline_s: float

    def describe(self) -> str:
        return f"stage {self.stage} on {self.instance} made no progress for {self.deadline_s:g} s"


class EngineFailure(ServingError):
    """An engine ended the request with an error. Facts: `instance`, `stage`, `detail`."""

    retryable = True
    http_status = 500
    reason = "engine-failure"

    instance: str
    stage: str
    detail: str

    def describe(self) -> str:
        return f"engine {self.instance} failed the request in stage {self.stage}: {self.detail}"


class Draining(ServingError):
    """The ingress is shutting down and takes no new request."""

    retryable = True
    http_status = 503
    reason = "draining"

    def describe(self) -> str:
        return "the server is draining and takes no new requests"


class ReplayDiverged(ServingError):
    """A request was moved after a failure, and the new engine's tokens differ from those already sent.

    Facts: `position` (index of the first differing output token), `instance`.
    """

    retryable = True
    http_status = 500
    reason = "replay-diverged"

    position: int
    instance: str

    def describe(self) -> str:
        return f"after a failure, {self.instance} generated another token than was sent at {self.position}"
