"""How long an engine's iteration takes, as a function of what is in its batch.

One protocol, three sources: fixed costs (`ConstantLatency`), a profile that was measured on a running engine
(`ProfiledLatency`), and the roofline of a model shape on a GPU (`cluster.roofline`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol, TypeVar, runtime_checkable

from pydantic import AfterValidator, Field, ValidationError

from cluster.errors import SpecError
from cluster.frozen import Frozen

PROFILE_FORMAT = 2


class Batch(NamedTuple):
    """What one iteration computes.

    Attributes:
        prefill_tokens: prompt tokens over all chunks; a chunk of one token counts as a decode.
        prefill_attention: sum over the chunks of (context after)^2 - (context before)^2, in tokens^2; for
            whole prompts the sum of their squared lengths. Attention's work is proportional to it.
        prefill_requests: chunks.
        decode_requests: requests that get one token each.
        decode_context_tokens: sum of their contexts, in tokens.
    """

    prefill_tokens: int = 0
    prefill_attention: int = 0
    prefill_requests: int = 0
    decode_requests: int = 0
    decode_context_tokens: int = 0


EMPTY_BATCH = Batch()


class LatencyModel(Protocol):
    """Time of an iteration."""

    @property
    def region(self) -> Batch | None:
        """The largest batch, component by component, that it was measured on; None for a model that holds
        everywhere."""
        ...

    def iteration_s(self, batch: Batch) -> float:
        """Seconds from the start of the iteration to its tokens, through all pipeline stages."""
        ...


@runtime_checkable
class GroupLatency(LatencyModel, Protocol):
    """That also knows what the instances of a data-parallel group take together."""

    def group_s(self, batches: Sequence[Batch]) -> float:
        """Seconds of an iteration in which each instance has one of the batches, empty ones included."""
        ...


def group_s(latency: LatencyModel, batches: Sequence[Batch]) -> float:
    """Seconds of an iteration of a data-parallel group: as long as its slowest instance takes, by a model
    that knows no more."""
    if isinstance(latency, GroupLatency):
        return latency.group_s(batches)
    return max(latency.iteration_s(batch) if any(batch) else 0.0 for batch in batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantLatency:
    """Fixed costs, for tests: a step and a cost per prompt token, in seconds."""

    step_s: float = 0.0
    prefill_s_per_token: float = 0.0

    @property
    def region(self) -> Batch | None:
        return None

    def iteration_s(self, batch: Batch) -> float:
        return self.step_s + batch.prefill_tokens * self.prefill_s_per_token


def _require_order(levels: Levels) -> Levels:
    sizes = [requests for requests, _ in levels]
    if sizes != sorted(set(sizes)) or any(value < 0 for _, value in levels):
        raise ValueError("expected rising numbers of requests, each with a value of at least 0")
    return levels


# (requests, value) by rising requests.
Levels = Annotated[tuple[tuple[int, float], ...], AfterValidator(_require_order)]


def level_at(levels: Levels, requests: int) -> float:
    """The value for so many requests: straight between two levels, and that of the nearest beyond all."""
    below = levels[0]
    for level in levels:
        if requests <= level[0]:
            width = level[0] - below[0]
            return below[1] + (level[1] - below[1]) * (requests - below[0]) / width if width else level[1]
        below = level
    return below[1]


class PrefillCost(Frozen):
    """Seconds of an iteration of up to `up_to_tokens` prompt tokens:
    base + token * tokens + attention * tokens^2 + request * chunks."""

    up_to_tokens: int | None = None
    base_s: float = Field(ge=0)
    token_s: float = Field(ge=0)
    attention_s: float = Field(default=0.0, ge=0)
    request_s: float = Field(default=0.0, ge=0)


class DecodeCost(Frozen):
    """Seconds of an iteration without prompt tokens, for batches of up to `up_to_requests`:
    base + request * requests + context * tokens of context.

    Attributes:
        levels: (requests, seconds) where they were measured one by one, by rising requests: instead of
            request * requests up to the last of them, straight between them, and on from there.
    """

    up_to_requests: int | None = None
    base_s: float = Field(ge=0)
    request_s: float = Field(default=0.0, ge=0)
    context_s: float = Field(default=0.0, ge=0)
    levels: Levels = ()

    def requests_s(self, requests: int) -> float:
        """The part of an iteration's time that depends on its requests alone."""
        if not self.levels:
            return requests * self.request_s
        return level_at(self.levels, requests) + max(0, requests - self.levels[-1][0]) * self.request_s


class Residuals(Frozen):
    """How far the fit is from what was measured: relative errors over `samples` iterations."""

    samples: int
    median: float
    p90: float
    bias: float


_Cost = TypeVar("_Cost", PrefillCost, DecodeCost)


