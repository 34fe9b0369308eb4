"""Goals for the planner's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.hardware import hardware_named
from cluster.model_shape import named_shape
from cluster.request import Slo
from deploy.planner.goal import Goal
from deploy.slo_classes import SloClass
from deploy.workload_grammar import make_workload

# The bracket around a goodput.
COARSE = 0.08


def goal_of(
    *,
    model: str = "llama-3-8b",
    gpu: str = "h100",
    gpus: int = 3,
    workload: str = "gamma:rate=8,count=400,cv=1,input=3000,output=8",
    slo: Slo | None = None,
    **more: Any,
) -> Goal:
    """Llama-3-8B on three H100s, unless it says otherwise."""
    return Goal(
        model=model,
        shape=named_shape(model),
        hardware=hardware_named(gpu),
        gpus=gpus,
        requests=make_workload(workload, 0),
        classes=(SloClass(name="all", slo=slo or Slo(ttft_s=0.4, tpot_s=0.05), share=1.0),),
        **{"max_model_len": 4096, **more},
    )


@pytest.fixture(autouse=True, scope="module")
def short_trials() -> Iterator[None]:
    """Few trials, of few requests: what is tested is the search, not the figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploy.planner.trial.RUN_S", 4.0)
        patch.setattr("deploy.planner.trial.LEAST_REQUESTS", 120)
        for place in ("trial", "search"):
            patch.setattr(f"deploy.planner.{place}.TOLERANCE", COARSE)
        yield
