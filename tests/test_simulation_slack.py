"""Batch work beside interactive requests, simulated: these keep their SLOs, and it gets the rest."""

from __future__ import annotations

from random import Random

import pytest

from cluster.request import Slo
from cluster.spec import parse_spec
from deploy.simulator.result import SimulatedRequest
from deploy.simulator.run import Simulation
from deploy.slo_classes import SloClass
from deploy.workload import WorkloadRequest

CHAT = SloClass(name="chat", slo=Slo(ttft_s=0.4, tpot_s=0.02))
BATCH = SloClass(name="batch", fills_slack=True)
SECONDS = 20.0
BATCH_RPS = 40.0


def arrivals(rate_rps: float, rng: Random, longest_input: int, longest_output: int) -> list[WorkloadRequest]:
    """Poisson, lengths of any size up to these."""
    requests = []
    now_s = rng.expovariate(rate_rps)
    while now_s < SECONDS:
        input_tokens, output_tokens = rng.randint(100, longest_input), rng.randint(50, longest_output)
        requests.append(
            WorkloadRequest(arrival_s=now_s, input_tokens=input_tokens, output_tokens=output_tokens)
        )
        now_s += rng.expovariate(rate_rps)
    return requests


def simulate(
    chat_rps: float, order: str, batch: SloClass | None
) -> tuple[list[SimulatedRequest], list[SimulatedRequest]]:
    """The interactive requests and the others, on two and two instances."""
    spec = parse_spec(
        {
            "model": "m", "device": "cpu", "engine": "sim", "prefill_order": order,
            "sim": {"hardware": "h100", "shape": "llama-3-8b", "max_model_len": 8192},
            "prefill": {"count": 2}, "decode": {"count": 2},
        }
    )  # fmt: skip
    asked = [(one, CHAT) for one in arrivals(chat_rps, Random("chat"), 1500, 300)]
    if batch is not None:
        asked += [(one, batch) for one in arrivals(BATCH_RPS, Random("batch"), 4000, 600)]
    asked.sort(key=lambda pair: pair[0].arrival_s)
    found = Simulation(spec, [one for one, _ in asked], [of for _, of in asked]).run().requests
    return [r for r in found if r.slo_class == "chat"], [r for r in found if r.slo_class == "batch"]


def kept(requests: list[SimulatedRequest]) -> float:
    return sum(request.met for request in requests) / len(requests)


def tokens(requests: list[SimulatedRequest]) -> int:
    return sum(one.input_tokens + one.output_tokens for one in requests if one.status == "ok")


@pytest.mark.parametrize("order", ["arrival", "deadline"])
@pytest.mark.parametrize(("chat_rps", "least_work"), [(10.0, 1.0), (40.0, 0.15), (75.0, 0.0)])
def test_interactive_requests_keep_their_slos_beside_a_batch(
    chat_rps: float, least_work: float, order: str
) -> None:
    alone, _ = simulate(chat_rps, order, None)
    chat, batch = simulate(chat_rps, order, BATCH)
    assert kept(chat) >= kept(alone) - 0.01
    assert tokens(batch) >= least_work * tokens(chat)
    assert {request.status for request in batch} <= {"ok", "rejected"}


def test_the_same_work_without_that_mark_takes_it_from_them() -> None:
    """Though who costs others more than it gets is refused: of those that there are, not of those to come."""
    unmarked, _ = simulate(10.0, "arrival", SloClass(name="batch"))
    marked, _ = simulate(10.0, "arrival", BATCH)
    assert kept(unmarked) < kept(marked) - 0.02
