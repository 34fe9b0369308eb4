"""What a client says of its request beside the body: SLO, class, session and tenant, in headers.

The names other gateways use are understood too. A header that makes no sense is a 400 before anything is
computed, not a bound that is silently none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from cluster.errors import ServingError
from cluster.request import NO_SLO, Slo
from cluster.slo_spec import SloClassSpec, SloSpec

TTFT_HEADERS = ("x-pdserve-ttft-ms", "x-llm-d-slo-ttft-ms")
TPOT_HEADERS = ("x-pdserve-tpot-ms", "x-llm-d-slo-tpot-ms")
CLASS_HEADER = "x-pdserve-slo-class"
SESSION_HEADER = "x-session-id"
TENANT_HEADER = "x-tenant-id"
# Longer names of sessions, tenants and classes would only fill memory.
LONGEST_NAME = 256


class BadHeader(ServingError):
    """A request header that says nothing we can act on. Facts: `header`, `value`, `allowed`."""

    http_status = 400
    reason = "bad-header"

    header: str
    value: str
    allowed: str

    def describe(self) -> str:
        return f"header {self.header}: {self.value!r} is not allowed; {self.allowed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What is known of a request beside its body.

    Attributes:
        slo_class: name of its class; empty for none.
        priority: of the class; the body's `priority` is added to it.
        session_id, tenant: as the client named them; empty for none.
        fills_slack: whether it is served only where it takes nothing from others.
    """

    slo: Slo = NO_SLO
    slo_class: str = ""
    priority: int = 0
    session_id: str = ""
    tenant: str = ""
    fills_slack: bool = False


NO_TRAITS = Traits()
# Key of an ASGI scope under which a request of this very process has its traits: no client can set it.
SCOPE_KEY = "pdserve.traits"
# Of the HTTP request that is being handled: vLLM's handlers have no way to hand on a header.
CURRENT: ContextVar[Traits] = ContextVar("pdserve_traits", default=NO_TRAITS)


def traits_of(headers: Mapping[str, str], spec: SloSpec) -> Traits:
    """The traits of a request.

    A bound in a header counts before the one of the class; a class that the client names before that of its
    API key, and that before the spec's default.

    Args:
        headers: by name in lower case.

    Raises BadHeader for a bound that is no positive number and a class that the spec does not have.
    """
    name = _class_name(headers, spec)
    of_class = spec.classes[name] if name else SloClassSpec()
    slo = of_class.slo
    ttft_s, tpot_s = _bound_s(headers, TTFT_HEADERS), _bound_s(headers, TPOT_HEADERS)
    if ttft_s is not None or tpot_s is not None:
        slo = Slo(
            ttft_s=slo.ttft_s if ttft_s is None else ttft_s, tpot_s=slo.tpot_s if tpot_s is None else tpot_s
        )
    session_id, tenant = _name(headers, SESSION_HEADER), _name(headers, TENANT_HEADER)
    return Traits(
        slo=slo,
        slo_class=name,
        priority=of_class.priority,
        session_id=session_id,
        tenant=tenant,
        fills_slack=of_class.fills_slack,
    )


def _class_name(headers: Mapping[str, str], spec: SloSpec) -> str:
    if name := _name(headers, CLASS_HEADER):
        if name not in spec.classes:
            known = ", ".join(spec.classes) or "none: name them under 'slo' in the spec"
            raise BadHeader(header=CLASS_HEADER, value=name, allowed=f"the classes are {known}")
        return name
    if spec.by_api_key:
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and (of_key := spec.by_api_key.get(key.strip())) is not None:
            return of_key
    return spec.default or ""


def _bound_s(headers: Mapping[str, str], names: tuple[str, ...]) -> float | None:
    """The first of the headers that is there, in seconds."""
    for name in names:
        if (value := headers.get(name)) is None:
            continue
        try:
            bound_ms = float(value)
        except ValueError:
            bound_ms = math.nan
        if not 0 < bound_ms < math.inf:
            raise BadHeader(header=name, value=value[:LONGEST_NAME], allowed="give milliseconds above 0")
        return bound_ms / 1000
    return None


def _name(headers: Mapping[str, str], header: str) -> str:
    value = headers.get(header, "").strip()
    if len(value) > LONGEST_NAME:
        raise BadHeader(
            header=header, value=value[:20] + "...", allowed=f"use at most {LONGEST_NAME} characters"
        )
    return value


Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class TraitsMiddleware:
    """Reads the headers of every HTTP request into `CURRENT`, or answers 400."""

    def __init__(self, app: Asgi, spec: SloSpec) -> None:
        self._app = app
        self._spec = spec

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            traits = scope.get(SCOPE_KEY) or traits_of(headers, self._spec)
        except BadHeader as error:
            await _refuse(error, send)
            return
        token = CURRENT.set(traits)
        try:
            await self._app(scope, receive, send)
        finally:
            CURRENT.reset(token)


async def _refuse(error: BadHeader, send: Any) -> None:
    body = {"message": str(error), "type": "Bad Request", "param": error.header, "code": error.http_status}
    headers = [(b"content-type", b"application/json"), (b"x-pdserve-reason", error.reason.encode())]
    await send({"type": "http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": body}).encode()})
