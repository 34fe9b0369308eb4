"""The one tree of errors that a request, a worker or a spec can end with.

Facts are attributes, so that callers act on them and logs can be searched; `__reduce__` rebuilds an error
from those facts, so it crosses a Ray actor as itself.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ServingError(Exception):
    """Base of the tree.

    Attributes:
        retryable: whether the same request may succeed if sent again.
        http_status: status of the response when the error ends a request.
        reason: short name for the `x-pdserve-reason` header and the metric label.
    """

    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    reason: ClassVar[str] = "internal"

    def __init__(self, **facts: Any) -> None:
        self.facts = facts
        for name, value in facts.items():
            setattr(self, name, value)
        super().__init__(self.describe())

    def describe(self) -> str:
        """One line: what happened, where, what to do."""
        return ", ".join(f"{name}={value}" for name, value in self.facts.items()) or type(self).__name__

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.facts)


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

    def __init__(self, *, file: str, path: str, value: object, allowed: str) -> None:
        super().__init__(file=file, path=path, value=value, allowed=allowed)

    def describe(self) -> str:
        return f"{self.file}: {self.path or '(top level)'}: {self.value!r} is not allowed; {self.allowed}"


class EnvironmentProblem(ServingError):
    """This machine or environment can't do what was asked. Facts: `problem`, `remedy`."""

    reason = "environment"

    problem: str
    remedy: str

    def __init__(self, *, problem: str, remedy: str) -> None:
        super().__init__(problem=problem, remedy=remedy)

    def describe(self) -> str:
        return f"{self.problem}; {self.remedy}"


class IncompatiblePeer(ServingError):
    """Two sides that would misread each other's KV or messages. Facts: `ours`, `theirs`, `instance`."""

    reason = "incompatible-peer"

    ours: object
    theirs: object
    instance: str

    def __init__(self, *, ours: object, theirs: object, instance: str) -> None:
        super().__init__(ours=ours, theirs=theirs, instance=instance)

    def describe(self) -> str:
        return f"instance {self.instance} does not fit: it has {self.theirs}, the cluster has {self.ours}"


class NoInstance(ServingError):
    """No READY instance of a role that the request needs. Facts: `role`, `detail`."""

    retryable = True
    http_status = 503
    reason = "rejected-no-endpoints"

    role: str
    detail: str

    def __init__(self, *, role: str, detail: str = "") -> None:
        super().__init__(role=role, detail=detail)

    def describe(self) -> str:
        return f"no {self.role} instance is ready{': ' + self.detail if self.detail else ''}"


class InstanceLost(ServingError):
    """An instance died or became unreachable while it held the request. Facts: `instance`, `stage`."""

    retryable = True
    http_status = 503
    reason = "instance-lost"

    instance: str
    stage: str

    def __init__(self, *, instance: str, stage: str) -> None:
        super().__init__(instance=instance, stage=stage)

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

    def __init__(self, *, stage: str, instance: str, deadline_s: float) -> None:
        super().__init__(stage=stage, instance=instance, deadline_s=deadline_s)

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

    def __init__(self, *, instance: str, stage: str, detail: str) -> None:
        super().__init__(instance=instance, stage=stage, detail=detail)

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

    def __init__(self, *, position: int, instance: str) -> None:
        super().__init__(position=position, instance=instance)

    def describe(self) -> str:
        return f"after a failure, {self.instance} generated another token than was sent at {self.position}"
