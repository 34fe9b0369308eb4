"""vLLM's front end on the cluster: RemoteLLM is vLLM's AsyncLLM whose engine core is our router.

Tokenizing, detokenizing, stop strings, parsers and the whole HTTP surface are vLLM's. The cut is at
`EngineCoreClient`: what AsyncLLM gives its engine core becomes a `ServeRequest`, what engines answer comes
back as `EngineCoreOutputs`.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from cluster import vllm_api
from cluster.errors import NoSlack, ServingError
from cluster.instance import InstanceInfo, InstanceState, Role
from cluster.metrics import IngressMetrics
from cluster.request import Handoff, ServeRequest
from cluster.spec import ClusterSpec
from cluster.wire import DUE_PARAM, KEEP_PARAM, OUR_PARAMS
from router.adapters import ClusterAdapters
from router.decision_log import DecisionLog, log_path
from router.decisions import Decisions
from router.hop import Hop, HopKind
from router.link_zmq import LinkKeeper
from router.policies import PREFIX_AWARE, make_policy, predictor_of
from router.router import Router
from router.sampling import UNSPLIT, handoff_of, needs_seed
from router.traits import CURRENT

logger = logging.getLogger(__name__)

GracefulHTTPError: Any = vllm_api.GracefulHTTPError
EngineCoreClient: Any = vllm_api.EngineCoreClient
AsyncLLM: Any = vllm_api.AsyncLLM

CALL_DEADLINE_S = 60.0


class RequestEnded(GracefulHTTPError):  # type: ignore[misc]
    """A ServingError as vLLM's server answers it: its status, an OpenAI error body, our headers."""

    def __init__(self, error: ServingError) -> None:
        super().__init__(str(error), HTTPStatus(error.http_status))
        self.error = error

    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        headers = {"x-pdserve-reason": self.error.reason}
        if self.error.retryable and self.error.http_status in (429, 503):
            headers["Retry-After"] = str(self.error.facts.get("retry_after_s", 1))
        return headers


def hop_request(original: Any, hop: Hop) -> Any:
    """The engine's request (vLLM's `EngineCoreRequest`) for one hop of the client's."""
    request = copy.copy(original)
    request.request_id = hop.hop_id
    request.prompt_token_ids = hop.prompt_token_ids
    request.external_req_id = None
    request.client_index = 0
    request.priority = (
        hop.request.priority
    )  # with that of its class; it counts where vLLM's policy is priority
    sent = len(hop.prompt_token_ids) + hop.awaits - len(hop.request.prompt_token_ids)
    if hop.kind is HopKind.PREFILL and not hop.deliver:
        # Its token is for nobody: sample it the cheapest way, whatever the client asked.
        params = vllm_api.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    else:
        params = copy.copy(original.sampling_params)
        params.max_tokens = hop.max_tokens
        params.min_tokens = min(max(0, params.min_tokens - sent), hop.max_tokens)
        if not hop.is_first or (hop.kind is HopKind.DECODE and sent):
            # They went out with the first token; asking again would make the engine compute the whole prompt.
            params.prompt_logprobs = None
            params.prompt_logprob_token_ids = None
            params.prompt_logprob_start = None
            params.skip_reading_prefix_cache = False
    extra = dict(params.extra_args or {})
    if (kv_params := hop.kv_params) is not None:
        extra["kv_transfer_params"] = dict(kv_params)
    if hop.deadline_s < math.inf:
        extra[DUE_PARAM] = hop.deadline_s - asyncio.get_running_loop().time()
    if hop.keep_s:
        extra[KEEP_PARAM] = hop.keep_s
    params.extra_args = extra or None
    request.sampling_params = params
    return request


