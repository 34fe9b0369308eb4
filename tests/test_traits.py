"""SLO, class, session and tenant from headers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from cluster.errors import SpecError
from cluster.request import NO_SLO, Slo
from cluster.slo_spec import SloSpec
from cluster.spec import parse_spec
from router.traits import CURRENT, NO_TRAITS, SCOPE_KEY, BadHeader, Traits, TraitsMiddleware, traits_of

SPEC = SloSpec.model_validate(
    {
        "default": "interactive",
        "classes": {
            "interactive": {"ttft_ms": 300, "tpot_ms": 50},
            "batch": {"priority": 10},
            "agents": {"ttft_ms": 2000, "priority": 1},
            "flex": {"fills_slack": True},
        },
        "by_api_key": {"sk-night": "batch"},
    }
)


def test_without_headers_the_default_class_counts() -> None:
    assert traits_of({}, SPEC) == Traits(slo=Slo(ttft_s=0.3, tpot_s=0.05), slo_class="interactive")
    assert traits_of({}, SloSpec()) == NO_TRAITS


@pytest.mark.parametrize("prefix", ["x-pdserve-", "x-llm-d-slo-"])
def test_a_bound_in_a_header_counts_before_that_of_the_class(prefix: str) -> None:
    traits = traits_of({f"{prefix}ttft-ms": "120.5"}, SPEC)
    assert traits.slo == Slo(ttft_s=0.1205, tpot_s=0.05)
    assert traits_of({f"{prefix}tpot-ms": "20"}, SloSpec()).slo == Slo(tpot_s=0.02)


def test_our_header_counts_before_that_of_others() -> None:
    headers = {"x-llm-d-slo-ttft-ms": "100", "x-pdserve-ttft-ms": "200"}
    assert traits_of(headers, SPEC).slo.ttft_s == 0.2


def test_the_class_is_that_of_the_header_then_of_the_key() -> None:
    key = {"authorization": "Bearer sk-night"}
    assert traits_of(key, SPEC).slo_class == "batch"
    assert traits_of(key, SPEC).priority == 10
    assert traits_of(key, SPEC).slo == NO_SLO
    assert traits_of({**key, "x-pdserve-slo-class": "agents"}, SPEC).slo == Slo(ttft_s=2.0)
    assert traits_of({"authorization": "Bearer sk-other"}, SPEC).slo_class == "interactive"
    assert traits_of({"authorization": "Basic sk-night"}, SPEC).slo_class == "interactive"


def test_a_class_may_fill_slack() -> None:
    assert traits_of({"x-pdserve-slo-class": "flex"}, SPEC).fills_slack
    assert not traits_of({}, SPEC).fills_slack


def test_session_and_tenant() -> None:
    traits = traits_of({"x-session-id": " s1 ", "x-tenant-id": "acme"}, SPEC)
    assert (traits.session_id, traits.tenant) == ("s1", "acme")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "fast", ""])
@pytest.mark.parametrize("header", ["x-pdserve-ttft-ms", "x-llm-d-slo-tpot-ms"])
def test_a_bound_that_is_no_positive_number_is_refused(header: str, value: str) -> None:
    with pytest.raises(BadHeader, match=header) as caught:
        traits_of({header: value}, SPEC)
    assert caught.value.http_status == 400


def test_an_unknown_class_is_refused_with_the_names() -> None:
    with pytest.raises(BadHeader, match="interactive, batch, agents, flex"):
        traits_of({"x-pdserve-slo-class": "gold"}, SPEC)
    with pytest.raises(BadHeader, match="under 'slo' in the spec"):
        traits_of({"x-pdserve-slo-class": "gold"}, SloSpec())


def test_a_name_without_end_is_refused() -> None:
    with pytest.raises(BadHeader, match="at most 256"):
        traits_of({"x-session-id": "s" * 257}, SPEC)


@pytest.mark.parametrize(
    ("slo", "path", "told"),
    [
        ({"default": "gold"}, "slo", "classes are none"),
        ({"classes": {"a": {}}, "by_api_key": {"k": "b"}}, "slo", "names class 'b', the classes are a"),
        ({"classes": {"a": {"ttft_ms": 9, "fills_slack": True}}}, "slo.classes.a", "has no bounds"),
        ({"classes": {"a": {"ttft_ms": 0}}}, "slo.classes.a.ttft_ms", "greater than 0"),
        ({"classes": {"a": {"ttft_ms": math.inf}}}, "slo.classes.a.ttft_ms", "finite"),
        ({"class": {}}, "slo.class", "no such key; the keys here are by_api_key, classes, default"),
        ({"classes": {"a": {"ttft": 1}}}, "slo.classes.a.ttft", "no such key"),
    ],
)
def test_a_wrong_slo_section_is_refused(slo: dict[str, Any], path: str, told: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec({"model": "m", "slo": slo})
    assert caught.value.path == path
    assert told in caught.value.allowed


async def call(headers: dict[str, str], **scope: Any) -> tuple[list[dict[str, Any]], list[Traits]]:
    """(what was sent, what the app saw) of one request."""
    sent: list[dict[str, Any]] = []
    seen: list[Traits] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(CURRENT.get())

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body is not read here")

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await TraitsMiddleware(app, SPEC)({"type": "http", "headers": raw, **scope}, receive, send)
    return sent, seen


async def test_handlers_see_the_traits_of_their_request_and_nobody_else() -> None:
    sent, seen = await call({"X-PDServe-SLO-Class": "batch"})
    assert not sent
    assert [traits.slo_class for traits in seen] == ["batch"]
    assert CURRENT.get() is NO_TRAITS


async def test_a_request_of_this_process_brings_its_traits() -> None:
    ours = Traits(fills_slack=True)
    sent, seen = await call({"x-pdserve-slo-class": "batch"}, **{SCOPE_KEY: ours})
    assert not sent
    assert seen == [ours]


async def test_a_bad_header_is_an_openai_error() -> None:
    sent, seen = await call({"x-pdserve-ttft-ms": "soon"})
    assert not seen
    assert sent[0]["status"] == 400
    assert (b"x-pdserve-reason", b"bad-header") in sent[0]["headers"]
    error = json.loads(sent[1]["body"])["error"]
    assert error["param"] == "x-pdserve-ttft-ms"
    assert error["code"] == 400
