"""vLLM's engine core as an `Engine`: in a process of its own, or in a thread of this one."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster import vllm_api
from cluster.engine import EngineDied, Frames
from cluster.fingerprint import model_fingerprint
from cluster.instance import EngineFacts, Fingerprint, chunk_tokens
from cluster.vllm_coordinator import end_coordinators_with_parent
from cluster.vllm_kv_events import VllmKvEvents
from cluster.vllm_options import NEWS_ADDRESS, engine_config
from cluster.wire import GO_ON_PARAM, HAND_OVER_PARAM, RELEASE_PARAM, Blocks, GoOn, HandOver, Load

logger = logging.getLogger(__name__)

VLLM_ENGINE_NAME = f"vllm {vllm_api.SUPPORTED_VLLM}"
_IDLE = Load(running=0, waiting=0, kv_usage=0.0)
# What vLLM's statistics of a step say of the engine as it stands.
_STANDING = (
    "num_running_reqs",
    "num_waiting_reqs",
    "num_skipped_waiting_reqs",
    "num_kv_fetch_reqs_by_stage",
    "step_counter",
    "current_wave",
    "kv_cache_usage",
    "waiting_lora_adapters",
    "running_lora_adapters",
)
# To read an adapter from a slow disk or a hub.
ADAPTER_DEADLINE_S = 60.0


def engine_facts(config: Any) -> EngineFacts:
    """Facts of a started engine, from its final configuration."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    scheduler, lora = config.scheduler_config, config.lora_config
    block_size = int(cache.block_size)
    capacity = int(getattr(cache, "kv_cache_size_tokens", None) or cache.num_gpu_blocks * block_size)
    kv_dtype = str(model.dtype) if cache.cache_dtype == "auto" else str(cache.cache_dtype)
    return EngineFacts(
        fingerprint=Fingerprint(
            engine=VLLM_ENGINE_NAME,
            model=model_fingerprint(model.model),
            dtype=str(model.dtype),
            kv_dtype=kv_dtype,
            block_size_tokens=block_size,
        ),
        max_model_len=int(model.max_model_len),
        kv_capacity_tokens=capacity,
        kv_bytes_per_token=_kv_bytes_per_token(model, kv_dtype),
        max_num_seqs=int(scheduler.max_num_seqs),
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        max_loras=lora.max_loras if lora else 0,
        max_cpu_loras=lora.max_cpu_loras if lora else 0,
        chunk_tokens=chunk_tokens(
            int(scheduler.max_num_batched_tokens),
            int(scheduler.long_prefill_token_threshold),
            is_chunked=scheduler.enable_chunked_prefill,
        ),
        news_address=os.environ.get(NEWS_ADDRESS, ""),
    )


def _kv_bytes_per_token(model: Any, kv_dtype: str) -> int:
    element_bytes = 1 if "fp8" in kv_dtype or "int8" in kv_dtype else 4 if "float32" in kv_dtype else 2
    layers = model.get_total_num_hidden_layers()
    if model.use_mla:
        # DeepSeek-V2's latent: one compressed vector and one rotary key per token and layer.
        text = model.hf_text_config
        return int(layers * (text.kv_lora_rank + text.qk_rope_head_dim) * element_bytes)
    return int(2 * layers * model.get_total_num_kv_heads() * model.get_head_size() * element_bytes)


def connector_message(param: str, news: list[Any]) -> Any:
    """A request that tells the connector something of others, and that the engine aborts at once; `news`
    begins with an id."""
    return vllm_api.EngineCoreRequest(
        request_id=f"{param}-{news[0]}-{time.monotonic_ns()}",
        prompt_token_ids=[0],
        mm_features=None,
        sampling_params=vllm_api.SamplingParams(
            max_tokens=1, extra_args={"kv_transfer_params": {param: news}}
        ),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        abort_immediately=True,
    )


