"""A reader of KV reads a request's blocks while the rest of it is still computed elsewhere.

The scheduler's half holds a request back until it hears of its prompt, gives it memory then, and tells the
workers what there is (`Following`). Each worker reads it (`EarlyReads`); what is left when the source has
ended is read in vLLM's own way, and only this last read tells the source that its blocks are free to go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from cluster import vllm_api
from cluster.handle import FOLLOWS_PARAM, UNKNOWN_PARAM
from kv_transfer.early_read import EarlyRead, Progress
from kv_transfer.news_zmq import NewsListener
from kv_transfer.stats_vllm import EARLY_BYTES

ReqMeta: Any = vllm_api.ReqMeta
RemoteMeta: Any = vllm_api.RemoteMeta

# Key of a handle's parameters: in which life of its request at the source the blocks were computed.
LIFE_PARAM = "pdserve_life"


@dataclass(slots=True)
class _Follows:
    request: Any
    progress: Progress | None = None
    # Set when it has memory.
    local: Any = None
    cached: tuple[int, ...] = ()
    prompt_blocks: int = 0


@dataclass(slots=True)
class Heard:
    """What the scheduler tells the workers of a request that follows; `local` the first time only."""

    progress: Progress | None
    local: Any = None
    prompt_blocks: int = 0


class Following:
    """The reader's half in the scheduler."""

    def __init__(self, scheduler: Any, news_address: str) -> None:
        self._scheduler = scheduler
        self._listener = NewsListener(news_address) if news_address else None
        self._follows: dict[str, _Follows] = {}
        self._heard: dict[str, Heard] = {}
        self._dropped: set[str] = set()

    def came(self, request: Any) -> None:
        params = request.kv_transfer_params or {}
        if params.get(FOLLOWS_PARAM):
            self._follows[request.request_id] = _Follows(request)
            _hash_known(request, params.get(UNKNOWN_PARAM, 0))

    def to_read(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool] | None:
        """As vLLM's `get_num_new_matched_tokens`, of a request that follows; None for another one."""
        follows = self._follows.get(request.request_id)
        if follows is None:
            return None
        count = request.kv_transfer_params["remote_num_tokens"] - num_computed_tokens
        # Without news it needs no memory yet; with all of it in the cache, none but when it goes on.
        return (count, True) if follows.progress is not None and count > 0 else (None, False)

    def allocated(self, request: Any, blocks: Any) -> None:
        """It has memory for its prompt."""
        follows = self._follows.get(request.request_id)
        if follows is None or follows.local is not None:
            return
        scheduler = self._scheduler
        follows.local = scheduler.get_exchange_clipped_blocks(blocks.get_unhashed_block_ids_all_groups())
        follows.cached = tuple(
            sum(block.block_hash is not None and not block.is_null for block in group)
            for group in blocks.blocks
        )
        held = request.kv_transfer_params["remote_num_tokens"]
        follows.prompt_blocks = math.ceil(held / scheduler.block_size)
        self._heard[request.request_id] = Heard(follows.progress, follows.local, follows.prompt_blocks)

    def go_on(self, request_id: str, token_ids: list[int], params: dict[str, Any], replaces: int = 0) -> None:
        """What it follows is computed, and these tokens belong to its prompt now, in the places of its last
        ones."""
        follows = self._follows.pop(request_id, None)
        if follows is None:  # its client left
            return
        request, scheduler = follows.request, self._scheduler
        _extend_prompt(request, token_ids, replaces)
        request.kv_transfer_params = params
        scheduler.renew_lease(request)
        if follows.local is not None:
            scheduler.read_rest(request, follows.local, follows.cached)
            params["do_remote_prefill"] = False
        else:
            scheduler.can_be_read(request_id)

    def left(self, request_id: str) -> None:
        """It is over, or aborted."""
        follows = self._follows.pop(request_id, None)
        if follows is not None and follows.local is not None:
            # vLLM frees its memory when the workers say that nothing is written to it any more.
            self._heard.pop(request_id, None)
            self._dropped.add(request_id)

    def listen(self) -> None:
        """Hear what there is to hear; between two iterations."""
        if self._listener is None or not self._follows:
            return
        for progress in self._listener.news():
            follows = self._follows.get(progress.follower)
            if follows is None:
                continue
            follows.progress = progress
            if follows.local is None:
                self._scheduler.can_be_read(progress.follower)
            if follows.local is not None:
                heard = self._heard.setdefault(progress.follower, Heard(progress))
                heard.progress = progress

    def message(self) -> tuple[dict[str, Heard], set[str]]:
        """For the workers: what is new, and who was aborted."""
        heard, self._heard = self._heard, {}
        dropped, self._dropped = self._dropped, set()
        return heard, dropped

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()


def _hash_known(request: Any, unknown: int) -> None:
    """Hash only blocks of tokens that are known: those of others must not be found in a cache."""
    if unknown:
        tokens = request._all_token_ids
        tail = tokens[-unknown:]
        del tokens[-unknown:]
        request.block_hashes.clear()
        request.update_block_hashes()
        tokens.extend(tail)


def _extend_prompt(request: Any, token_ids: list[int], replaces: int) -> None:
    """As vLLM's scheduler does it for a session's next input."""
    for tokens in (request.prompt_token_ids, request._all_token_ids):
        del tokens[len(tokens) - replaces :]
        tokens.extend(token_ids)
    request.update_block_hashes()
    request.num_prompt_tokens = len(request.prompt_token_ids)


@dataclass(slots=True)
class _Reading:
    read: EarlyRead
    source: Progress | None = None
    handshake: Future[Any] | None = None
    # vLLM's message of the last read and the life it is of, when it came while an early read was under way.
    last: tuple[Any, int] | None = None
    is_dropped: bool = False


