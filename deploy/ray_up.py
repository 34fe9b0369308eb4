"""`pdserve up`: start or join Ray, deploy the application, wait until it serves, drain on Ctrl-C."""

from __future__ import annotations

import io
import logging
import math
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from cluster.attention import attention_backend
from cluster.errors import EnvironmentProblem, ServingError, SpecError
from cluster.instance import InstanceState
from cluster.spec import ClusterSpec
from cluster.vllm_api import require_supported_vllm
from deploy.installation import require_one_installation
from deploy.render.serve_config import ENVIRONMENT
from deploy.running import recorded, this_process
from router.policies import make_policy, predictor_of

Say = Callable[[str], None]

OBJECT_STORE_BYTES = 128 << 20
CONTROLLER_DEADLINE_S = 60.0
# The longest a change goes unnoticed that no instance tells of: that the ingress serves.
WATCH_S = 0.1


class DidNotStart(ServingError):
    """A part of the cluster can't start. Facts: `part`, `detail`, `bad_spec` (whether the spec is why)."""

    reason = "did-not-start"

    part: str
    detail: str
    bad_spec: bool

    def describe(self) -> str:
        return f"{self.part} did not start: {self.detail}"


def up(spec: ClusterSpec, *, address: str | None, say: Say, file: str) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code. `file` is where the spec is from."""
    with serving(spec, address=address, say=lambda line: say(line.replace("(spec)", file))) as url:
        say(f"serving {spec.api_model_name} at {url}/v1  (Ctrl-C to stop)")
        stop = threading.Event()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda *_: stop.set())
        stop.wait()
        say("draining")
    say("stopped")
    return 0


@contextmanager
def serving(spec: ClusterSpec, *, address: str | None = None, say: Say) -> Iterator[str]:
    """A cluster that answers at the URL given, for as long as the block runs; drained at its end.

    Raises:
        EnvironmentProblem: it can't start here; says why and what to do.
    """
    _check(spec)
    url = f"http://{spec.ingress.host}:{spec.ingress.port}"
    with recorded(this_process(spec.name, url)):
        began_s = time.monotonic()

        def timed(line: str) -> None:
            say(f"{time.monotonic() - began_s:6.1f} s  {line}")

        with _ray(spec, address, timed):
            # First the controller, so that engines load while Serve starts.
            controller = _start_controller(spec)
            try:
                timed("starting the ingress and the engines")
                _wait_until_healthy(spec, controller, _in_background(_deploy, spec), url, timed)
                yield url
            finally:
                _undeploy(spec, controller)


def _check(spec: ClusterSpec) -> None:
    """What can be known without starting anything."""
    require_one_installation()
    require_supported_vllm()
    make_policy(spec.policy, predictor_of(spec))
    if spec.device == "cpu":
        attention_backend(spec)  # on GPU clusters, what is installed here says nothing of the nodes
    looks_local = spec.model.startswith((".", "/", "~")) or spec.model.count("/") != 1
    if looks_local and not (Path(spec.model) / "config.json").is_file():
        raise SpecError(
            file="(spec)", path="model", value=spec.model,
            allowed=f"there is no checkpoint here; 'pdserve model tiny {spec.model}' builds a small one",
        )  # fmt: skip
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((spec.ingress.host, spec.ingress.port))
        except OSError as error:
            raise EnvironmentProblem(
                problem=f"port {spec.ingress.port} of {spec.ingress.host} is not free ({error.strerror})",
                remedy="stop what listens there, or choose another with --port",
            ) from None


@contextmanager
def _ray(spec: ClusterSpec, address: str | None, say: Say) -> Iterator[None]:
    """A connection to Ray; a local Ray that is started here ends with the block."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        _check_local_gpus(spec)
        # Time for other nodes' load balancers to notice a leaving replica; here there is only our own.
        os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "0.5")
        say("starting Ray")
        cores = os.cpu_count() or 1
        ray.init(
            address="local",
            num_cpus=max(cores, math.ceil(_cpus(spec))),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    else:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            raise EnvironmentProblem(
                problem=f"no Ray cluster answers at {address} ({error})",
                remedy="start one, or leave --address and RAY_ADDRESS away to start one here",
            ) from None
    try:
        yield
    finally:
        # Ray prints a failure of each actor it ends here; that is what was asked for.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            if address is None:
                from ray import serve

                serve.shutdown()
            ray.shutdown()


def _cpus(spec: ClusterSpec) -> float:
    """CPUs that Ray must have to place everything; a machine with fewer cores shares them."""
    workers = sum(spec.pool(role).cpus for _, role in spec.places())
    return workers + spec.ingress.cpus * spec.ingress.replicas


def _check_local_gpus(spec: ClusterSpec) -> None:
    if spec.device != "gpu" or spec.engine == "sim":
        return
    needed = sum(spec.pool(role).ranks for _, role in spec.places())
    found = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if found < needed:
        raise EnvironmentProblem(
            problem=f"the spec needs {needed} GPUs and this machine has {found}",
            remedy="join a Ray cluster that has them with --address, or serve deploy/specs/cpu.yaml",
        )


def _start_controller(spec: ClusterSpec) -> Any:
    import ray

    from deploy.ray_controller import get_or_create_controller, require_same_spec

    controller = get_or_create_controller(spec)
    require_same_spec(ray.get(controller.start.remote(), timeout=CONTROLLER_DEADLINE_S), spec)
    return controller


def _in_background(run: Callable[[ClusterSpec], None], spec: ClusterSpec) -> Future[None]:
    """Run it in a thread that does not keep the program: Serve's call has no deadline of its own."""
    result: Future[None] = Future()

    def report() -> None:
        try:
            run(spec)
            result.set_result(None)
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=report, name="serve-run", daemon=True).start()
    return result