class VllmEngine:
    """What both ways of running the core share: encoding, load, facts."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._decoder = vllm_api.MsgpackDecoder(vllm_api.EngineCoreRequest)
        self._encoder = vllm_api.MsgpackEncoder()
        self._load = _IDLE
        self._config: Any = None
        self._events = VllmKvEvents(options)
        # An adapter that an iteration can't load kills the engine: each is tried before its first request.
        self._tried_adapters: set[int] = set()

    def load(self) -> Load:
        return self._load

    def part(self, outputs: Any, members: list[Any], *, with_stats: bool) -> Frames:
        if with_stats and len(members) == len(outputs.outputs):
            return self._encoder.encode(outputs)  # type: ignore[no-any-return]
        return self._encoder.encode(  # type: ignore[no-any-return]
            vllm_api.EngineCoreOutputs(
                engine_index=outputs.engine_index,
                outputs=members,
                scheduler_stats=outputs.scheduler_stats if with_stats else None,
                timestamp=outputs.timestamp,
                weight_version=outputs.weight_version,
            )
        )

    def release(self, request_ids: list[str]) -> None:
        self._tell_connector(RELEASE_PARAM, request_ids)

    def hand_over(self, message: HandOver) -> None:
        self._tell_connector(HAND_OVER_PARAM, [message.request_id, message.at_tokens, message.follower])

    def go_on(self, message: GoOn) -> None:
        news = [message.request_id, message.token_ids, message.kv_params, message.replaces]
        self._tell_connector(GO_ON_PARAM, news)

    def _tell_connector(self, param: str, news: list[Any]) -> None:
        raise NotImplementedError

    def _was_called(self, method: str, args: list[Any]) -> None:
        # Its second argument empties what is behind the engine's memory as well, of which vLLM tells nobody.
        if method == "reset_prefix_cache" and any(args[1:2]):
            self._events.host_is_empty()

    async def block_changes(self) -> Blocks:
        return await self._events.changes()

    def _configure(self, progress: Callable[[str], None]) -> Any:
        progress("loading vLLM")
        self._config = engine_config(self._options | {"kv_events_config": self._events.config})
        return self._config

    def _is_untried(self, request: Any) -> bool:
        adapter = request.lora_request
        return adapter is not None and adapter.lora_int_id not in self._tried_adapters

    @staticmethod
    def _refusal(request: Any, error: Exception) -> Any:
        """Outputs that end a request with what the engine said of it."""
        logger.warning("request %s is refused: %s", request.request_id, error)
        refused = vllm_api.EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=vllm_api.FinishReason.ERROR,
            stop_reason=f"{type(error).__name__}: {error}",
        )
        return vllm_api.EngineCoreOutputs(outputs=[refused])

    def _is_news(self, outputs: Any) -> bool:
        """Whether a step says anything that the ones before did not; notes the load.

        An engine that waits for KV, or keeps it for a reader, takes a thousand steps a second, and says after
        each how it is.
        """
        stats = outputs.scheduler_stats
        if stats is None:
            return bool(outputs.outputs)
        before, self._load = (
            self._load,
            Load(
                running=stats.num_running_reqs,
                waiting=stats.num_waiting_reqs + stats.num_skipped_waiting_reqs,
                kv_usage=stats.kv_cache_usage,
            ),
        )
        if outputs.outputs or self._load != before:
            return True
        # The rest counts what happened in this step alone.
        nothing = vllm_api.SchedulerStats(**{name: getattr(stats, name) for name in _STANDING})
        if stats.connector_prefix_cache_stats is not None:  # none of it is still one
            nothing.connector_prefix_cache_stats = type(stats.connector_prefix_cache_stats)()
        return bool(stats != nothing)


class ThreadEngine(VllmEngine):
    """The core in a thread of this process: ready three times as fast, 0.8 GB less; for one rank.

    The core's own busy loop (vllm/v1/engine/core.py, `EngineCoreProc.run_busy_loop`) is the model of `_run`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self._inbox: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._outbox: asyncio.Queue[Any] = asyncio.Queue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop

    async def start(self, progress: Callable[[str], None]) -> EngineFacts:
        loop = self._loop = asyncio.get_running_loop()
        self._events.open()
        ready: asyncio.Future[EngineFacts] = loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(loop, ready, progress), name="engine-core", daemon=True
        )
        self._thread.start()
        return await ready

    def add(self, frames: Frames) -> None:
        request = self._decoder.decode(frames)
        self._inbox.put(lambda core: self._accept(core, request))

    def abort(self, request_ids: list[str]) -> None:
        self._inbox.put(lambda core: core.abort_requests(request_ids))

    def _tell_connector(self, param: str, news: list[Any]) -> None:
        message = connector_message(param, news)
        self._inbox.put(lambda core: self._accept(core, message))

    async def call(self, method: str, args: list[Any]) -> Any:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def run(core: Any) -> None:
            try:
                called = getattr(core, method)
                result = called(*vllm_api.EngineCoreProc._convert_msgspec_args(called, args))
            except Exception as error:  # crosses the thread, raised again at the caller
                loop.call_soon_threadsafe(answer.set_exception, error)
            else:
                loop.call_soon_threadsafe(answer.set_result, result)

        self._inbox.put(run)
        result = await answer
        self._was_called(method, args)
        return result

    async def outputs(self) -> Any:
        while True:
            outputs = await self._outbox.get()
            if isinstance(outputs, BaseException):
                raise EngineDied(detail=f"{type(outputs).__name__}: {outputs}")
            if self._is_news(outputs):
                return outputs

    async def stop(self) -> None:
        if self._thread is not None:
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join, 10.0)
        self._events.close()

    def _run(
        self,
        loop: asyncio.AbstractEventLoop,
        ready: asyncio.Future[EngineFacts],
        progress: Callable[[str], None],
    ) -> None:
        try:
            config = self._configure(progress)
            progress("loading the model")
            core = vllm_api.EngineCore(config, vllm_api.Executor.get_class(config), True)
        except BaseException as error:
            loop.call_soon_threadsafe(ready.set_exception, error)
            return
        loop.call_soon_threadsafe(ready.set_result, engine_facts(config))
        try:
            while self._take_messages(core):
                self._step(core, loop)
        except BaseException as error:
            logger.exception("the engine core died")
            loop.call_soon_threadsafe(self._outbox.put_nowait, error)
        finally:
            core.shutdown()

    def _take_messages(self, core: Any) -> bool:
        """Handle what has come; wait for something when the core has nothing to do. False: stop."""
        block = not core.scheduler.has_requests() and not core.batch_queue
        while True:
            try:
                message = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if message is None:
                return False
            message(core)
            block = False

    def _accept(self, core: Any, request: Any) -> None:
        try:
            if self._is_untried(request):
                core.add_lora(request.lora_request)
                self._tried_adapters.add(request.lora_request.lora_int_id)
            core.add_request(*core.preprocess_add_request(request))
        except Exception as error:
            # A request that the engine refuses (a grammar it can't compile) ends that request only.
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, self._refusal(request, error))

    def _step(self, core: Any, loop: asyncio.AbstractEventLoop) -> None:
        outputs, executed = core.step_fn()
        core.post_step(executed)
        for step in (outputs or {}).values():
            loop.call_soon_threadsafe(self._outbox.put_nowait, step)
        if not executed and core.scheduler.has_requests():
            # Waiting for a transfer or for a reader of kept blocks: let NIXL's threads work.
            time.sleep(0.001)


