"""PdConnector: vLLM's NIXL pull connector, with what a cluster needs beyond it.

Loaded by vLLM in its engine and worker processes (`kv_connector_module_path`). Beyond the stock connector:

- a reader asks for what the source really holds, all of its prompt but the last token, so a prompt that
  carries tokens generated elsewhere can be handed over at any length;
- blocks that nobody will read are released at once, by id, instead of when their lease ends;
- a request that decodes ends at its next token when it is told to, and its blocks wait for another engine;
- KV may move over another transport than NIXL (`agent_zmq`);
- the progress thread of NIXL sleeps between polls (`nixl_progress`);
- on CPUs the thread that computes the model stays where it was, and is not bound to the machine's last core;
- the engine's processes end with the process that started them (`orphan`);
- on CPUs a request without a LoRA adapter is computed without one (`cluster.vllm_cpu_lora`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from cluster import vllm_api
from cluster.errors import EnvironmentProblem
from cluster.handle import keep_for_reader
from cluster.spec import TransportName
from cluster.vllm_cpu_lora import skip_tokens_without_adapter
from cluster.wire import HAND_OVER_PARAM, RELEASE_PARAM
from kv_transfer.agent_zmq import ReadAgent
from kv_transfer.nixl_progress import calm_progress_thread
from kv_transfer.orphan import end_with_parent
from kv_transfer.transports import make_transport

NixlPullConnector: Any = vllm_api.NixlPullConnector
NixlPullConnectorScheduler: Any = vllm_api.NixlPullConnectorScheduler
NixlPullConnectorWorker: Any = vllm_api.NixlPullConnectorWorker
NixlConnectorMetadata: Any = vllm_api.NixlConnectorMetadata
KVConnectorRole: Any = vllm_api.KVConnectorRole
RequestStatus: Any = vllm_api.RequestStatus


class PdMetadata(NixlConnectorMetadata):  # type: ignore[misc]
    """The stock message from scheduler to workers, plus the requests whose blocks nobody will read."""

    def __init__(self) -> None:
        super().__init__()
        self.reqs_to_release: set[str] = set()


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

    def on_new_request(self, request: Any) -> None:
        """A request that carries ids of others is aborted by the engine in the same call."""
        super().on_new_request(request)
        self._requests[request.request_id] = request
        params = request.kv_transfer_params or {}
        self._released.update(params.get(RELEASE_PARAM, ()))
        for request_id in params.get(HAND_OVER_PARAM, ()):
            if (running := self._requests.get(request_id)) is not None:
                self._hand_over(running)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        self._requests.pop(request.request_id, None)
        finished: tuple[bool, dict[str, Any] | None] = super().request_finished(request, block_ids)
        return finished

    def _hand_over(self, request: Any) -> None:
        """Let a request that decodes end by its length at its next token, as a prefill does at its first, so
        that its blocks are kept and its end says how to read them."""
        # With asynchronous scheduling tokens are under way already.
        limit = request.num_output_tokens + request.num_output_placeholders + 1
        decodes = request.status == RequestStatus.RUNNING and request.num_output_tokens > 0
        longest = self.vllm_config.model_config.max_model_len - request.num_prompt_tokens
        if not decodes or limit >= min(request.max_tokens, longest):
            return
        request.max_tokens = limit
        request.kv_transfer_params = keep_for_reader()
        self._reqs_in_batch.add(request.request_id)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
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
        meta.__dict__.update(super().build_connector_meta(scheduler_output).__dict__)
        meta.reqs_to_release, self._released = self._released, set()
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
        self._done_without_reader: set[str] = set()

    def start_load_kv(self, metadata: PdMetadata) -> None:
        super().start_load_kv(metadata)
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
        return results


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
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = PdScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            calm_progress_thread()
            if vllm_config.lora_config is not None and vllm_config.device_config.device_type == "cpu":
                skip_tokens_without_adapter()
            self.connector_worker = PdWorker(vllm_config, self.engine_id, kv_cache_config)