class LatencyProfile(Frozen):
    """A measured engine, as `pdserve profile` writes it.

    Attributes:
        model: what was measured, for people.
        machine, versions: on what.
        region: largest batch that was measured, component by component.
        residuals: of the fit, by kind of iteration.
        frontend_s: from a request's arrival to its being in the engine's queue, and back with its token.
        handoff_s: what a hand-over of KV costs beside the bytes, from the first token to decode's queue.
        handoff_token_s: and for each prompt token, with its bytes; for clusters whose network is not known.
        handoff_beside_s: the former while both phases compute, where it is longer then.
        handoff_each_s: by how much each further one at the same time is later than the one before.
        prefill_contention: how many times as long an iteration takes while another instance computes too;
            above 1 where both share a machine's cores or its memory's bandwidth.
        decode_contention: the same by the requests that decode; none is 1.
    """

    format: int = PROFILE_FORMAT
    model: str
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    machine: str
    versions: dict[str, str] = Field(default_factory=dict)
    source: str
    prefill: tuple[PrefillCost, ...] = Field(min_length=1)
    decode: tuple[DecodeCost, ...] = Field(min_length=1)
    region: dict[str, int]
    residuals: dict[str, Residuals] = Field(default_factory=dict)
    frontend_s: float = Field(default=0.0, ge=0)
    handoff_s: float = Field(default=0.0, ge=0)
    handoff_token_s: float = Field(default=0.0, ge=0)
    handoff_beside_s: float = Field(default=0.0, ge=0)
    handoff_each_s: float = Field(default=0.0, ge=0)
    prefill_contention: float = Field(default=1.0, ge=1)
    decode_contention: Levels = ()

    def at_pace(self, prefill: float, decode: float) -> LatencyProfile:
        """The same engine, with prompts and decodes that take so many times as long."""
        return self.model_copy(
            update={
                "prefill": tuple(_scaled(cost, prefill) for cost in self.prefill),
                "decode": tuple(_scaled(cost, decode) for cost in self.decode),
            }
        )

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _scaled(cost: _Cost, factor: float) -> _Cost:
    raw = cost.model_dump()
    raw |= {name: value * factor for name, value in raw.items() if name.endswith("_s")}
    if "levels" in raw:
        raw["levels"] = tuple((size, seconds * factor) for size, seconds in raw["levels"])
    return type(cost).model_validate(raw)


def load_profile(path: Path | str) -> LatencyProfile:
    """Read a profile. Raises SpecError for a file that is none."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(raw, dict) and raw.get("format") != PROFILE_FORMAT:
            raise SpecError(
                file=str(path),
                path="format",
                value=raw.get("format"),
                allowed=f"this version reads format {PROFILE_FORMAT}: measure again with `pdserve profile`",
            )
        return LatencyProfile.model_validate(raw)
    except OSError as error:
        raise SpecError(
            file=str(path),
            path="",
            value=error.strerror,
            allowed="name a profile that `pdserve profile` wrote",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(
            file=str(path),
            path=".".join(str(part) for part in first["loc"]),
            value=first["input"],
            allowed=first["msg"],
        ) from None
    except ValueError as error:
        raise SpecError(file=str(path), path="", value=str(error), allowed="a profile is JSON") from None


class PacedLatency:
    """Another model's iterations, each so many times as long."""

    def __init__(self, latency: LatencyModel, factor: float) -> None:
        self._latency = latency
        self._factor = factor

    @property
    def region(self) -> Batch | None:
        return self._latency.region

    def iteration_s(self, batch: Batch) -> float:
        return self._factor * self._latency.iteration_s(batch)

    def group_s(self, batches: Sequence[Batch]) -> float:
        return self._factor * group_s(self._latency, batches)


def at_pace(latency: LatencyModel, factor: float) -> LatencyModel:
    """Iterations that take so many times as long; a measured engine stays one, with what else is known."""
    if factor == 1:
        return latency
    if isinstance(latency, ProfiledLatency):
        return ProfiledLatency(latency.profile.at_pace(factor, factor))
    return PacedLatency(latency, factor)


class ProfiledLatency:
    """Iteration times after a profile.

    An iteration with both phases costs the prefill part and, for its decodes, what they add to a decode
    iteration: the fixed part is paid once.
    """

    def __init__(self, profile: LatencyProfile) -> None:
        self.profile = profile
        self._prefill = sorted(
            ((_limit(c.up_to_tokens), c) for c in profile.prefill), key=lambda pair: pair[0]
        )
        self._decode = sorted(
            ((_limit(c.up_to_requests), c) for c in profile.decode), key=lambda pair: pair[0]
        )
        self._region = Batch(**profile.region)
        self._known_parts: dict[int, tuple[float, float, float]] = {}

    @property
    def region(self) -> Batch | None:
        return self._region

    def iteration_s(self, batch: Batch) -> float:
        base = time = 0.0
        if batch.prefill_tokens:
            cost = _cost(self._prefill, batch.prefill_tokens)
            base = cost.base_s
            time = (
                batch.prefill_tokens * cost.token_s
                + batch.prefill_attention * cost.attention_s
                + batch.prefill_requests * cost.request_s
            )
        if batch.decode_requests:
            decode_base, requests_s, context_s = self._decode_parts(batch.decode_requests)
            base = max(base, decode_base)
            time += requests_s + batch.decode_context_tokens * context_s
        return base + time

    def _decode_parts(self, requests: int) -> tuple[float, float, float]:
        """(base, part of the requests, seconds per token of context) of a batch; there are few sizes."""
        known = self._known_parts.get(requests)
        if known is None:
            cost = _cost(self._decode, requests)
            known = (cost.base_s, cost.requests_s(requests), cost.context_s)
            self._known_parts[requests] = known
        return known


def _limit(up_to: int | None) -> float:
    return math.inf if up_to is None else up_to


def _cost(segments: Sequence[tuple[float, _Cost]], size: int) -> _Cost:
    """The first segment that reaches `size`; beyond all, the last."""
    for limit, cost in segments:
        if size <= limit:
            return cost
    return segments[-1][1]


def beyond_region(peak: Batch, region: Batch | None) -> list[str]:
    """What a run asked of a model that was never measured: one line for each component of `peak` that is
    larger than `region`'s."""
    if region is None:
        return []
    return [
        f"{name} reached {seen:,}, measured up to {known:,}"
        for name, seen, known in zip(Batch._fields, peak, region, strict=True)
        if seen > known
    ]
