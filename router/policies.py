"""The policies by name. A new one is one class, one line here, one test."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cluster.errors import SpecError
from cluster.instance import Role
from cluster.latency import LatencyModel
from cluster.sim_options import twin_options
from cluster.spec import UNSPLIT, ClusterSpec
from router.goodput import Goodput
from router.peers import PowerOfTwo, RoundRobin, SplitwiseJsq
from router.policy import LeastTokens, Policy, Unsplit
from router.predicting_peers import LlmdScorers, Mooncake
from router.predictor import Predictor
from router.prefix_peers import DynamoKv, PrefixAffinity

POLICIES: dict[str, Callable[[Predictor], Policy]] = {
    "goodput": Goodput,
    "least_tokens": lambda predictor: LeastTokens(),
    "round_robin": lambda predictor: RoundRobin(),
    "power_of_two": lambda predictor: PowerOfTwo(),
    "prefix_affinity": lambda predictor: PrefixAffinity(),
    "splitwise_jsq": SplitwiseJsq,
    "mooncake": Mooncake,
    "dynamo_kv": DynamoKv,
    "llmd_scorers": LlmdScorers,
    UNSPLIT: lambda predictor: Unsplit(),
}


# What these decide follows from times.
PREDICTING = frozenset({"goodput", "mooncake", "llmd_scorers"})
# These ask what is in the instances' prefix caches.
PREFIX_AWARE = frozenset({"goodput", "prefix_affinity", "mooncake", "dynamo_kv", "llmd_scorers"})


def predictor_of(spec: ClusterSpec) -> Predictor:
    """What the spec's policy predicts with: what the spec says of the speed of its engines, or what is
    learned from them. Raises SpecError as `twin_options`."""
    if spec.policy not in PREDICTING:
        return Predictor()
    if spec.sim.profile or spec.sim.hardware or spec.sim.step_s or spec.sim.prefill_s_per_token:
        return Predictor(latency_of(spec), load_s=spec.sim.adapter_load_s)
    return Predictor.learning(load_s=spec.sim.adapter_load_s)


def make_policy(name: str, predictor: Predictor | None = None) -> Policy:
    """The policy of that name. Raises SpecError with the names there are."""
    if name not in POLICIES:
        raise SpecError(
            file="(spec)", path="policy", value=name, allowed=f"the policies are {', '.join(POLICIES)}"
        )
    return POLICIES[name](predictor or Predictor())


def latency_of(spec: ClusterSpec) -> Mapping[Role, LatencyModel]:
    """What the spec says of the speed of both roles. Raises SpecError as `twin_options`."""
    return {role: twin_options(spec, role, {}).latency for role in Role}
