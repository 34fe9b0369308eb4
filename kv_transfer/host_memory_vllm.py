"""Main memory beside an engine's own, on CPUs too: where vLLM keeps blocks that have no room there.

On GPUs all of it is vLLM's offloading. Its copies are CUDA's; on CPUs, where engines keep KV in main memory
anyway, a thread copies, so that what decides, evicts, shares and fails is the same code, and can be tested.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster import vllm_api
from cluster.errors import EnvironmentProblem
from cluster.fingerprint import model_fingerprint

TransferResult: Any = vllm_api.TransferResult
OffloadingWorker: Any = vllm_api.OffloadingWorker
CPUOffloadingSpec: Any = vllm_api.CPUOffloadingSpec
TieringOffloadingSpec: Any = vllm_api.TieringOffloadingSpec


class ThreadCopies(OffloadingWorker):  # type: ignore[misc]
    """Copies between two places in main memory, one at a time, in the order they are asked for."""

    def __init__(self, kv_caches: Any, blocks_per_chunk: int, chunks: list[Any]) -> None:
        """
        Args:
            kv_caches: vLLM's `CanonicalKVCaches`, of the engine.
            chunks: for each of their tensors `[chunks, bytes]`, a chunk's blocks one after the other.
        """
        self._engine = [cache.tensor for cache in kv_caches.tensors]
        # A block of the engine is a row here too.
        self._kept = [
            one.unflatten(1, (blocks_per_chunk, cache.page_size_bytes))
            for one, cache in zip(chunks, kv_caches.tensors, strict=True)
        ]
        self._groups = [sorted({ref.tensor_idx for ref in refs}) for refs in kv_caches.group_data_refs]
        self._blocks_per_chunk = blocks_per_chunk
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-host-memory")
        self._jobs: dict[int, Future[Any]] = {}

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._submit(job_id, src_spec, dst_spec.block_ids, is_store=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._submit(job_id, dst_spec, src_spec.block_ids, is_store=False)

    def get_finished(self) -> list[Any]:
        done = [job_id for job_id, job in self._jobs.items() if job.done()]
        return [self._jobs.pop(job_id).result() for job_id in done]

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids:
            if (job := self._jobs.get(job_id)) is not None:
                job.result()

    def shutdown(self) -> None:
        self._thread.shutdown()

    def _submit(self, job_id: int, blocks: Any, chunks: Any, *, is_store: bool) -> bool:
        self._jobs[job_id] = self._thread.submit(self._copy, job_id, blocks, chunks, is_store=is_store)
        return True

    def _copy(self, job_id: int, blocks: Any, chunks: Any, *, is_store: bool) -> Any:
        began_s, size, first_chunk = time.perf_counter(), 0, 0
        ends = [0]
        for count in blocks.group_sizes:
            ends.append(ends[-1] + count)
        for tensors, (begin, end), first in zip(
            self._groups, pairwise(ends), blocks.block_indices, strict=True
        ):
            skipped = first % self._blocks_per_chunk
            for number, block in enumerate(blocks.block_ids[begin:end], skipped):
                chunk = chunks[first_chunk + number // self._blocks_per_chunk]
                for index in tensors:
                    here = self._engine[index][block]
                    there = self._kept[index][chunk, number % self._blocks_per_chunk]
                    (there if is_store else here).copy_(here if is_store else there)
                    size += here.nbytes
            if end > begin:
                first_chunk += -(-(skipped + end - begin) // self._blocks_per_chunk)
        return TransferResult(job_id, True, size, time.perf_counter() - began_s)


def _on_cpu(kv_caches: Any) -> bool:
    return all(cache.tensor.device.type == "cpu" for cache in kv_caches.tensors)


def _require_room(spec: Any) -> None:
    if spec.num_chunks < 1:
        raise EnvironmentProblem(
            problem=f"tiers.host_gib has no room for a block of {spec.kv_bytes_per_chunk:,} bytes",
            remedy="give it more, or leave tiers out",
        )


class HostMemory(CPUOffloadingSpec):  # type: ignore[misc]
    """An instance's own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _require_room(self)

    def get_worker(self, kv_caches: Any) -> Any:
        if not _on_cpu(kv_caches):
            return super().get_worker(kv_caches)
        chunks = [
            cache.tensor.new_empty((self.num_chunks, self.blocks_per_chunk * cache.page_size_bytes))
            for cache in kv_caches.tensors
        ]
        return ThreadCopies(kv_caches, self.blocks_per_chunk, chunks)


class SharedMemory(TieringOffloadingSpec):  # type: ignore[misc]
    """An instance's own, and behind it a directory of all, where each model has a folder: vLLM's names of
    files know where its weights are, and not which."""

    secondary_tier_configs: list[dict[str, Any]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _require_room(self)

    def get_manager(self) -> Any:
        if self._manager is None:
            # Here and not in each rank, which knows nothing of the directory.
            self.secondary_tier_configs = [self._of_model(tier) for tier in self.secondary_tier_configs]
        manager = super().get_manager()
        region = self._scheduler_mmap
        if region is not None and not region._creator:
            # All ranks have it, as they were first. Its file would stay if this process were killed.
            Path(region.mmap_path).unlink(missing_ok=True)
        return manager

    def get_worker(self, kv_caches: Any) -> Any:
        if not _on_cpu(kv_caches):
            return super().get_worker(kv_caches)
        region = vllm_api.SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return _InRegion(kv_caches, self.blocks_per_chunk, region)

    def _of_model(self, tier: dict[str, Any]) -> dict[str, Any]:
        folder = Path(tier["root_dir"]) / model_fingerprint(self.config.model.name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(
                problem=f"tiers.directory can't be written to: {error}",
                remedy="mount it on every node, writable by the engines",
            ) from error
        return tier | {"root_dir": str(folder)}


class _InRegion(ThreadCopies):
    """Copies to memory that the scheduler's process sees too."""

    def __init__(self, kv_caches: Any, blocks_per_chunk: int, region: Any) -> None:
        sizes = [blocks_per_chunk * cache.page_size_bytes for cache in kv_caches.tensors]
        super().__init__(kv_caches, blocks_per_chunk, [region.create_next_worker_view(one) for one in sizes])
        self._region = region

    def shutdown(self) -> None:
        super().shutdown()
        self._kept.clear()
        self._region.cleanup()
