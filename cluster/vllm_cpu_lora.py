"""LoRA on CPUs: tokens of requests without an adapter stay without one.

vLLM marks them with the index -1. Its GPU kernels skip them; its operations for CPUs (0.32,
`lora/ops/torch_ops`) take the index as Python does, and compute them with the adapter of the last slot,
whenever they share an iteration with a request that has one. Open there as pull requests 48421 and 49656.
"""

from __future__ import annotations

import sys
from typing import Any

from cluster import vllm_api

_NO_ADAPTER = -1


def skip_tokens_without_adapter() -> None:
    """Put that right in this process; any number of times."""
    stock = vllm_api.bgmv_shrink

    def shrink(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
        stock(inputs, weights, output, indices, scaling)
        # What follows multiplies this by the other half of the adapter, and adds it.
        output[indices == _NO_ADAPTER] = 0.0

    for user in (stock, vllm_api.PunicaWrapperCPU):
        sys.modules[user.__module__].bgmv_shrink = shrink  # type: ignore[attr-defined]
