"""Engine options of the decode phase."""

from __future__ import annotations

import importlib.util
from typing import Any

from cluster.errors import EnvironmentProblem
from cluster.spec import ClusterSpec


def phase_options(spec: ClusterSpec) -> dict[str, Any]:
    """vLLM engine options of a decode instance, under what the spec says.

    On GPUs attention runs on FlashInfer, whose decode kernels balance long and short contexts in one batch.

    Raises:
        EnvironmentProblem: FlashInfer is asked for and can't run here.
    """
    asked = spec.decode.attention_backend or ("FLASHINFER" if spec.device == "gpu" else None)
    if asked is None or spec.engine == "sim":
        return {}
    if asked == "FLASHINFER":
        if spec.device != "gpu":
            raise EnvironmentProblem(
                problem="decode.attention_backend FLASHINFER needs a GPU and the spec says 'device: cpu'",
                remedy="remove decode.attention_backend",
            )
        if importlib.util.find_spec("flashinfer") is None:
            raise EnvironmentProblem(
                problem="decode runs on FlashInfer, which is not installed",
                remedy="install pdserve's 'gpu' extra, or set decode.attention_backend: FLASH_ATTN",
            )
    return {"attention_backend": asked}
