"""A cluster for each class of requests, beside one for all."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.request import Slo
from cluster.spec import load_spec
from deploy.cli import main
from deploy.planner import by_class
from deploy.planner.by_class import ByClass, plan_by_class
from deploy.planner.goal import Goal, Infeasible
from deploy.planner.search import plan
from deploy.planner.trial import simulate
from deploy.slo_classes import SloClass
from tests.plans import goal_of, short_trials

__all__ = ["short_trials"]
CHAT = SloClass(name="chat", slo=Slo(ttft_s=0.25, tpot_s=0.03), input_below=3500)
BULK = SloClass(name="bulk", slo=Slo(ttft_s=5.0, tpot_s=0.2), share=1.0)
WORK = "gamma:rate=4,count=300,cv=1,input=3000,output=40"


def two_classes(**more: object) -> Goal:
    goal = goal_of(gpus=6, objective="min_gpus", seeds=1, workload=WORK, **more)
    requests = [
        replace(request, input_tokens=4000 if index % 4 == 0 else 3000)
        for index, request in enumerate(goal.requests)
    ]
    return replace(goal, requests=requests, classes=(CHAT, BULK))


@pytest.fixture(scope="module")
def found() -> ByClass:
    return plan_by_class(two_classes(max_model_len=8192))


def test_each_class_is_planned_for_alone_at_its_rate(found: ByClass) -> None:
    assert found.apart is not None
    assert list(found.apart) == ["chat", "bulk"]
    chat, bulk = found.apart.values()
    assert {request.input_tokens for request in chat.goal.requests} == {3000}
    assert {request.input_tokens for request in bulk.goal.requests} == {4000}
    assert chat.goal.rate_rps == pytest.approx(0.75 * found.together.goal.rate_rps, rel=0.02)
    for made in (chat, bulk):
        assert made.chosen.trial.attainment >= made.goal.attainment
    assert found.apart_price == sum(made.chosen.deployment.gpus for made in (chat, bulk))
    assert found.price == found.together.chosen.deployment.gpus
    assert found.pays == (found.apart_price < found.price)
    assert f"{found.apart_price:,.0f} GPUs apart, {found.price:,.0f} together" in found.to_text()


def test_clusters_of_their_own_have_names_of_their_own(found: ByClass) -> None:
    assert found.apart is not None
    names = [made.to_yaml().split("name: ")[1].split("\n")[0] for made in found.apart.values()]
    assert names == ["plan-chat", "plan-bulk"]


def test_one_cluster_keeps_enough_of_every_class(found: ByClass) -> None:
    trial = found.together.chosen.trial
    least = simulate(found.together.goal, found.together.chosen.deployment, trial.rate_rps, 0)
    of_all = simulate(replace(found.together.goal, each_class=False), trial.deployment, trial.rate_rps, 0)
    assert trial.attainment == least.attainment <= of_all.attainment
    tight = replace(CHAT, slo=Slo(ttft_s=0.25, tpot_s=1e-6))
    goal = two_classes(max_model_len=8192)
    # One of twenty is of this class: enough of all are kept without it, and not of each.
    few = [replace(r, input_tokens=3000 if i % 20 == 0 else 4000) for i, r in enumerate(goal.requests)]
    goal = replace(goal, requests=few, classes=(tight, BULK))
    assert plan(goal).chosen.trial.attainment >= goal.attainment
    with pytest.raises(Infeasible):
        plan_by_class(goal)


def test_what_is_not_there_for_all_is_no_answer(found: ByClass) -> None:
    goal = two_classes(max_model_len=8192)
    apart = [made.chosen.deployment for made in (found.apart or {}).values()]
    assert sum(one.gpus for one in apart) >= 2
    assert by_class._too_much(goal, apart) == ""
    said = by_class._too_much(replace(goal, gpus=1), apart)
    assert said == f"apart they take {sum(one.gpus for one in apart)} GPUs of 1"
    assert "kW of 0.1" in by_class._too_much(replace(goal, max_watts={"all": 100.0}), apart)
    none = replace(found, apart=None, apart_price=math.inf)
    assert not none.pays
    assert "one cluster for all: there is not enough" in none.to_text()
    assert json.loads(json.dumps(none.to_json()))["apart_price"] is None


def test_the_keys_of_a_class_are_its_own() -> None:
    base = {"name": "chat", "slo": {"by_api_key": {"a": "chat", "b": "bulk"}}}
    assert by_class._base_of(replace(two_classes(), base=base), "bulk") == {
        "name": "chat-bulk",
        "slo": {"by_api_key": {"b": "bulk"}},
    }


def test_what_has_no_classes_is_refused() -> None:
    goal = two_classes()
    for changed, says in (
        ({"objective": "goodput_per_gpu"}, "compares what a rate takes"),
        ({"classes": (BULK,)}, "needs several classes"),
        ({"classes": (CHAT, replace(BULK, slo=Slo(tpot_s=0.2)))}, "class bulk has no bound"),
        ({"classes": (CHAT, replace(BULK, name="Bulk/2"))}, "part of a cluster's name"),
        ({"classes": (replace(CHAT, input_below=5000), BULK)}, "class bulk has 0 requests"),
    ):
        with pytest.raises(ValueError, match=says):
            plan_by_class(replace(goal, **changed))


def test_the_command_writes_what_is_to_be_deployed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = tmp_path / "classes.yaml"
    rows = (
        "- {name: chat, ttft_ms: 400, tpot_ms: 40, share: 0.5}\n  - {name: bulk, ttft_ms: 5000, tpot_ms: 200}"
    )
    classes.write_text(f"classes:\n  {rows}\n")
    spec = tmp_path / "plan.yaml"
    words = ["--model", "llama-3-8b", "--gpu", "h100", "--gpus-total", "4", "--isl", "2000", "--osl", "8"]
    words += ["--rate", "5", "--slo", str(classes), "--objective", "min_gpus", "--parts", "1", "--jobs", "1"]
    assert main(["plan", *words, "--by-class", "-o", str(spec)]) == 0
    out = capsys.readouterr().out
    assert "class chat: " in out
    assert "verdict     " in out
    assert set(load_spec(spec).slo.classes) == {"chat", "bulk"}
    assert main(["plan", *words, "--by-class", "--html", str(tmp_path / "page.html")]) == 2
    assert "goes without --ray, --html" in capsys.readouterr().err
