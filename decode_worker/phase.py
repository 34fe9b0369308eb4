"""Engine options of the decode phase."""

from __future__ import annotations

from typing import Any

from cluster.attention import attention_backend
from cluster.spec import ClusterSpec


def phase_options(spec: ClusterSpec) -> dict[str, Any]:
    """vLLM engine options of a decode instance, under what the spec says.

    Raises as `attention_backend`.
    """
    return {"attention_backend": attention_backend(spec)}