class ClusterCore(EngineCoreClient):  # type: ignore[misc]
    """The engine core that RemoteLLM talks to.

    Attributes:
        engine_ranks_managed: engine indices for vLLM's metrics, one per place of the spec.
        ingress: name of this replica.
        decisions: what it decided lately, and what came of it.
        drain_instance: empties an instance and has it replaced, where somebody supervises them; says whether
            nobody was cut off.
    """

    def __init__(self, spec: ClusterSpec, metrics: IngressMetrics, *, ingress: str, engine: str) -> None:
        self.engine_ranks_managed = list(range(len(spec.places())))
        self.resources = SimpleNamespace(engine_dead=False)
        self.ingress = ingress
        self.decisions = Decisions(self._external_id)
        self.drain_instance: Callable[[str], Awaitable[bool]] | None = None
        predictor = predictor_of(spec)
        self.router = Router(
            make_policy(spec.policy, predictor),
            spec.deadlines,
            self,
            metrics,
            predictor,
            by_deadline=spec.prefill_order == "deadline",
            with_prefixes=spec.policy in PREFIX_AWARE,
            decisions=self.decisions,
            tenant_weights=spec.slo.tenant_weights,
            promised_tpot_s=spec.slo.tightest_tpot_s,
            keeps_sessions=spec.keep_sessions,
            rebalance=spec.rebalance,
        )
        self.links = LinkKeeper(
            self.router,
            ingress=ingress,
            engine=engine,
            encode=self._encode,
            on_outputs=self._on_outputs,
            on_left=self._on_left,
        )
        self.adapters = ClusterAdapters(self.router.fleet, self.links.links)
        self.output_processor: Any = None
        self._encoder = vllm_api.MsgpackEncoder()
        self._decoder = vllm_api.MsgpackDecoder(vllm_api.EngineCoreOutputs)
        self._originals: dict[str, Any] = {}
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()
        # Seeds must differ between ingresses: each takes its own stream of the spec's seed.
        self._seeds = random.Random(f"{spec.seed}/{ingress}")
        self._decision_log: DecisionLog | None = None
        if (path := log_path(spec.ingress, ingress)) is not None:
            self._decision_log = DecisionLog(path, self.router.fleet, self._external_id)
            self._decision_log.open()
            self.router.on_decision = self._decision_log.add

    # --- requests: what AsyncLLM calls

    async def add_request_async(self, request: Any) -> None:
        params = request.sampling_params
        if params is None or request.resumable:
            raise vllm_api.VLLMValidationError("only text generation with a complete prompt is served here")
        handoff = handoff_of(params)
        # A copy: with n > 1 vLLM gives one object to all choices, and each needs a seed of its own.
        request.sampling_params = params = copy.copy(params)
        # Where KV comes from, and what else is between us and engines, is never a client's to say.
        params.extra_args = {
            key: value
            for key, value in (params.extra_args or {}).items()
            if key not in ("kv_transfer_params", UNSPLIT, *OUR_PARAMS)
        }
        if request.mm_features or request.prompt_embeds is not None:
            handoff = Handoff.NOTHING
        if needs_seed(params, handoff):
            params.seed = self._seeds.getrandbits(31)
        request_id = request.request_id
        self._originals[request_id] = request
        traits = CURRENT.get()
        adapter = request.lora_request
        try:
            self.router.submit(
                ServeRequest(
                    request_id=request_id,
                    prompt_token_ids=request.prompt_token_ids,
                    max_tokens=params.max_tokens,
                    handoff=handoff,
                    slo=traits.slo,
                    slo_class=traits.slo_class,
                    priority=traits.priority + request.priority,
                    session_id=traits.session_id,
                    tenant=traits.tenant,
                    fills_slack=traits.fills_slack,
                    plain_prompt=not (adapter or request.cache_salt or request.mm_features),
                    adapter=adapter.lora_name if adapter else "",
                )
            )
        except ServingError as error:
            # After AsyncLLM has registered the request: told as its end, so that the registration goes too.
            asyncio.get_running_loop().call_soon(self.fail, request_id, error)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        # Called by AsyncLLM's output handler only: these ended well, at a stop string.
        self.router.abort(request_ids, outcome="ok")

    async def get_output_async(self) -> Any:
        return await self._outputs.get()

    def fail(self, request_id: str, error: ServingError) -> None:
        """End a request with an error at its client (`router.Client`)."""
        self.forget(request_id)
        state = self.output_processor.request_states.get(request_id)
        if state is None:
            return
        if not isinstance(error, NoSlack):  # whoever fills slack asks again and again
            logger.warning("request %s ended: %s", request_id, error)
        whole = state.parent_req.request_id if state.parent_req is not None else request_id
        self.router.abort(self.output_processor.abort_requests([whole], internal=True), outcome=error.reason)
        state.queue.put(RequestEnded(error))

    def forget(self, request_id: str) -> None:
        """The request is over, well or badly (`router.Client`)."""
        self._originals.pop(request_id, None)

    # --- engines: what links call

    def _external_id(self, request_id: str) -> str | None:
        original = self._originals.get(request_id)
        return None if original is None else original.external_req_id

    def _encode(self, hop: Hop) -> Sequence[Any]:
        request = hop_request(self._originals[hop.request.request_id], hop)
        return self._encoder.encode(request)  # type: ignore[no-any-return]

    def _on_outputs(self, info: InstanceInfo, frames: Sequence[Any]) -> None:
        step = self._decoder.decode(frames)
        now = time.monotonic()
        shift = now - step.timestamp
        step.outputs = self.router.on_outputs(info.instance_id, step.outputs)
        if not step.outputs and step.scheduler_stats is None:
            return
        for output in step.outputs:
            # Event times are the worker's monotonic clock; another machine's has another origin.
            for event in output.events or ():
                event.timestamp += shift
        step.timestamp = now
        step.engine_index = info.engine_index
        self._outputs.put_nowait(step)

    def _on_left(self, info: InstanceInfo) -> None:
        # What it had last would stay in vLLM's gauges until its place is taken and has something to say.
        nothing = vllm_api.EngineCoreOutputs(
            engine_index=info.engine_index,
            outputs=[],
            scheduler_stats=vllm_api.SchedulerStats(),
            timestamp=time.monotonic(),
        )
        self._outputs.put_nowait(nothing)

    # --- the rest of EngineCoreClient: calls of every engine

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def call_all(self, method: str, *args: Any) -> list[Any]:
        """Call an engine method on every reachable instance. Raises when one of them fails."""
        links = list(self.links.links.values())
        return await asyncio.gather(*(link.call(method, list(args), CALL_DEADLINE_S) for link in links))

    async def reset_mm_cache_async(self) -> None:
        await self.call_all("reset_mm_cache")

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        return all(await self.call_all("reset_prefix_cache", reset_running_requests, reset_connector))

    async def reset_encoder_cache_async(self) -> None:
        await self.call_all("reset_encoder_cache")

    async def is_sleeping_async(self) -> bool:
        return any(await self.call_all("is_sleeping"))

    async def is_scheduler_paused_async(self) -> bool:
        return any(await self.call_all("is_scheduler_paused"))

    async def add_lora_async(self, lora_request: Any) -> bool:
        return await self.adapters.add(lora_request)

    async def remove_lora_async(self, lora_id: int) -> bool:
        return await self.adapters.remove(lora_id)

    async def pin_lora_async(self, lora_id: int) -> bool:
        return await self.adapters.pin(lora_id)

    async def list_loras_async(self) -> set[int]:
        return set().union(*await self.call_all("list_loras"))

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing of this process: instances belong to the controller, links to `close`."""

    async def close(self) -> None:
        """Leave every instance."""
        await self.links.close()
        if self._decision_log is not None:
            await self._decision_log.close()


@contextmanager
def _core_made_by(factory: Callable[..., ClusterCore]) -> Iterator[None]:
    """Let AsyncLLM's constructor get its core from `factory`.

    It calls `EngineCoreClient.make_async_mp_client`, looked up in its own module: the one seam that leaves
    all else of the construction to vLLM.
    """
    module = sys.modules[AsyncLLM.__module__]
    stock = module.EngineCoreClient
    module.EngineCoreClient = SimpleNamespace(make_async_mp_client=factory)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.EngineCoreClient = stock  # type: ignore[attr-defined]


class RemoteLLM(AsyncLLM):  # type: ignore[misc]
    """AsyncLLM on a ClusterCore."""

    def __init__(self, config: Any, core: ClusterCore) -> None:
        with _core_made_by(lambda **_: core):
            super().__init__(config, executor_class=None, log_stats=True, log_requests=False)
        core.output_processor = self.output_processor
        self._guard_statistics()

    def _guard_statistics(self) -> None:
        # Statistics that a logger can't read would end vLLM's output handler, and with it the server.
        manager = self.logger_manager
        if manager is None:
            return
        record = manager.record

        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                record(*args, **kwargs)
            except Exception:
                logger.exception("statistics of one step were lost")

        manager.record = guarded

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """The client left: stop its request, here and in the engines."""
        request_ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self.engine_core.router.abort(self.output_processor.abort_requests(request_ids, internal))

    async def check_health(self) -> None:
        """Raise EngineDeadError (503) while draining, while a role has no READY instance, and for good when
        the output handler has died."""
        await super().check_health()
        if not self.engine_core.router.can_serve():
            raise self.dead_error


def cluster_status(core: ClusterCore) -> dict[str, Any]:
    """What `/pdserve/status` shows: every place of the cluster as this ingress sees it."""
    reachable = core.links.links
    rows = []
    for info in core.links.membership.instances:
        row = info.to_json()
        link = reachable.get(info.instance_id)
        row["reachable"] = link is not None
        row["outstanding_tokens"] = core.router.reservations.tokens(info.instance_id)
        row["outstanding_requests"] = core.router.reservations.requests(info.instance_id)
        view = core.router.fleet.view_of(info.instance_id)
        if view is not None:
            # What its iterations take, against what was predicted, and from how many that was learned.
            row["pace"] = {
                "prefill": {"factor": view.prefill_pace.factor, "seen": view.prefill_pace.seen},
                "decode": {"factor": view.decode_pace.factor, "seen": view.decode_pace.seen},
            }
        row["adapters"] = list(view.adapters.on_host) if view else []
        row["load"] = (
            {"running": link.load.running, "waiting": link.load.waiting, "kv_usage": link.load.kv_usage}
            if link
            else None
        )
        rows.append(row)
    ready = {
        role.value: sum(
            i.role is role and i.state is InstanceState.READY and i.instance_id in reachable
            for i in core.links.membership.instances
        )
        for role in Role
    }
    return {
        "ready": all(ready.values()) and not core.router.draining,
        "instances": rows,
        "pending": core.router.pending,
        "in_engines": core.router.open_hops,
    }
