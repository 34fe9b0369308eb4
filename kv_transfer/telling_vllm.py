"""A source of KV tells who waits for a prompt, after each chunk of it, which blocks are full; and who waits
for a request that decodes here and goes on there, after each token.

The scheduler's half of the connector knows chunks and blocks; that a chunk is computed it hears from the
workers, as with asynchronous scheduling it is iterations ahead of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster import vllm_api
from cluster.handle import FOLLOWER_PARAM, Follower
from kv_transfer.early_read import Progress
from kv_transfer.news_zmq import NewsSender

KVConnectorWorkerMetadata: Any = vllm_api.KVConnectorWorkerMetadata


class StepDone(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What workers say after an iteration: its KV is in memory."""

    def __init__(self, step: int) -> None:
        self.step = step

    def aggregate(self, other: StepDone) -> StepDone:
        return StepDone(min(self.step, other.step))


@dataclass(slots=True)
class _Told:
    request: Any
    follower: Follower
    decodes: bool = False


@dataclass(slots=True)
class _Chunk:
    request_id: str
    life: int
    tokens: int


class Telling:
    """The source's half in the scheduler."""

    def __init__(self, scheduler: Any) -> None:
        """
        Args:
            scheduler: the connector's, whose engine and groups of layers these are.
        """
        self._scheduler = scheduler
        self._told: dict[str, _Told] = {}
        self._step = 0
        self._under_way: deque[tuple[int, list[_Chunk]]] = deque()
        self._sender: NewsSender | None = None
        self.block_ids: Callable[[str], tuple[list[int], ...]] = lambda request_id: ()
        parallel = scheduler.vllm_config.parallel_config
        # KV that goes by way of a host buffer is not where a reader would look before the end; and of what
        # context parallelism spreads it would not know which rank has it.
        self._is_plain = not (scheduler.use_host_buffer or parallel.decode_context_parallel_size > 1)
        self._stages = parallel.pipeline_parallel_size
        groups = scheduler.kv_cache_config.transfer_groups
        self._block_sizes = [group.kv_cache_spec.block_size for group in groups]

    def came(self, request: Any) -> None:
        follower = (request.kv_transfer_params or {}).get(FOLLOWER_PARAM)
        if follower is not None and self._is_plain:
            self._told[request.request_id] = _Told(request, Follower(*follower))

    def moves(self, request: Any, follower: Follower) -> None:
        """A request that decodes will go on elsewhere."""
        if self._is_plain:
            self._told[request.request_id] = _Told(request, follower, decodes=True)

    def left(self, request_id: str) -> None:
        self._told.pop(request_id, None)

    def scheduled(self, tokens: dict[str, int]) -> int:
        """An iteration computes so many tokens of requests; its number if somebody waits for any, else 0."""
        chunks = []
        for request_id, told in self._told.items():
            if count := tokens.get(request_id):
                request = told.request
                end = request.num_computed_tokens + count
                if told.decodes:
                    # Beyond are tokens that are guessed and not yet verified, if any.
                    end = min(end, request.num_tokens)
                if told.decodes or end < request.num_prompt_tokens:
                    chunks.append(_Chunk(request_id, request.num_preemptions, end))
        if not chunks:
            return 0
        self._step += 1
        self._under_way.append((self._step, chunks))
        return self._step

    def done(self, step: int) -> None:
        """All workers have done the iterations up to this one."""
        while self._under_way and self._under_way[0][0] <= step:
            for chunk in self._under_way.popleft()[1]:
                told = self._told.get(chunk.request_id)
                if told is not None and told.request.num_preemptions == chunk.life:
                    self._tell(told, chunk)

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    def _tell(self, told: _Told, chunk: _Chunk) -> None:
        scheduler = self._scheduler
        selected = scheduler.kv_cache_config.select_transfer_block_ids(self.block_ids(chunk.request_id))
        blocks = [
            [] if window else list(group[: chunk.tokens // size])
            for group, window, size in zip(selected, scheduler.blocks_per_sw, self._block_sizes, strict=True)
        ]
        if not any(blocks):
            return
        if self._sender is None:
            self._sender = NewsSender()
        progress = Progress(
            follower=told.follower.request_id,
            source=chunk.request_id,
            life=chunk.life,
            blocks=blocks,
            engine_id=scheduler.engine_id,
            host=scheduler.side_channel_host,
            port=scheduler.side_channel_port,
            tp_size=scheduler.transfer_tp_size,
            pp_size=self._stages,
        )
        self._sender.send(told.follower.news_address, progress)
