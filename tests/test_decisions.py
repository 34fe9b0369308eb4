"""What is kept of decisions: found by every name a client may have, told in a few lines, bounded."""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import pytest

from cluster.request import NO_SLO, ServeRequest, Slo, Timeline
from router.decisions import Decisions, explanation_text
from router.policy import Decision
from router.predictor import Prediction

PREDICTED = Prediction(
    queue_s=0.1,
    work_s=0.2,
    ttft_s=0.35,
    tpot_s=0.012,
    iteration_s=0.01,
    output_tokens=64,
    chance=0.9,
    cached_tokens=32,
)


def request(name: str, slo: Slo = NO_SLO) -> ServeRequest:
    return ServeRequest(request_id=name, prompt_token_ids=[1] * 50, max_tokens=100, slo=slo)


def decision(predicted: Prediction | None = PREDICTED, prefill: str = "prefill-0") -> Decision:
    return Decision(
        prefill=prefill,
        decode="decode-1",
        link="network",
        reason="the soonest",
        candidates=((prefill, 0.97),),
        predicted=predicted,
    )


def test_a_request_is_found_by_every_name_its_client_may_have() -> None:
    external = {"r1": "cmpl-mine-0", "r2": "chatcmpl-yours"}
    kept = Decisions(external.get)
    for name in ("r1", "r2", "r3"):
        kept.decided(request(name), decision(), 1.0)
    for name in ("r1", "cmpl-mine-0", "cmpl-mine", "mine-0", "mine"):
        found = kept.find(name)
        assert found is not None
        assert found.request == "r1", name
    for name in ("chatcmpl-yours", "yours"):
        found = kept.find(name)
        assert found is not None
        assert found.request == "r2", name
    assert kept.find("r3") is not None
    assert kept.find("theirs") is None


def test_only_the_last_are_kept_with_all_their_names() -> None:
    kept = Decisions(lambda name: f"cmpl-{name}-0", most=2)
    for number in range(5):
        kept.decided(request(f"r{number}"), decision(), 1.0)
    assert len(kept) == 2
    assert kept.find("cmpl-r2") is None
    assert kept.find("cmpl-r4") is not None
    assert len(kept._by_external) == 2 * 4


@pytest.mark.parametrize(
    ("ended", "first_s", "done_s", "kept"),
    [
        ("ok", 0.3, 1.29, True),
        ("ok", 0.6, 1.5, False),  # its first token is late
        ("ok", 0.3, 9.0, False),  # its others are
        ("ok", None, 0.3, False),
        ("rejected", None, 0.0, False),
        ("cancelled", 0.3, 0.5, None),
    ],
)
def test_whether_it_kept_its_slo(ended: str, first_s: float | None, done_s: float, kept: bool | None) -> None:
    decisions = Decisions()
    asked = request("r", Slo(ttft_s=0.5, tpot_s=0.01))
    decisions.decided(asked, decision(), 0.0)
    timeline = Timeline(arrived_s=0.0, first_token_s=first_s, done_s=done_s)
    decisions.ended(asked, timeline, 100 if first_s else 0, ended)
    found = decisions.find("r")
    assert found is not None
    assert found.outcome is not None
    assert found.outcome.kept is kept


def test_it_is_told_in_a_few_lines() -> None:
    decisions = Decisions(lambda name: "chatcmpl-a")
    asked = request("r", Slo(ttft_s=0.5))
    decisions.decided(asked, decision(), 10.0)
    decisions.decided(asked, replace(decision(None), prefill="decode-1", link=""), 10.5)
    decisions.ended(asked, Timeline(arrived_s=10.0, first_token_s=10.4, done_s=12.4), 101, "ok")
    text = explanation_text(json.loads(msgspec.json.encode(decisions.find("r"))))
    assert text.splitlines() == [
        "request chatcmpl-a: 50 prompt tokens, at most 100 of output; SLO TTFT 500 ms",
        "  prefill-0, decode-1 over the network: the soonest",
        "  32 tokens of its prompt were cached there",
        "  weighed: prefill-0 0.97",
        "  attempt 2, after 0.50 s: decode-1 for both phases: the soonest",
        "  weighed: prefill-0 0.97",
        "  ended ok after 2.400 s, 101 tokens; TTFT 400.0 ms; TPOT 20.0 ms; SLO kept",
    ]


def test_predictions_stand_beside_what_came() -> None:
    decisions = Decisions()
    asked = request("r")
    decisions.decided(asked, decision(), 0.0)
    text = explanation_text(json.loads(msgspec.json.encode(decisions.find("r"))))
    assert text.endswith("under way")
    decisions.ended(asked, Timeline(arrived_s=0.0, first_token_s=0.4, done_s=1.4), 101, "ok")
    text = explanation_text(json.loads(msgspec.json.encode(decisions.find("r"))))
    assert text.endswith(
        "ended ok after 1.400 s, 101 tokens; TTFT 400.0 ms (350.0 predicted); TPOT 10.0 ms (12.0 predicted)"
    )
