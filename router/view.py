"""What a policy sees: the READY instances, with the router's own reservations in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Protocol

from cluster.adapter_slots import AdapterSlots
from cluster.instance import InstanceInfo, InstanceLoad, Role
from cluster.request import ServeRequest
from router.decode_batch import DecodeBatch
from router.pace import Pace, PromptPace
from router.prefix_index import Prefixes
from router.prompt_queue import PromptPool, PromptQueue


class Loaded(Protocol):
    """Whoever knows the load of an instance."""

    @property
    def load(self) -> InstanceLoad: ...


@dataclass(slots=True, kw_only=True, eq=False)
class InstanceView:
    """One READY instance. Its owner keeps it up to date; a policy only reads it.

    Attributes:
        outstanding_tokens: tokens this router has sent it and that have not ended yet. The router's own
            count, so two picks in a row see each other; the reported load lags behind.
        outstanding_requests: the requests they belong to.
        prompts, decodes: what the router believes it has to compute.
        adapters: what the router believes it has of LoRA adapters, from what was sent there.
        prefill_pace, decode_pace: how many times as long as predicted it takes.
        link: knows what the instance last said of itself.
    """

    info: InstanceInfo
    outstanding_tokens: int = 0
    outstanding_requests: int = 0
    prompts: PromptQueue = field(default_factory=PromptQueue)
    decodes: DecodeBatch = field(default_factory=DecodeBatch)
    adapters: AdapterSlots = field(default_factory=AdapterSlots)
    prefill_pace: PromptPace = field(default_factory=PromptPace)
    decode_pace: Pace = field(default_factory=Pace)
    link: Loaded | None = None

    @property
    def instance_id(self) -> str:
        return self.info.instance_id

    def leave_pool(self) -> None:
        """Its role has no such instance any more."""
        self.prompts.leave_pool()
        self.decodes.leave_pool()

    def has_room(self, tokens: int, share: float = 1.0) -> bool:
        """Whether all that decodes there and so many tokens more, each at its longest, fit into that share of
        its KV cache."""
        facts = self.info.facts
        return facts is None or self.decodes.peak_tokens + tokens <= share * facts.kv_capacity_tokens

    @property
    def load(self) -> InstanceLoad:
        """What the instance last said of itself."""
        return self.link.load if self.link is not None else InstanceLoad()


@dataclass(frozen=True, slots=True)
class LastSeen:
    """A load that does not change."""

    load: InstanceLoad


def as_value(view: InstanceView) -> InstanceView:
    """A copy that nobody keeps up to date."""
    return replace(
        view,
        prompts=deepcopy(view.prompts),
        decodes=deepcopy(view.decodes),
        adapters=deepcopy(view.adapters),
        prefill_pace=deepcopy(view.prefill_pace),
        decode_pace=deepcopy(view.decode_pace),
        link=LastSeen(view.load),
    )


class View(Protocol):
    """The READY instances at the time of a decision. A policy that must look at a cluster of any size in
    little time asks for the least loaded ones, not for all."""

    def of(self, role: Role) -> tuple[InstanceView, ...]:
        """All of a role, in the order of the spec."""
        ...

    def by_tokens(self, role: Role) -> Iterator[InstanceView]:
        """Those of a role from the fewest outstanding tokens on; ties in the order of the spec."""
        ...

    def beside(self, instance: InstanceView, role: Role) -> Sequence[InstanceView]:
        """Those of a role on the node of an instance."""
        ...

    def bounds(self, role: Role) -> Mapping[float, int]:
        """Requests that the instances of a role decode, by their TPOT bound."""
        ...

    def pending(self, role: Role) -> PromptPool:
        """The prompts that the instances of a role have to compute."""
        ...

    def cached(self, request: ServeRequest) -> Mapping[str, int]:
        """Leading tokens of its prompt whose KV instances have, by their ids; of those that have any."""
        ...

    def without(self, instance_ids: frozenset[str]) -> View:
        """The view without some instances; a role of which nothing would be left is kept whole."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """A view as a value: a snapshot, in any order.

    Attributes:
        prefixes: what there is in the instances' caches, as far as it is known.
    """

    prefill: tuple[InstanceView, ...]
    decode: tuple[InstanceView, ...]
    prefixes: Prefixes | None = None

    def of(self, role: Role) -> tuple[InstanceView, ...]:
        instances = self.prefill if role is Role.PREFILL else self.decode
        return tuple(sorted(instances, key=lambda v: v.info.engine_index))

    def by_tokens(self, role: Role) -> Iterator[InstanceView]:
        return iter(sorted(self.of(role), key=lambda v: (v.outstanding_tokens, v.info.engine_index)))

    def beside(self, instance: InstanceView, role: Role) -> Sequence[InstanceView]:
        return [view for view in self.of(role) if view.info.node == instance.info.node]

    def bounds(self, role: Role) -> Mapping[float, int]:
        total: dict[float, int] = {}
        for instance in self.of(role):
            for bound_s, count in instance.decodes.bounds.items():
                total[bound_s] = total.get(bound_s, 0) + count
        return total

    def pending(self, role: Role) -> PromptPool:
        pool = PromptPool()
        for instance in self.of(role):
            for prompt in instance.prompts:
                pool.add(prompt)
        return pool

    def cached(self, request: ServeRequest) -> Mapping[str, int]:
        return cached_of(self.prefixes, request)

    def without(self, instance_ids: frozenset[str]) -> ClusterView:
        def keep(views: tuple[InstanceView, ...]) -> tuple[InstanceView, ...]:
            return tuple(v for v in views if v.instance_id not in instance_ids) or views

        return ClusterView(prefill=keep(self.prefill), decode=keep(self.decode), prefixes=self.prefixes)


def cached_of(prefixes: Prefixes | None, request: ServeRequest) -> Mapping[str, int]:
    """`View.cached`, from the index."""
    if prefixes is None or not request.plain_prompt:
        return {}
    return prefixes.match(request.prompt_token_ids)


class Hold:
    """A reservation: a context manager, or released by hand; twice is as good as once."""

    __slots__ = ("_instance_id", "_reservations", "_tokens")

    def __init__(self, reservations: Reservations, instance_id: str, tokens: int) -> None:
        self._reservations: Reservations | None = reservations
        self._instance_id = instance_id
        self._tokens = tokens
        reservations.add(instance_id, tokens, 1)

    def release(self) -> None:
        """Give the room back."""
        reservations, self._reservations = self._reservations, None
        if reservations is not None:
            reservations.add(self._instance_id, -self._tokens, -1)

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Reservations:
    """Tokens and requests that this router has under way on each instance.

    Args:
        on_change: told the instance whose counts have changed.
    """

    def __init__(self, on_change: Callable[[str], None] = lambda instance_id: None) -> None:
        self._tokens: dict[str, int] = {}
        self._requests: dict[str, int] = {}
        self._on_change = on_change

    def tokens(self, instance_id: str) -> int:
        return self._tokens.get(instance_id, 0)

    def requests(self, instance_id: str) -> int:
        return self._requests.get(instance_id, 0)

    def hold(self, instance_id: str, tokens: int) -> Hold:
        """Count `tokens` and one request on an instance until the hold is released."""
        return Hold(self, instance_id, tokens)

    def outstanding(self) -> Mapping[str, int]:
        """Tokens by instance, without those that have none."""
        return dict(self._tokens)

    def add(self, instance_id: str, tokens: int, requests: int) -> None:
        """Count more, or less, there."""
        self._tokens[instance_id] = self._tokens.get(instance_id, 0) + tokens
        self._requests[instance_id] = self._requests.get(instance_id, 0) + requests
        if self._requests[instance_id] == 0:
            del self._requests[instance_id], self._tokens[instance_id]
        self._on_change(instance_id)