def _deploy(spec: ClusterSpec) -> None:
    """Deploy the application; returns when its replicas are up."""
    from ray import serve

    from deploy.ray_app import application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        http_options={"host": spec.ingress.host, "port": spec.ingress.port},
        proxy_location="EveryNode" if spec.ingress.replicas > 1 else "HeadOnly",
    )
    serve.run(application(spec), name=spec.name, route_prefix="/", blocking=False)


def _wait_until_healthy(
    spec: ClusterSpec, controller: Any, deploying: Future[None], url: str, say: Say
) -> None:
    import ray

    seen: dict[str, tuple[str, str]] = {}
    version = -1
    deadline_s = time.monotonic() + spec.deadlines.startup_s
    while True:
        membership = ray.get(controller.watch.remote(version, WATCH_S), timeout=CONTROLLER_DEADLINE_S)
        version = membership.version
        for info in membership.instances:
            news = (info.state.value, info.detail)
            if seen.get(info.instance_id) != news:
                seen[info.instance_id] = news
                say(f"{info.instance_id}: {info.detail or info.state.value}")
            if info.hopeless:
                raise DidNotStart(
                    part=info.instance_id, detail=info.detail, bad_spec=info.hopeless == SpecError.reason
                )
        if deploying.done():
            _require_deployed(spec, deploying)
            if all(info.state is InstanceState.READY for info in membership.instances) and _healthy(url):
                return
        if time.monotonic() > deadline_s:
            raise EnvironmentProblem(
                problem=f"the cluster was not ready after {spec.deadlines.startup_s:g} s",
                remedy="raise deadlines.startup_s in the spec if loading simply takes longer",
            )


def _require_deployed(spec: ClusterSpec, deploying: Future[None]) -> None:
    error = deploying.exception()
    if error is None:
        return
    from ray import serve

    # Serve itself may not have come up, for example for a port of its proxy that is not free.
    application = serve.status().applications.get(spec.name)
    told_of = application.deployments.values() if application is not None else ()
    text = "\n".join([str(error), *(deployment.message for deployment in told_of)])
    # Serve tells with its replica's traceback; what ended the start-up is an error of ours, or the last line.
    told = re.findall(r"(SpecError|EnvironmentProblem)\b[^:\n]*: (.+)", text)
    kind, detail = told[-1] if told else (type(error).__name__, text.strip().splitlines()[-1])
    raise DidNotStart(part="the ingress", detail=detail, bad_spec=kind == SpecError.__name__)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _undeploy(spec: ClusterSpec, controller: Any) -> None:
    import ray
    from ray import serve
    from ray.exceptions import RayError

    try:
        serve.delete(spec.name)
        if controller is not None:
            ray.get(controller.stop.remote(spec.deadlines.drain_s), timeout=spec.deadlines.drain_s + 30.0)
    except (RayError, TimeoutError):
        pass  # what is left ends with the controller
    finally:
        if controller is not None:
            ray.kill(controller, no_restart=True)
