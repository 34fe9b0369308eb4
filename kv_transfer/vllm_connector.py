"""PdConnector: vLLM's NIXL pull connector, with what a cluster needs beyond it.

Loaded by vLLM in its engine and worker processes (`kv_connector_module_path`). Beyond the stock connector:

- a reader asks for what the source really holds, all of its prompt but the last token, so a prompt that
  carries tokens generated elsewhere can be handed over at any length;
- how long the stages of a transfer take is measured (`stats_vllm`);
- blocks that nobody will read are released at once, by id, instead of when their lease ends;
- a prompt of several chunks is read while it is still computed (`telling_vllm`, `following_vllm`);
- a request that decodes ends at its next token when it is told to, and its blocks wait for another engine;
- the pipeline stages of a source are read from as one (`staged_agent`, `stages_vllm`);
- KV may move over another transport than NIXL (`agent_zmq`);
- the progress thread of NIXL sleeps between polls (`nixl_progress`);
- on CPUs the thread that computes the model stays where it was, and is not bound to the machine's last core;
- the engine's processes end with the process that started them (`cluster.orphan`);
- on CPUs a request without a LoRA adapter is computed without one (`cluster.vllm_cpu_lora`), pipeline stages
  have a buffer between them (`cluster.vllm_cpu_stages`), and ranks share experts
  (`cluster.vllm_cpu_experts`); processes sleep between two looks for a message (`cluster.vllm_cpu_waiting`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

from cluster import vllm_api
from cluster.errors import EnvironmentProblem
from cluster.handle import Follower, keep_for_reader
from cluster.orphan import end_with_parent
from cluster.spec import TransportName
from cluster.vllm_cpu_experts import spread_experts
from cluster.vllm_cpu_lora import skip_tokens_without_adapter
from cluster.vllm_cpu_stages import make_buffers_between_stages
from cluster.vllm_cpu_waiting import sleep_between_looks
from cluster.vllm_options import NEWS_ADDRESS
from cluster.wire import GO_ON_PARAM, HAND_OVER_PARAM, RELEASE_PARAM
from kv_transfer.agent_zmq import ReadAgent
from kv_transfer.following_vllm import LIFE_PARAM, EarlyReads, Following, Heard
from kv_transfer.nixl_progress import calm_progress_thread
from kv_transfer.staged_agent import StagedAgent
from kv_transfer.stages_vllm import Gathering
from kv_transfer.stats_vllm import PdPromMetrics, PdStats
from kv_transfer.telling_vllm import StepDone, Telling
from kv_transfer.transports import make_transport

NixlPullConnector: Any = vllm_api.NixlPullConnector
NixlPullConnectorScheduler: Any = vllm_api.NixlPullConnectorScheduler
NixlPullConnectorWorker: Any = vllm_api.NixlPullConnectorWorker
NixlConnectorMetadata: Any = vllm_api.NixlConnectorMetadata
KVConnectorRole: Any = vllm_api.KVConnectorRole
RequestStatus: Any = vllm_api.RequestStatus


class PdMetadata(NixlConnectorMetadata):  # type: ignore[misc]
    """The stock message from scheduler to workers, and more.

    Attributes:
        reqs_to_release: whose blocks nobody will read.
        step: number of an iteration that somebody waits for; 0 for another.
        heard, dropped: of requests that follow a prompt: what is new of it, and who was aborted.
        lives: of requests to receive, in which life their blocks were computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reqs_to_release: set[str] = set()
        self.step = 0
        self.heard: dict[str, Heard] = {}
        self.dropped: set[str] = set()
        self.lives: dict[str, int] = {}