@dataclass(slots=True)
class EarlyReads:
    """The reader's half in a worker, one per rank.

    Attributes:
        worker: vLLM's half of the connector there.
    """

    worker: Any
    _readings: dict[str, _Reading] = field(default_factory=dict)
    _transfers: dict[str, list[int]] = field(default_factory=dict)
    _failed: set[str] = field(default_factory=set)
    _at_rest: set[str] = field(default_factory=set)

    def heard(self, heard: dict[str, Heard], dropped: Iterable[str]) -> None:
        """What the scheduler says."""
        for request_id, news in heard.items():
            reading = self._readings.get(request_id)
            if reading is None:
                reading = self._readings[request_id] = _Reading(EarlyRead(news.local, news.prompt_blocks))
            if news.progress is not None:
                reading.source = news.progress
                reading.read.heard(news.progress.life, news.progress.blocks)
        for request_id in dropped:
            reading = self._readings.get(request_id)
            if reading is not None and reading.read.is_reading:
                reading.is_dropped = True
            else:
                self._readings.pop(request_id, None)
                self._at_rest.add(request_id)

    def take_over(self, to_receive: dict[str, Any], lives: dict[str, int]) -> None:
        """vLLM's messages of last reads: those whose early reads are at rest are shortened to what is left,
        the others are taken out until they are."""
        self._poll()
        for request_id in list(to_receive):
            if (reading := self._readings.get(request_id)) is not None:
                reading.last = to_receive.pop(request_id), lives.get(request_id, 0)
        for request_id, reading in list(self._readings.items()):
            if reading.last is not None and not reading.read.is_reading:
                meta, life = reading.last
                meta.local_block_ids = tuple(reading.read.left(life))
                to_receive[request_id] = meta
                del self._readings[request_id]

    def engines(self) -> set[str]:
        """Engines that are being read from."""
        return {
            reading.source.engine_id
            for reading in self._readings.values()
            if reading.read.is_reading and reading.source is not None
        }

    def begin(self) -> None:
        """Begin what can be read now."""
        for request_id, reading in self._readings.items():
            if reading.last is None and not reading.is_dropped and reading.source is not None:
                self._begin(request_id, reading, reading.source)

    def at_rest(self) -> set[str]:
        """Requests that were aborted, to whose memory nothing is written any more; each once."""
        self._poll()
        resting, self._at_rest = self._at_rest, set()
        return resting

    def _poll(self) -> None:
        if not self._transfers:
            return
        moved = self.worker.xfer_stats.data["bytes_transferred"]
        before = len(moved)
        ended, failed = self.worker._pop_done_transfers(self._transfers)
        self.worker.xfer_stats.data[EARLY_BYTES] += moved[before:]
        self._failed |= failed
        for request_id in ended:
            self._ended(request_id, is_good=request_id not in self._failed)

    def _ended(self, request_id: str, *, is_good: bool) -> None:
        self._failed.discard(request_id)
        reading = self._readings[request_id]
        reading.read.ended(is_good=is_good)
        if reading.is_dropped:
            del self._readings[request_id]
            self._at_rest.add(request_id)

    def _begin(self, request_id: str, reading: _Reading, source: Progress) -> None:
        worker = self.worker
        if not self._is_plain(worker) or not self._has_met(reading, source):
            return
        piece = reading.read.next()
        if piece is None:
            return
        local = tuple(piece.local)
        meta = ReqMeta(
            local_block_ids=local,
            local_physical_block_ids=worker._logical_to_kernel_block_ids(
                local, worker._physical_blocks_per_logical_kv_block
            ),
            tp_size=source.tp_size,
            pp_size=source.pp_size,
            remote=RemoteMeta(
                block_ids=tuple(piece.remote),
                host=source.host,
                port=source.port,
                engine_id=source.engine_id,
                request_id=source.source,
            ),
        )
        agent = worker.nixl_wrapper
        worker.nixl_wrapper = _Muted(agent)
        try:
            worker._read_blocks_for_req(request_id, meta)
        finally:
            worker.nixl_wrapper = agent
        # vLLM keeps its books by request, and this is not the read that ends it.
        handles = worker._recving_transfers.pop(request_id, [])
        if request_id in worker._recv_failures:
            worker._recv_failures.discard(request_id)
            self._failed.add(request_id)
        if handles:
            self._transfers[request_id] = handles
        else:
            self._ended(request_id, is_good=request_id not in self._failed)

    def _has_met(self, reading: _Reading, source: Progress) -> bool:
        """Whether the source is known; it is asked once."""
        if source.engine_id in self.worker._remote_agents:
            return True
        if reading.handshake is None:
            reading.handshake = self.worker._ensure_handshake(
                source.engine_id, source.host, source.port, source.tp_size, pp_size=source.pp_size
            )
        return False

    @staticmethod
    def _is_plain(worker: Any) -> bool:
        """Whether what is read needs nothing done to it afterwards, as vLLM does for the last read only."""
        return not (
            worker.use_host_buffer
            or worker.enable_permute_local_kv
            or worker.enable_heterogeneous_attn_post_process
            or worker._mixed_mem_types
            or worker.dcp_size > 1
        )


class _Muted:
    """An agent whose reads tell their source nothing: it would take the first one for the last."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def make_prepped_xfer(self, *args: Any, notif_msg: bytes = b"", **kwargs: Any) -> Any:
        return self._agent.make_prepped_xfer(*args, **kwargs)

    def send_notif(self, *_: Any, **__: Any) -> None:
        pass
