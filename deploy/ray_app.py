"""The Ray Serve application: `deploy.ray_app:build` is its import path in Serve configs and RayServices."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from ray import serve
from ray.exceptions import RayError

from cluster.errors import ServingError, SpecError
from cluster.metrics import IngressMetrics
from cluster.spec import ClusterSpec, load_spec, parse_spec
from deploy.installation import require_one_installation
from deploy.ray_controller import get_or_create_controller, require_same_spec

logger = logging.getLogger(__name__)

WATCH_S = 30.0
CONTROLLER_RETRY_S = 1.0
CONTROLLER_DEADLINE_S = 60.0

Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class LateApp:
    """An ASGI app that lives from lifespan start-up to lifespan end, in the replica's event loop."""

    def __init__(self, living: Callable[[], AbstractAsyncContextManager[Asgi]]) -> None:
        self._living = living
        self._app: Asgi | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            assert self._app is not None
            await self._app(scope, receive, send)
            return
        await receive()
        async with AsyncExitStack() as stack:
            try:
                self._app = await stack.enter_async_context(self._living())
            except Exception as error:
                logger.exception("the ingress did not start")
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


class IngressReplica:
    """One ingress: vLLM's OpenAI server on a RemoteLLM, in a Serve replica."""

    def __init__(self, spec: ClusterSpec) -> None:
        require_one_installation()
        if spec.device == "cpu":
            # Tokenizing needs no thread pool, and the engines need the cores.
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        if spec.lora.runtime_updates:
            os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        # First, so that the engines load while this process imports vLLM.
        get_or_create_controller(spec).start.remote()
        from router.vllm_server import parse_server_arguments

        # Here and not in the lifespan: of a constructor's errors, Serve tells what they say.
        parse_server_arguments(spec)
        self._spec = spec
        self._name = f"ingress-{uuid.uuid4().hex[:8]}"
        self._engine_client: Any = None

    def __serve_build_asgi_app__(self) -> LateApp:
        return LateApp(self._living)

    @asynccontextmanager
    async def _living(self) -> AsyncIterator[Asgi]:
        controller = await self._controller()
        from prometheus_client import REGISTRY

        from cluster.sim_engine import SIM_ENGINE_NAME
        from cluster.vllm_engine import VLLM_ENGINE_NAME
        from router.vllm_frontend import ClusterCore
        from router.vllm_server import build_server

        engine = SIM_ENGINE_NAME if self._spec.engine == "sim" else VLLM_ENGINE_NAME
        core = ClusterCore(self._spec, IngressMetrics(REGISTRY), ingress=self._name, engine=engine)
        core.drain_instance = self._drain
        app = await build_server(self._spec, core)
        watching = asyncio.create_task(self._watch(controller, core), name="watch-membership")
        self._engine_client = app.state.engine_client
        try:
            async with app.router.lifespan_context(app):
                yield app
        finally:
            self._engine_client = None
            await core.router.drain(self._spec.deadlines.drain_s)
            watching.cancel()
            await core.close()

    async def check_health(self) -> None:
        """Serve's hook: raises when this replica can't work again, so that Serve replaces it."""
        if self._engine_client is not None and self._engine_client.errored:
            raise RuntimeError("vLLM's output handler has died")

    async def _drain(self, instance_id: str) -> bool:
        deadline_s = self._spec.deadlines.drain_s
        controller = await self._controller()
        async with asyncio.timeout(deadline_s + CONTROLLER_DEADLINE_S):
            return bool(await controller.drain.remote(instance_id, deadline_s))

    async def _controller(self) -> Any:
        """The cluster's controller, started.

        Raises:
            EnvironmentProblem: it runs another spec.
        """
        controller = get_or_create_controller(self._spec)
        async with asyncio.timeout(CONTROLLER_DEADLINE_S):
            require_same_spec(await controller.start.remote(), self._spec)
        return controller

    async def _watch(self, controller: Any, core: Any) -> None:
        """Follow the controller's membership for ever."""
        version = -1
        while True:
            try:
                if controller is None:
                    controller = await self._controller()
                async with asyncio.timeout(WATCH_S + CONTROLLER_DEADLINE_S):
                    membership = await controller.watch.remote(version, WATCH_S)
            except (RayError, TimeoutError, ServingError) as error:
                # A restarted controller has a new registry; its members have new incarnations.
                logger.warning("lost the controller: %s", error)
                controller, version = None, -1
                await asyncio.sleep(CONTROLLER_RETRY_S)
                continue
            if membership.version != version:
                version = membership.version
                core.links.sync(membership)


def build(args: dict[str, Any]) -> Any:
    """Serve's application builder.

    Args:
        args: `{"spec": PATH}` or `{"spec": {...}}`, the spec inline.
    """
    given = args.get("spec")
    if given is None:
        raise SpecError(
            file="(args)", path="spec", value=args, allowed="give spec: a path, or the spec itself"
        )
    spec = parse_spec(given) if isinstance(given, dict) else load_spec(given)
    return application(spec)


def application(spec: ClusterSpec) -> Any:
    """The application of a spec, for `serve.run`."""
    deployment = serve.deployment(
        serve.ingress()(IngressReplica),
        name="ingress",
        num_replicas=spec.ingress.replicas,
        # Admission is the router's work; Serve must not queue in front of it.
        max_ongoing_requests=1_000_000,
        ray_actor_options={"num_cpus": spec.ingress.cpus, "resources": dict(spec.ingress.resources)},
        # Ray 2.60 keeps every record of its access log in memory: 3 KB a request, for ever.
        logging_config={"enable_access_log": False},
        graceful_shutdown_timeout_s=spec.deadlines.drain_s + 10.0,
        health_check_timeout_s=60.0,
    )
    return deployment.bind(spec)