class PdScheduler(NixlPullConnectorScheduler):  # type: ignore[misc]
    """Scheduler half: one per engine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if backoff := self._prefill_backoff():
            raise EnvironmentProblem(
                problem=f"prefill of this model must stop {backoff} tokens short of the prompt (state-space "
                "layers or multi-token prediction), and its first token can't come from a prefill instance",
                remedy="serve it with plain vLLM",
            )
        self._released: set[str] = set()
        self._requests: dict[str, Any] = {}
        self.telling = Telling(self)
        self._following = Following(self, os.environ.get(NEWS_ADDRESS, ""))
        self._stats = PdStats()
        # When their KV could be read, of requests without memory for it.
        self._since: dict[str, float] = {}

    def on_new_request(self, request: Any) -> None:
        """A request that carries ids of others is aborted by the engine in the same call."""
        super().on_new_request(request)
        self._requests[request.request_id] = request
        params = request.kv_transfer_params or {}
        self.telling.came(request)
        self._following.came(request)
        if params.get("do_remote_prefill"):
            self.can_be_read(request.request_id)
        self._released.update(params.get(RELEASE_PARAM, ()))
        if GO_ON_PARAM in params:
            self._following.go_on(*params[GO_ON_PARAM])
        if HAND_OVER_PARAM in params:
            self._hand_over(*params[HAND_OVER_PARAM])

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        self._requests.pop(request.request_id, None)
        self.telling.left(request.request_id)
        self._following.left(request.request_id)
        self._since.pop(request.request_id, None)
        is_kept, params = super().request_finished(request, block_ids)
        if params is not None:
            params[LIFE_PARAM] = request.num_preemptions
        return is_kept, params

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        self._following.allocated(request, blocks)
        if (since := self._since.pop(request.request_id, None)) is not None:
            self._stats.took("alloc", time.perf_counter() - since)

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        if (done := connector_output.kv_connector_worker_meta) is not None:
            self.telling.done(done.step)

    def can_be_read(self, request_id: str) -> None:
        """From now on a request here wants memory for KV."""
        self._since.setdefault(request_id, time.perf_counter())

    def renew_lease(self, request: Any) -> None:
        """From now on the source of this request's blocks is told that they are wanted."""
        super().on_new_request(request)

    def read_rest(self, request: Any, local_block_ids: Any, cached_blocks: tuple[int, ...]) -> None:
        """Let workers read what the source of a request has kept; it waits for that."""
        self._reqs_need_recv[request.request_id] = (request, local_block_ids, cached_blocks, True)

    def take_stats(self) -> PdStats | None:
        """What was measured since it was last asked; None for nothing."""
        return None if self._stats.is_empty() else self._stats.clone_and_reset()

    def shutdown(self) -> None:
        self.telling.close()
        self._following.close()
        super().shutdown()

    def _hand_over(self, request_id: str, at_tokens: int, follower: list[str] | None) -> None:
        """Let a request that decodes end by its length, as a prefill does at its first token, so that its
        blocks are kept and its end says how to read them."""
        if (request := self._requests.get(request_id)) is None:
            return
        # With asynchronous scheduling tokens are under way already.
        limit = max(at_tokens, request.num_output_tokens + request.num_output_placeholders + 1)
        decodes = request.status == RequestStatus.RUNNING and request.num_output_tokens > 0
        longest = self.vllm_config.model_config.max_model_len - request.num_prompt_tokens
        if not decodes or limit >= min(request.max_tokens, longest):
            return
        request.max_tokens = limit
        request.kv_transfer_params = keep_for_reader()
        self._reqs_in_batch.add(request_id)
        if follower is not None and limit == at_tokens:  # who expects fewer tokens has no room for these
            self.telling.moves(request, Follower(*follower))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if (to_read := self._following.to_read(request, num_computed_tokens)) is not None:
            return to_read
        params = request.kv_transfer_params
        if not (params and params.get("do_remote_prefill") and params.get("remote_num_tokens")):
            matched: tuple[int, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
            return matched
        held = params["remote_num_tokens"]
        if held != request.num_prompt_tokens - 1:
            # Both lists of blocks end with the same token's block only then; else compute the prompt here.
            return 0, False
        count = held - num_computed_tokens
        return (count, True) if count > 0 else (0, False)

    def build_connector_meta(self, scheduler_output: Any) -> PdMetadata:
        meta = PdMetadata()
        lives = {
            request_id: request.kv_transfer_params.get(LIFE_PARAM, 0)
            for request_id, (request, *_) in self._reqs_need_recv.items()
        }
        meta.__dict__.update(super().build_connector_meta(scheduler_output).__dict__)
        meta.reqs_to_release, self._released = self._released, set()
        meta.step = self.telling.scheduled(scheduler_output.num_scheduled_tokens)
        self._following.listen()
        meta.heard, meta.dropped = self._following.message()
        meta.lives = lives
        return meta


class PdWorker(NixlPullConnectorWorker):  # type: ignore[misc]
    """Worker half: one per rank."""

    def __init__(self, *args: Any) -> None:
        cores = os.sched_getaffinity(0)
        with _agents_over(args[0].kv_transfer_config.get_from_extra_config("transport", "nixl")):
            super().__init__(*args)
        # On CPUs vLLM binds this thread to the machine's last core, for the transfers; but it computes the
        # model as well, and every engine's would be on that core.
        os.sched_setaffinity(0, cores)
        self.nixl_wrapper: Any = StagedAgent(self.nixl_wrapper)
        self._gathering: dict[str, Gathering] = {}
        self._done_without_reader: set[str] = set()
        self.xfer_stats = PdStats()
        self._kept_since: dict[str, float] = {}
        self.early = EarlyReads(self)

    def start_load_kv(self, metadata: PdMetadata) -> None:
        self.early.heard(metadata.heard, metadata.dropped)
        self.early.take_over(metadata.reqs_to_recv, metadata.lives)
        super().start_load_kv(metadata)
        self.early.begin()
        kept = metadata.reqs_to_send.keys() & self._reqs_to_send.keys()
        self._kept_since.update(dict.fromkeys(kept, time.perf_counter()))
        for request_id in metadata.reqs_to_release:
            # Unknown ids were read, released or expired before: nothing is kept for them.
            if self._reqs_to_send.pop(request_id, None) is not None:
                self._reqs_to_process.discard(request_id)
                self._done_without_reader.add(request_id)

    def get_transfer_results(self) -> Any:
        results = super().get_transfer_results()
        if self._done_without_reader:
            results.finished_sending.update(self._done_without_reader)
            self._done_without_reader = set()
        results.finished_recving.update(self.early.at_rest())
        for request_id in results.finished_sending:
            if (since_s := self._kept_since.pop(request_id, None)) is not None:
                self.xfer_stats.took("release", time.perf_counter() - since_s)
        return results

    def _engines_with_inflight_transfers(self) -> set[str]:
        # vLLM releases what it knows of engines that it does not read from.
        busy: set[str] = super()._engines_with_inflight_transfers()
        return busy | self.early.engines()

    def _cleanup_remote_engines(self) -> None:
        # Asked with every iteration; mostly nothing is read early.
        if (reading := self.early.engines()) and not reading <= set(self._engine_by_address.values()):
            return  # one of them has been replaced
        super()._cleanup_remote_engines()

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        with self._timed("bootstrap"):
            super().register_kv_caches(kv_caches)

    def _nixl_handshake(
        self, host: str, port: int, tp_size: int, engine_id: str, dcp_size: int, pp_size: int, *args: Any
    ) -> tuple[dict[tuple[int, int], str], float]:
        if pp_size > 1:
            self._gathering[engine_id] = Gathering(pp_size)
        try:
            with self._timed("handshake"):
                agents, offset_s = super()._nixl_handshake(
                    host, port, tp_size, engine_id, dcp_size, pp_size, *args
                )
        finally:
            self._gathering.pop(engine_id, None)
        # Of the stages of a rank only the last one has given a name, which is of them all.
        return {(0, rank): name for (_, rank), name in agents.items() if name}, offset_s

    def add_remote_agent(self, description: Any, rank: int = 0, *args: Any) -> str:
        if (gathering := self._gathering.get(description.engine_id)) is not None:
            if (whole := gathering.add(rank, description)) is None:
                return ""
            description = whole
        name: str = super().add_remote_agent(description, rank, *args)
        return name

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began_s = time.perf_counter()
        yield
        self.xfer_stats.took(stage, time.perf_counter() - began_s)


@contextlib.contextmanager
def _agents_over(transport: TransportName) -> Iterator[None]:
    """Let the stock worker make an agent over another transport than NIXL."""
    if transport == "nixl":
        yield
        return
    module = vllm_api.base_worker
    stock = module.NixlWrapper

    def make(name: str, _config: Any) -> ReadAgent:
        host = os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"]
        return ReadAgent(name, make_transport(transport, host), host)

    module.NixlWrapper = make
    try:
        yield
    finally:
        module.NixlWrapper = stock


class PdConnector(NixlPullConnector):  # type: ignore[misc]
    """The connector that vLLM is told to load. The role of an instance is a matter of routing: each can give
    and take KV."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        # The stock constructor would build the stock halves; its parent's sets everything but these.
        super(NixlPullConnector, self).__init__(vllm_config, role, kv_cache_config)
        end_with_parent()
        on_cpu = vllm_config.device_config.device_type == "cpu"
        if on_cpu:
            sleep_between_looks()
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = PdScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            calm_progress_thread()
            if on_cpu:
                make_buffers_between_stages()
                spread_experts()
                if vllm_config.lora_config is not None:
                    skip_tokens_without_adapter()
            self.connector_worker = PdWorker(vllm_config, self.engine_id, kv_cache_config)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self.connector_scheduler.telling.block_ids = kv_cache_manager.get_block_ids

    def get_kv_connector_stats(self) -> PdStats | None:
        stats: PdStats | None = (
            self.connector_scheduler.take_stats()
            if self.role == KVConnectorRole.SCHEDULER
            else super().get_kv_connector_stats()
        )
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PdStats:
        return PdStats() if data is None else PdStats(data=data)

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> PdPromMetrics:
        return PdPromMetrics(*args)

    def build_connector_worker_meta(self) -> StepDone | None:
        step = self._get_connector_metadata().step
        return StepDone(step) if step else None
