"""The timer of kernels: refuses without a GPU; with one, times what a GPU can do."""

from __future__ import annotations

import importlib.util

import pytest

from cluster.errors import EnvironmentProblem
from cluster.hardware import hardware_named
from cluster.model_shape import named_shape
from deploy.profiler.kernels import kernel_grid, time_kernels
from deploy.profiler.kernels_flashinfer import CudaTimer


def _gpu() -> bool:
    if any(importlib.util.find_spec(name) is None for name in ("torch", "flashinfer")):
        return False
    import torch

    return bool(torch.cuda.is_available())


HAS_GPU = _gpu()


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing() -> None:
    with pytest.raises(EnvironmentProblem, match=r"(torch|GPU|FlashInfer).*run it on a GPU node"):
        CudaTimer()


@pytest.mark.skipif(not HAS_GPU, reason="no GPU, or no FlashInfer")
def test_kernels_of_a_model_take_plausible_times() -> None:
    timer = CudaTimer()
    family = next(
        (name for name in ("a100", "h100", "h200", "b200", "l40s") if name in timer.gpu.lower()), None
    )
    if family is None:
        pytest.skip(f"{timer.gpu} is not in cluster.hardware")
    grid = kernel_grid(named_shape("llama-3-8b"), tensor_parallel_size=1, max_prompt=2048, max_requests=64)
    times = time_kernels(grid, timer, hardware_named(family), lambda line: None)
    largest = max(times, key=lambda time: time.kernel.flops)
    assert 0.2 < largest.efficiency < 1.1
    assert set(timer.versions) == {"torch", "cuda", "flashinfer"}
