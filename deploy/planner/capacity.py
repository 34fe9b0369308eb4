"""What an instance could do at most, without queues: by which candidates are ordered, and dropped unseen.

A prefill instance computes prompts back to back. A decode instance holds the largest batch whose iteration
keeps the bound and whose KV fits; a request takes its part of those iterations. Real goodput is below, but
for requests that may be refused (a tenth of them, the costly ones first).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from statistics import fmean

from cluster.instance import Role
from cluster.latency import EMPTY_BATCH, Batch, LatencyModel, group_s
from cluster.placement import place
from cluster.request import Slo
from cluster.sim_options import DEFAULT_KV_TOKENS, GPU_MEMORY_UTILIZATION, kv_memory_bytes
from deploy.planner.deployment import Deployment, Layout
from deploy.planner.fleet import Fleet
from deploy.planner.goal import Goal, Infeasible
from deploy.slo_classes import assign_slo_classes
from deploy.workload import WorkloadRequest, percentile
from router.predictor import Predictor

# Requests that stand for the workload in sums.
SAMPLE = 512
# From where on transfers wait for each other: then instances of both pools are put on each node.
BUSY_NETWORK = 0.25
# Groups of more GPUs are not tried: a node or four is what mixtures of experts are served on in the field.
MOST_GROUP_GPUS = 32
# A closed form that is so many times another is not wrong about which is better.
SURELY = 1.25
# Of the bound on the first token, what a prompt may take alone without waiting being short of time.
PART_OF_TTFT = 1 / 3
# vLLM 0.32's default on large GPUs (`max_num_seqs`).
MOST_DECODES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Some requests of the workload, each with its SLO."""

    requests: tuple[WorkloadRequest, ...]
    slos: tuple[Slo, ...]

    @classmethod
    def of(cls, goal: Goal) -> Sampled:
        step = max(1, len(goal.requests) // SAMPLE)
        requests = tuple(goal.requests[::step])
        classes = assign_slo_classes(requests, goal.classes, Random("0/classes"))
        return cls(requests=requests, slos=tuple(found.slo for found in classes))


class Capacity:
    """Closed forms for one goal, by layout."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._sample = Sampled.of(goal)
        self._context = fmean(r.input_tokens + r.output_tokens / 2 for r in self._sample.requests)
        self._prefill_s: dict[Layout, float] = {}
        self._decode_s: dict[Layout, float] = {}

    def layouts(self) -> tuple[Layout, ...]:
        """That hold the model and one longest request. Raises Infeasible where none does."""
        goal = self._goal
        found = tuple(layout for layout in _all_layouts(goal) if self.kv_tokens(layout) >= goal.max_model_len)
        if not found:
            raise self._too_large()
        return found

    def kv_tokens(self, layout: Layout) -> int:
        """In the KV cache of an instance; negative where not even the weights fit."""
        goal = self._goal
        hardware = goal.hardware_of(layout)
        if goal.shape is None or hardware is None:
            return DEFAULT_KV_TOKENS
        left = kv_memory_bytes(goal.shape, hardware, layout.ranks, data_parallel_size=layout.data)
        return int(left / goal.shape.kv_bytes_per_token_and_rank(layout.tensor, layout.pipeline))

    def prefill_rps(self, layout: Layout) -> float:
        """Prompts that an instance or group computes in a second."""
        if layout not in self._prefill_s:
            predictor = Predictor({Role.PREFILL: self._goal.latency(layout)})
            self._prefill_s[layout] = fmean(
                predictor.prefill_s(Role.PREFILL, request.input_tokens)[1]
                for request in self._sample.requests
            )
        return layout.pipeline * layout.data / self._prefill_s[layout]

    def decode_rps(self, layout: Layout) -> float:
        """Answers that an instance or group gives in a second, each token within its bound; 0 for none."""
        if layout not in self._decode_s:
            latency = self._goal.latency(layout)
            memory = self.kv_tokens(layout) / self._context
            token_s = {
                slo.tpot_s: self._token_s(latency, slo.tpot_s, memory) for slo in set(self._sample.slos)
            }
            self._decode_s[layout] = fmean(
                request.output_tokens * token_s[slo.tpot_s]
                for request, slo in zip(self._sample.requests, self._sample.slos, strict=True)
            )
        return layout.pipeline * layout.data / self._decode_s[layout]

    def for_prefill(self, layouts: Sequence[Layout]) -> tuple[Layout, ...]:
        """Without groups that are surely worse than another layout of as few GPUs that is quick enough."""
        quick_s = PART_OF_TTFT * max(slo.ttft_s for slo in self._sample.slos)
        prompt = round(percentile([r.input_tokens for r in self._sample.requests], 90))

        def alone_s(layout: Layout) -> float:
            return max(quick_s, self._goal.latency(layout).iteration_s(Batch(prompt, prompt * prompt, 1)))

        return _not_surely_worse(layouts, self.prefill_rps, alone_s)

    def for_decode(self, layouts: Sequence[Layout]) -> tuple[Layout, ...]:
        """Without groups that are surely worse than another layout of as few GPUs."""
        return _not_surely_worse(layouts, self.decode_rps, lambda layout: 0.0)

    def rps(self, deployment: Deployment) -> float:
        """Of a whole deployment, each pool at its own work."""
        decode = self.decode_rps(deployment.decode)
        if deployment.prefill is None:
            both_s = 1 / self.prefill_rps(deployment.decode) + 1 / decode
            return deployment.decode_count / both_s
        prefill = self.prefill_rps(deployment.prefill)
        return min(deployment.prefill_count * prefill, deployment.decode_count * decode)

    def network_share(self, deployment: Deployment) -> float:
        """Of what the NICs of the smaller pool carry, the part that KV takes at `rps` where all of it moves
        between nodes; 0 where nothing is known of the network."""
        goal = self._goal
        if goal.shape is None or deployment.prefill is None:
            return 0.0
        carried = []
        pools = ((deployment.prefill, deployment.prefill_gpus), (deployment.decode, deployment.decode_gpus))
        for layout, gpus in pools:
            hardware = goal.hardware_of(layout)
            if hardware is None:
                return 0.0
            nic = goal.node_gbps * 1e9 / 8 if goal.node_gbps else hardware.nic_bytes_per_s
            carried.append(nic * gpus)
        kv_bytes = goal.shape.kv_bytes_per_token * fmean(r.input_tokens for r in self._sample.requests)
        return self.rps(deployment) * kv_bytes / min(carried)

    def can_colocate(self, deployment: Deployment) -> bool:
        """Whether there are several nodes, enough of them, and one of them has instances of both pools."""
        goal, per_node = self._goal, self._goal.gpus_per_node
        if deployment.prefill is None or deployment.prefill.gpu != deployment.decode.gpu:
            return False
        if max(deployment.prefill.data, deployment.decode.data) > 1:  # groups are placed as they are
            return False
        if goal.hardware_of(deployment.decode) is None or deployment.gpus <= per_node:
            return False
        if max(deployment.prefill.gpus, deployment.decode.gpus) > per_node:
            return False
        counts = {"prefill": deployment.prefill_count, "decode": deployment.decode_count}
        ranks = {"prefill": deployment.prefill.gpus, "decode": deployment.decode.gpus}
        placed = place(counts, ranks, per_node, mixed=True)
        nodes = {role: {one.node for one in placed if one.instance_id.startswith(role)} for role in counts}
        enough = len(nodes["prefill"] | nodes["decode"]) <= -(-goal.gpus // per_node)
        return enough and bool(nodes["prefill"] & nodes["decode"])

    def placed(self, deployment: Deployment) -> Deployment:
        """Colocated where the network would be busy with KV otherwise."""
        if self.network_share(deployment) > BUSY_NETWORK and self.can_colocate(deployment):
            return replace(deployment, colocated=True)
        return deployment

    def most_rps(self, deployment: Deployment) -> float:
        """Where decode instances compute prompts too, as the router lets them while they have time."""
        if deployment.prefill is None:
            return self.rps(deployment)
        prefill, decode = self.prefill_rps(deployment.prefill), self.decode_rps(deployment.decode)
        also = self.prefill_rps(deployment.decode)
        # At r requests/s they have r / decode + (r - those of the prefill pool) / also to do in a second.
        shared = (deployment.decode_count + deployment.prefill_count * prefill / also) / (
            1 / also + 1 / decode
        )
        return min(shared, deployment.decode_count * decode)

    def require_possible(self, layouts: Iterable[Layout]) -> None:
        """Raises Infeasible, with the least that the hardware could do, where too few requests can keep their
        SLO even alone on the fastest layout."""
        ttft: list[float] = []
        tpot: list[float] = []
        latencies = [(self._goal.latency(layout), [EMPTY_BATCH] * (layout.data - 1)) for layout in layouts]
        kept = 0
        for request, slo in zip(self._sample.requests, self._sample.slos, strict=True):
            prompt = request.input_tokens
            alone, next_token = Batch(prompt, prompt * prompt, 1), Batch(0, 0, 0, 1, prompt)
            ttft.append(min(group_s(one, [alone, *others]) for one, others in latencies))
            tpot.append(min(group_s(one, [next_token, *others]) for one, others in latencies))
            kept += ttft[-1] <= slo.ttft_s and (tpot[-1] <= slo.tpot_s or request.output_tokens == 1)
        target = self._goal.attainment
        if kept < target * len(ttft):
            share = 100 * target
            least = percentile(ttft, share) * 1e3, percentile(tpot, share) * 1e3
            raise Infeasible(
                why=f"{kept / len(ttft):.1%} of the requests could keep their SLO if each were alone, and "
                f"{target:.0%} shall: on this hardware {share:.0f} % of the prompts take up to "
                f"{least[0]:,.0f} ms, and a token {least[1]:.1f} ms",
                remedies=("loosen the bounds, take faster GPUs or shorter prompts",),
            )

    def _too_large(self) -> Infeasible:
        """For a model that no node holds."""
        goal = self._goal
        assert goal.shape is not None
        need = goal.shape.weight_bytes / 1e9
        largest = []
        for gpu in goal.room.types:
            hardware = goal.hardware_of(Layout(1, gpu=gpu))
            assert hardware is not None
            most = min(goal.room.of(gpu), goal.gpus_per_node)
            largest.append((hardware.memory_bytes * GPU_MEMORY_UTILIZATION * most, most, hardware.name))
        room, most, name = max(largest)
        return Infeasible(
            why=f"{goal.shape.name} has {need:,.0f} GB of weights, and an instance of at most "
            f"{most} {name} on one node has {room / 1e9:,.0f} GB for them, its "
            f"activations and the KV of a request of {goal.max_model_len:,} tokens",
            remedies=(
                "take GPUs with more memory, or a smaller --max-model-len or model"
                + (", or more GPUs: a group of instances shares the experts" if goal.shape.experts else ""),
            ),
        )

    def _token_s(self, latency: LatencyModel, bound_s: float, memory: float) -> float:
        """Seconds of an instance for one token of a batch as large as the bound and the memory allow."""
        context = self._context
        low, high = 1, max(1, min(MOST_DECODES, int(memory)))
        if latency.iteration_s(Batch(0, 0, 0, 1, int(context))) > bound_s:
            return latency.iteration_s(Batch(0, 0, 0, 1, int(context)))
        while low < high:
            middle = (low + high + 1) // 2
            if latency.iteration_s(Batch(0, 0, 0, middle, int(middle * context))) <= bound_s:
                low = middle
            else:
                high = middle - 1
        return latency.iteration_s(Batch(0, 0, 0, low, int(low * context))) / low


def _not_surely_worse(
    layouts: Sequence[Layout], rps: Callable[[Layout], float], alone_s: Callable[[Layout], float]
) -> tuple[Layout, ...]:
    def beats(other: Layout, one: Layout) -> bool:
        return (
            other.gpus <= one.gpus
            and other.gpu == one.gpu
            and rps(other) / other.gpus > SURELY * rps(one) / one.gpus
            and alone_s(other) <= alone_s(one)
        )

    return tuple(one for one in layouts if one.data == 1 or not any(beats(o, one) for o in layouts))


def _all_layouts(goal: Goal) -> Iterator[Layout]:
    if goal.profiles:
        yield from sorted(layout for layout in goal.profiles if layout.gpus <= goal.gpus)
        return
    assert goal.shape is not None
    for gpu in goal.room.types:
        node = min(goal.room.of(gpu), goal.gpus_per_node)
        tensor = 1
        while tensor <= node:
            if not goal.shape.heads % tensor:
                for pipeline in range(1, node // tensor + 1 if goal.pipeline else 2):
                    if not goal.shape.layers % pipeline:
                        yield Layout(tensor, pipeline, gpu)
                yield from _group_layouts(goal, tensor, gpu)
            tensor *= 2


def _group_layouts(goal: Goal, tensor: int, gpu: str) -> Iterator[Layout]:
    """Groups that share the experts, of which each GPU has at least one; a group may fill several nodes."""
    experts = goal.shape.experts if goal.shape else None
    data = 2
    while experts and tensor * data <= min(goal.room.of(gpu), experts.count, MOST_GROUP_GPUS):
        yield Layout(tensor, gpu=gpu, data=data)
        data *= 2


Allowed = Callable[[Deployment], bool]


def _any(_: Deployment) -> bool:
    return True


def splits(
    capacity: Capacity, layouts: Sequence[Layout], fleet: Fleet, allowed: Allowed = _any
) -> list[Deployment]:
    """The best ratios, by closed forms, for every pair of layouts (P/D-Serve, arXiv 2408.08147), the one with
    the most requests per second and GPU first."""
    found: list[Deployment] = []
    for prefill in capacity.for_prefill(layouts):
        for decode in capacity.for_decode(layouts):
            options = []
            for count in range(1, fleet.most(prefill) + 1):
                most = fleet.most(decode, prefill, count)
                sizes = (
                    Deployment(prefill=prefill, prefill_count=count, decode=decode, decode_count=decodes)
                    for decodes in range(most, 0, -1)
                )
                options += list(islice(filter(allowed, sizes), 1))
            if options:
                # Decode instances that have time compute prompts too, which another ratio leaves it.
                ratios = {max(options, key=capacity.rps), max(options, key=capacity.most_rps)}
                found += map(capacity.placed, ratios)
    return sorted(found, key=lambda one: (-capacity.rps(one) / one.gpus, one.gpus, str(one)))


def unsplits(
    capacity: Capacity, layouts: Sequence[Layout], fleet: Fleet, allowed: Allowed = _any
) -> list[Deployment]:
    """Without the split, the one that could do most first."""
    found: list[Deployment] = []
    for layout in layouts:
        sizes = (
            Deployment(prefill=None, prefill_count=0, decode=layout, decode_count=count)
            for count in range(fleet.most(layout), 0, -1)
        )
        found += islice(filter(allowed, sizes), 1)
    return sorted(found, key=lambda one: (-capacity.rps(one) / one.gpus, one.gpus, str(one)))


def front(
    capacity: Capacity,
    layouts: Sequence[Layout],
    fleet: Fleet,
    price: Callable[[Deployment], float],
    allowed: Allowed = _any,
) -> list[Deployment]:
    """Of each pair of layouts, and of each without the split, those than which nothing cheaper could do as
    much by closed form; the cheapest first."""
    found: list[Deployment] = []
    prefills = capacity.for_prefill(layouts)
    for one in layouts:
        sizes = (
            Deployment(prefill=None, prefill_count=0, decode=one, decode_count=count)
            for count in range(1, fleet.most(one) + 1)
        )
        found += _undominated(capacity, filter(allowed, sizes), price)
        for other in capacity.for_decode(layouts) if one in prefills else ():
            pairs = (
                Deployment(prefill=one, prefill_count=count, decode=other, decode_count=decodes)
                for count in range(1, fleet.most(one) + 1)
                for decodes in range(1, fleet.most(other, one, count) + 1)
            )
            found += map(capacity.placed, _undominated(capacity, filter(allowed, pairs), price))
    return sorted(found, key=lambda one: (price(one), -capacity.rps(one), str(one)))


def _undominated(
    capacity: Capacity, sizes: Iterable[Deployment], price: Callable[[Deployment], float]
) -> Iterator[Deployment]:
    apart = together = 0.0
    for one in sorted(sizes, key=lambda one: (price(one), -capacity.rps(one), str(one))):
        rps, most_rps = capacity.rps(one), capacity.most_rps(one)
        if rps > apart or most_rps > together:
            apart, together = max(apart, rps), max(together, most_rps)
            yield one


def neighbours(
    capacity: Capacity, deployment: Deployment, fleet: Fleet, allowed: Allowed = _any
) -> list[Deployment]:
    """With an instance or two more or less of a phase, as far as the GPUs go, and placed the other way."""
    if deployment.prefill is None:
        return []
    found: list[Deployment] = []
    for prefills in range(max(1, deployment.prefill_count - 2), deployment.prefill_count + 3):
        if prefills > fleet.most(deployment.prefill):
            break
        most = fleet.most(deployment.decode, deployment.prefill, prefills)
        sizes = (
            replace(deployment, prefill_count=prefills, decode_count=decodes)
            for decodes in range(most, 0, -1)
        )
        found += islice(filter(allowed, sizes), 1)
    if deployment.colocated:
        found = [one if capacity.can_colocate(one) else replace(one, colocated=False) for one in found]
    if deployment.colocated or capacity.can_colocate(deployment):
        found.append(replace(deployment, colocated=not deployment.colocated))
    found = [one for one in found if one != deployment]
    return sorted(found, key=lambda one: (abs(one.prefill_count - deployment.prefill_count), str(one)))
