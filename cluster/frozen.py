"""The base of what is read from files: a value, in which a key that we don't know is an error."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Frozen, and no other keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
