"""Times FlashInfer's attention and torch's matrix products on this machine's GPU, by CUDA events."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from statistics import median
from typing import Any

from cluster.errors import EnvironmentProblem
from deploy.profiler.kernels import AttentionShape, GemmShape, Kernel

PAGE_TOKENS = 16
# As in vLLM 0.32 (VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE), whose use of the wrappers this follows.
WORKSPACE_BYTES = 394 << 20
WARM_UP_CALLS = 3
REPEATS = 20
# Many times any second-level cache (B200: 126 MB), so that no call finds its weights there; and the time that
# it takes hides what the host needs to launch the call.
FLUSH_BYTES = 1 << 30


class CudaTimer:
    """Runs a kernel on the first GPU of this process (`kernels.KernelTimer`)."""

    def __init__(self) -> None:
        """Raises EnvironmentProblem without a GPU or without FlashInfer."""
        remedy = "run it on a GPU node, with pdserve's 'gpu' extra installed"
        if importlib.util.find_spec("torch") is None:
            raise EnvironmentProblem(
                problem="kernels are timed with torch, which is not installed", remedy=remedy
            )
        import torch

        if not torch.cuda.is_available():
            raise EnvironmentProblem(problem="kernels are timed on a GPU, and torch sees none", remedy=remedy)
        if importlib.util.find_spec("flashinfer") is None:
            raise EnvironmentProblem(
                problem="attention is timed with FlashInfer, which is not installed", remedy=remedy
            )
        self._torch: Any = torch
        self._flashinfer: Any = importlib.import_module("flashinfer")
        self._device: Any = torch.device("cuda")
        self._workspace: Any = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        self._flush: Any = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self._device)

    @property
    def gpu(self) -> str:
        """The GPU's name as its driver tells it."""
        return str(self._torch.cuda.get_device_name(self._device))

    @property
    def versions(self) -> dict[str, str]:
        return {
            "torch": str(self._torch.__version__),
            "cuda": str(self._torch.version.cuda),
            "flashinfer": importlib.metadata.version("flashinfer-python"),
        }

    def time_s(self, kernel: Kernel) -> float:
        """Median of `REPEATS` calls, each with a cold second-level cache."""
        shape = kernel.shape
        if isinstance(shape, GemmShape):
            call = self._gemm(shape)
        elif kernel.name == "decode_attention":
            call = self._decode(shape)
        else:
            call = self._prefill(shape)
        for _ in range(WARM_UP_CALLS):
            call()
        cuda = self._torch.cuda
        times_ms = []
        for _ in range(REPEATS):
            self._flush.zero_()
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times_ms.append(begin.elapsed_time(end))
        return float(median(times_ms)) / 1000

    def _random(self, *sizes: int) -> Any:
        return self._torch.randn(*sizes, dtype=self._torch.bfloat16, device=self._device)

    def _gemm(self, shape: GemmShape) -> Callable[[], object]:
        left, right = self._random(shape.tokens, shape.inner), self._random(shape.outer, shape.inner)
        out = self._random(shape.tokens, shape.outer)
        # Weights lie as nn.Linear keeps them, so the product is with the transposed.
        return lambda: self._torch.matmul(left, right.t(), out=out)

    def _pages(self, shape: AttentionShape) -> tuple[Any, Any, Any, Any]:
        """(KV cache, first page of each request, pages, tokens in each one's last page).

        KV: pages x 2 x page tokens x KV heads x head dim (layout NHD).
        """
        torch = self._torch
        per_request = -(-shape.context_tokens // PAGE_TOKENS)
        pages = per_request * shape.requests
        kv = self._random(pages, 2, PAGE_TOKENS, shape.kv_heads, shape.head_dim)
        first = torch.arange(0, pages + 1, per_request, dtype=torch.int32, device=self._device)
        # In no order, as in a cache that has been in use.
        order = torch.randperm(pages, device=self._device).to(torch.int32)
        last = shape.context_tokens - (per_request - 1) * PAGE_TOKENS
        last_tokens = torch.full((shape.requests,), last, dtype=torch.int32, device=self._device)
        return kv, first, order, last_tokens

    def _prefill(self, shape: AttentionShape) -> Callable[[], object]:
        torch = self._torch
        kv, first, order, last_tokens = self._pages(shape)
        tokens = shape.requests * shape.new_tokens
        query = self._random(tokens, shape.heads, shape.head_dim)
        starts = torch.arange(0, tokens + 1, shape.new_tokens, dtype=torch.int32, device=self._device)
        wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
        wrapper.plan(
            starts, first, order, last_tokens, shape.heads, shape.kv_heads, shape.head_dim, PAGE_TOKENS,
            causal=True, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip
        return lambda: wrapper.run(query, kv)

    def _decode(self, shape: AttentionShape) -> Callable[[], object]:
        torch = self._torch
        kv, first, order, last_tokens = self._pages(shape)
        query = self._random(shape.requests, shape.heads, shape.head_dim)
        wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_tensor_cores=True
        )
        wrapper.plan(
            first, order, last_tokens, shape.heads, shape.kv_heads, shape.head_dim, PAGE_TOKENS,
            q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip
        return lambda: wrapper.run(query, kv)
