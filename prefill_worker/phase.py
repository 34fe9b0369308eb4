"""Engine options of the prefill phase."""

from __future__ import annotations

from typing import Any

from cluster.attention import attention_backend
from cluster.spec import ClusterSpec


def phase_options(spec: ClusterSpec) -> dict[str, Any]:
    """vLLM engine options of a prefill instance, under what the spec says.

    Chunked prefill stays on: a chunk boundary is where a long prompt can yield to a short one. Raises as
    `attention_backend`.
    """
    return {"enable_chunked_prefill": True, "attention_backend": attention_backend(spec)}
