"""The HTTP app of an ingress: vLLM's own OpenAI server on a RemoteLLM, and our few routes beside it."""

from __future__ import annotations

import os
from argparse import Namespace
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from cluster import vllm_api
from cluster.errors import SpecError, UnknownInstance
from cluster.spec import ClusterSpec
from cluster.vllm_options import server_arguments
from router.batch_ask import asking
from router.batch_routes import add_batches
from router.batch_runner import BatchRunner
from router.batch_store import BatchStore
from router.traits import TraitsMiddleware
from router.vllm_frontend import ClusterCore, RemoteLLM, RequestEnded, cluster_status

_TASKS = ("generate",)


def parse_server_arguments(spec: ClusterSpec) -> Namespace:
    """vLLM's server arguments. Raises SpecError with vLLM's words for an option or value it does not know."""
    parser = vllm_api.make_arg_parser(vllm_api.FlexibleArgumentParser(exit_on_error=False))

    def refuse(message: str) -> None:
        raise SpecError(
            file="(spec)", path="ingress.server_options", value=dict(spec.ingress.server_options),
            allowed=f"vLLM's server says: {message}",
        )  # fmt: skip

    parser.error = refuse
    args: Namespace = parser.parse_args(server_arguments(spec))
    try:
        vllm_api.validate_parsed_serve_args(args)
        vllm_api.validate_api_server_args(args)
    except (KeyError, TypeError, ValueError) as error:
        refuse(str(error))
    return args


async def build_server(spec: ClusterSpec, core: ClusterCore) -> FastAPI:
    """The app, ready to serve as soon as the core reaches instances."""
    args = parse_server_arguments(spec)
    engine_args = vllm_api.AsyncEngineArgs.from_cli_args(args)
    config = engine_args.create_engine_config(vllm_api.UsageContext.OPENAI_API_SERVER)
    llm = RemoteLLM(config, core)
    app: FastAPI = vllm_api.build_app(args, _TASKS, config.model_config)
    await vllm_api.init_app_state(llm, app.state, args, _TASKS)
    # vLLM's handlers end their own uvicorn through this when an engine is dead; ours stays up and says 503.
    app.state.server = SimpleNamespace(should_exit=False)
    # vLLM's app has its middleware built already, without ours and our error handler: have it built again.
    app.middleware_stack = None
    _add_routes(app, core, spec, _api_key(args))
    store = BatchStore(spec.batch.path(spec.name))
    runner = BatchRunner(store, asking(app, _api_key(args)), spec.batch)
    add_batches(app, store, runner, spec.batch)
    app.add_middleware(TraitsMiddleware, spec=spec.slo)
    return app


def _api_key(args: Namespace) -> str | None:
    """One that the server accepts, by vLLM's rule; None where it wants none."""
    return next(filter(None, args.api_key or [os.environ.get("VLLM_API_KEY")]), None)


def _refusal(status: HTTPStatus, message: str, headers: dict[str, str]) -> JSONResponse:
    """An error as OpenAI's API has them."""
    body = {"message": message, "type": status.phrase, "param": None, "code": int(status)}
    return JSONResponse({"error": body}, status_code=int(status), headers=headers)


def _add_routes(app: FastAPI, core: ClusterCore, spec: ClusterSpec, key: str | None) -> None:
    # Each replica knows its own requests: whoever asks must know how many there are to be asked.
    replica = {"x-pdserve-ingress": core.ingress, "x-pdserve-ingresses": str(spec.ingress.replicas)}

    def may_change(request: Request) -> bool:
        return key is None or request.headers.get("authorization") == f"Bearer {key}"

    @app.get("/pdserve/status")
    async def status() -> dict[str, Any]:
        return cluster_status(core)

    @app.get("/pdserve/decisions/{request_id}")
    async def decision(request_id: str) -> Response:
        found = core.decisions.find(request_id)
        if found is None:
            message = f"ingress {core.ingress} knows no request {request_id!r}, or not any more"
            return _refusal(HTTPStatus.NOT_FOUND, message, replica)
        return Response(msgspec.json.encode(found), media_type="application/json", headers=replica)

    @app.post("/pdserve/move/{request_id}")
    async def move(request_id: str, to: str, request: Request) -> Response:
        """Let a running request go on at another instance."""
        if not may_change(request):
            return _refusal(HTTPStatus.UNAUTHORIZED, "the API key is needed", replica)
        found = core.decisions.find(request_id)
        if found is None or found.outcome is not None:
            message = f"ingress {core.ingress} runs no request {request_id!r}"
            return _refusal(HTTPStatus.NOT_FOUND, message, replica)
        if not core.router.migrations.begin(found.request, to):
            why = f"it does not decode, its sampler has a state, or {to!r} is not there"
            return _refusal(HTTPStatus.CONFLICT, why, replica)
        return JSONResponse({"moves": True}, headers=replica)

    @app.post("/pdserve/drain/{instance_id}")
    async def drain(instance_id: str, request: Request) -> Response:
        """Empty an instance and start another life in its place; answers when it is empty."""
        if not may_change(request):
            return _refusal(HTTPStatus.UNAUTHORIZED, "the API key is needed", {})
        if core.drain_instance is None:
            return _refusal(HTTPStatus.NOT_IMPLEMENTED, "no controller supervises this cluster", {})
        try:
            return JSONResponse({"clean": await core.drain_instance(instance_id)})
        except UnknownInstance as error:
            return _refusal(HTTPStatus(error.http_status), str(error), {})

    @app.get("/live")
    async def live() -> dict[str, bool]:
        return {"alive": True}

    @app.exception_handler(RequestEnded)
    async def ended(request: Request, error: RequestEnded) -> JSONResponse:
        return _refusal(HTTPStatus(error.http_status), str(error), error.headers())
