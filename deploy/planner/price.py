"""What a deployment costs: GPUs, money per hour, or power.

Money: Splitwise (ISCA'24, section 6) has $17.6 an hour for a machine of eight A100 and $38 for H100.
Power: of an A100's 400 W, Llama-2-70B on eight took 0.95 to 1.0 while it computed prompts of 2,048 to 8,192
tokens, and 0.43 to 0.46 on average over answers (`splitwise/perf_model.csv`, medians). For GPUs of which that
file has no measurement the same shares are taken of their own limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deploy.planner.deployment import Deployment
from deploy.planner.goal import Goal

USD_PER_HOUR = {"a100-80gb": 17.6 / 8, "h100-80gb": 38 / 8}
# The vendor's limit of one GPU, SXM where there is one.
WATTS = {
    "a100-80gb": 400.0,
    "h100-80gb": 700.0,
    "h200-141gb": 700.0,
    "b200-192gb": 1000.0,
    "l40s-48gb": 350.0,
}
PREFILL_SHARE, DECODE_SHARE = 0.97, 0.44


def usd_per_hour(goal: Goal, deployment: Deployment) -> float | None:
    """None where the GPU's price is not known."""
    prices = _by_pool(goal, deployment, USD_PER_HOUR)
    return (
        None if prices is None else prices[0] * deployment.prefill_gpus + prices[1] * deployment.decode_gpus
    )


def watts(goal: Goal, deployment: Deployment) -> float | None:
    """While all instances compute; an unsplit instance may compute prompts at any time. None where the GPU's
    limit is not known."""
    known = pool_watts(goal, deployment)
    return sum(known.values()) if known is not None else None


def pool_watts(goal: Goal, deployment: Deployment) -> dict[str, float] | None:
    """By `prefill`, `decode` or `unsplit`."""
    limits = _by_pool(goal, deployment, WATTS)
    if limits is None:
        return None
    prefill, decode = limits
    if not deployment.is_split:
        return {"unsplit": decode * PREFILL_SHARE * deployment.gpus}
    return {
        "prefill": prefill * PREFILL_SHARE * deployment.prefill_gpus,
        "decode": decode * DECODE_SHARE * deployment.decode_gpus,
    }


def within_power(goal: Goal, deployment: Deployment) -> bool:
    """Whether it keeps the caps (POLCA, arXiv 2308.12908). Raises ValueError where its power is not known."""
    if not goal.max_watts:
        return True
    drawn = pool_watts(goal, deployment)
    if drawn is None:
        name = _names(goal, deployment)
        raise ValueError(f"--max-kw: the power is not known for {name}, but for {', '.join(WATTS)}")
    drawn["all"] = sum(drawn.values())
    return all(drawn.get(pool, 0.0) <= cap for pool, cap in goal.max_watts.items())


def price_of(goal: Goal) -> Callable[[Deployment], float]:
    """What the objective minimises. Raises ValueError where it is not known for the GPU."""
    if goal.objective == "min_gpus":
        return lambda one: float(one.gpus)
    known = usd_per_hour if goal.objective == "cost" else watts

    def price(deployment: Deployment) -> float:
        found = known(goal, deployment)
        if found is None:
            name = _names(goal, deployment)
            table = USD_PER_HOUR if goal.objective == "cost" else WATTS
            raise ValueError(
                f"--objective {goal.objective}: not known for {name}, but for {', '.join(table)}"
            )
        return found

    return price


def _by_pool(goal: Goal, deployment: Deployment, table: Mapping[str, float]) -> tuple[float, float] | None:
    """What a GPU of the prefill and of the decode pool has in a table; None where one is not in it."""
    found = []
    for layout in (deployment.prefill or deployment.decode, deployment.decode):
        hardware = goal.hardware_of(layout)
        value = table.get(hardware.name) if hardware is not None else None
        if value is None:
            return None
        found.append(value)
    return found[0], found[1]


def _names(goal: Goal, deployment: Deployment) -> str:
    layouts = (deployment.prefill or deployment.decode, deployment.decode)
    found = [one.name for one in map(goal.hardware_of, layouts) if one is not None]
    return " and ".join(dict.fromkeys(found)) or "this machine"
