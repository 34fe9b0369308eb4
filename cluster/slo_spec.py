"""The part of a spec that says what its requests need: classes, and who is in which."""

from __future__ import annotations

import math

from pydantic import Field, PositiveFloat, model_validator

from cluster.frozen import Frozen
from cluster.request import Slo, slo_of_ms


class SloClassSpec(Frozen):
    """A class of requests.

    Attributes:
        ttft_ms, tpot_ms: bounds; one that isn't given is none.
        priority: as vLLM's, lower is more important: served first, shed last.
        fills_slack: whether it is served only where it takes nothing from others, as offline batches are;
            without bounds of its own.
    """

    ttft_ms: PositiveFloat | None = Field(default=None, allow_inf_nan=False)
    tpot_ms: PositiveFloat | None = Field(default=None, allow_inf_nan=False)
    priority: int = 0
    fills_slack: bool = False

    @model_validator(mode="after")
    def _check(self) -> SloClassSpec:
        if self.fills_slack and (self.ttft_ms is not None or self.tpot_ms is not None):
            raise ValueError("a class that fills slack has no bounds: it waits for as long as others need")
        return self

    @property
    def slo(self) -> Slo:
        """The bounds in seconds."""
        return slo_of_ms(self.ttft_ms, self.tpot_ms)


class SloSpec(Frozen):
    """The classes.

    Attributes:
        default: class of a request that names none; without one, such a request has no bounds.
        classes: by name.
        by_api_key: class by API key, for requests that name none.
        tenant_weights: shares of tenants (header `x-tenant-id`) that are not 1.
    """

    default: str | None = None
    classes: dict[str, SloClassSpec] = Field(default_factory=dict)
    by_api_key: dict[str, str] = Field(default_factory=dict)
    tenant_weights: dict[str, PositiveFloat] = Field(default_factory=dict)

    @property
    def tightest_tpot_s(self) -> float:
        """Of all classes, in seconds; infinite for none."""
        return min((one.slo.tpot_s for one in self.classes.values()), default=math.inf)

    @model_validator(mode="after")
    def _check(self) -> SloSpec:
        known = ", ".join(self.classes) or "none"
        if self.default is not None and self.default not in self.classes:
            raise ValueError(f"default is {self.default!r}, the classes are {known}")
        for name in self.by_api_key.values():
            if name not in self.classes:
                raise ValueError(f"by_api_key names class {name!r}, the classes are {known}")
        return self