class ProcessEngine(VllmEngine):
    """The core in a process of its own, by vLLM's client: for production, any number of ranks."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self._client: Any = None
        self._sends: set[asyncio.Task[None]] = set()
        self._order = asyncio.Lock()

    async def start(self, progress: Callable[[str], None]) -> EngineFacts:
        self._events.open()
        config = await asyncio.to_thread(self._configure, progress)
        end_coordinators_with_parent()
        progress("starting the engine process and loading the model")
        self._client = await asyncio.to_thread(
            vllm_api.EngineCoreClient.make_async_mp_client, config, vllm_api.Executor.get_class(config), True
        )
        return engine_facts(config)

    def add(self, frames: Frames) -> None:
        request = self._decoder.decode(frames)
        untried = self._is_untried(request)
        self._send(self._try_adapter(request) if untried else self._client.add_request_async(request))

    def abort(self, request_ids: list[str]) -> None:
        self._send(self._client.abort_requests_async(request_ids))

    def _tell_connector(self, param: str, news: list[Any]) -> None:
        self._send(self._client.add_request_async(connector_message(param, news)))

    async def call(self, method: str, args: list[Any]) -> Any:
        result = await self._client.call_utility_async(method, *args)
        self._was_called(method, args)
        return result

    async def outputs(self) -> Any:
        while True:
            try:
                outputs = await self._client.get_output_async()
            except Exception as error:  # vLLM raises EngineDeadError and, at shutdown, others
                raise EngineDied(detail=f"{type(error).__name__}: {error}") from error
            if self._is_news(outputs):
                return outputs

    async def stop(self) -> None:
        if self._client is not None:
            await asyncio.to_thread(self._client.shutdown)
        self._events.close()

    async def _try_adapter(self, request: Any) -> None:
        """Send a request whose adapter can be loaded, and refuse another."""
        adapter = request.lora_request
        try:
            async with asyncio.timeout(ADAPTER_DEADLINE_S):
                await self._client.add_lora_async(adapter)
        except Exception as error:  # whatever is wrong with it, its client must hear of it
            self._client.outputs_queue.put_nowait(self._refusal(request, error))
            return
        self._tried_adapters.add(adapter.lora_int_id)
        await self._client.add_request_async(request)

    def _send(self, sending: Any) -> None:
        # Messages must leave in the order they came: an abort may not overtake its request.
        async def in_order() -> None:
            async with self._order:
                await sending

        task = asyncio.create_task(in_order())
        self._sends.add(task)
        task.add_done_callback(self._sends.discard)
