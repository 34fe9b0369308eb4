"""What is planned for: a model on GPUs, a workload, its SLOs, and what is wanted most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

from cluster.errors import ServingError
from cluster.hardware import Hardware, hardware_named
from cluster.latency import LatencyModel, ProfiledLatency, load_profile
from cluster.model_shape import ModelShape
from cluster.roofline import RooflineLatency
from cluster.sim_spec import NetworkSpec
from deploy.planner.deployment import Layout
from deploy.planner.fleet import Fleet
from deploy.slo_classes import SloClass, assign_slo_classes
from deploy.workload import WorkloadRequest, mean_rate_rps, percentile, rescale

Objective = Literal["goodput_per_gpu", "min_gpus", "cost", "energy"]


class Infeasible(ServingError):
    """No deployment within what is given does what is asked. Facts: `why`, `remedies`."""

    reason = "infeasible"

    why: str
    remedies: tuple[str, ...]

    def describe(self) -> str:
        return "; ".join((self.why, *self.remedies))


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A question to the planner.

    Attributes:
        model: as the spec shall name it.
        shape: None where profiles say all.
        hardware: of every GPU; None with profiles of CPU engines, or with a fleet.
        fleet: GPUs of each type, by its name, where there are several; a pool has GPUs of one type, and the
            two pools may have different ones.
        profiles: files that `pdserve profile` wrote, by the layout that they were measured with, instead of
            the roofline; then these are the layouts that there are.
        gpus: at most so many; without hardware, so many ranks; of a fleet, all.
        gpus_per_node: an instance has all of its GPUs on one node.
        requests: the workload, at the rate that must be held.
        classes: SLO classes; each request is in one of them.
        attainment: share of the requests that shall keep both bounds, 0 to 1.
        each_class: whether that is of each class, and not only of all requests together.
        pipeline: whether layouts with pipeline stages may be chosen, which in decode instances only twins can
            serve yet.
        seeds: parts of the workload that a figure is the mean of.
        max_model_len: of the engines.
        max_watts: most power that may be drawn, of `all`, of `prefill` or of `decode` instances; none else.
        base: keys of a spec that the plan's spec begins with: engine options, ingress, deadlines, ...
        node_gbps: network between nodes, per GPU and direction; None for the hardware's.
    """

    model: str
    shape: ModelShape | None
    hardware: Hardware | None
    gpus: int
    requests: Sequence[WorkloadRequest]
    classes: tuple[SloClass, ...]
    gpus_per_node: int = 8
    profiles: Mapping[Layout, str] = field(default_factory=dict)
    fleet: Mapping[str, int] = field(default_factory=dict)
    attainment: float = 0.9
    each_class: bool = False
    objective: Objective = "goodput_per_gpu"
    pipeline: bool = False
    seeds: int = 3
    max_model_len: int = 16_384
    node_gbps: float | None = None
    max_watts: Mapping[str, float] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rate_rps(self) -> float:
        """That must be held."""
        return mean_rate_rps(self.requests)

    @property
    def room(self) -> Fleet:
        """The GPUs that there are."""
        return Fleet(self.fleet or {"": self.gpus})

    def hardware_of(self, layout: Layout) -> Hardware | None:
        """Of an instance; None for CPU engines."""
        return hardware_named(layout.gpu) if layout.gpu else self.hardware

    def latency(self, layout: Layout) -> LatencyModel:
        """Iteration times of an instance."""
        if self.profiles:
            return ProfiledLatency(load_profile(self.profiles[layout]))
        hardware = self.hardware_of(layout)
        assert self.shape is not None
        assert hardware is not None
        network = NetworkSpec(gpus_per_node=self.gpus_per_node, nic_gbps=self.node_gbps)
        hardware = network.joining(hardware)
        return RooflineLatency(
            self.shape, hardware, layout.tensor, layout.pipeline, data_parallel_size=layout.data
        )

    def part(
        self, seed: int, count: int, rate_rps: float
    ) -> tuple[list[WorkloadRequest], tuple[SloClass, ...]]:
        """So many requests in a row, from a place that the seed picks, at that mean rate; and their classes.

        The workload is a ring: behind its last request its first one comes, with a prompt and a session of
        its own, as nothing says that it would find its blocks again.
        """
        whole = self.requests
        first = Random(f"{seed}/part").randrange(len(whole)) if seed else 0
        round_s = whole[-1].arrival_s + 1 / self.rate_rps
        names = 1 + max((max(request.hash_ids, default=0) for request in whole), default=0)
        part = []
        for place in range(first, first + count):
            rounds, index = divmod(place, len(whole))
            one = whole[index]
            arrival_s = one.arrival_s + round_s * rounds - whole[first].arrival_s
            if rounds and (one.hash_ids or one.session_id):
                one = replace(
                    one,
                    hash_ids=tuple(name + rounds * names for name in one.hash_ids),
                    session_id=one.session_id and f"{one.session_id}/{rounds}",
                )
            part.append(replace(one, arrival_s=arrival_s))
        return rescale(part, rate_rps=rate_rps), assign_slo_classes(
            part, self.classes, Random(f"{seed}/classes")
        )

    def describe_workload(self) -> str:
        """One line."""
        prompts = [request.input_tokens for request in self.requests]
        answers = [request.output_tokens for request in self.requests]
        prompt, answer = (
            f"{percentile(lengths, 50):,.0f} tokens (99th percentile {percentile(lengths, 99):,.0f})"
            for lengths in (prompts, answers)
        )
        count = len(self.requests)
        return f"{count:,} requests at {self.rate_rps:.3g}/s, prompts of {prompt}, answers of {answer}"
