"""`pdserve`: parses and prints; what it does is in the modules it calls."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cluster.errors import ServingError, SpecError
from deploy.kvbench.command import add_kvbench
from deploy.planner.command import add_plan
from deploy.profiler.command import add_profile
from deploy.render.command import add_render
from deploy.simulator.command import add_simulate
from deploy.verification.command import add_calibrate, add_verify
from deploy.workload_options import TRACE_HELP, add_workload_options

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """The whole command line; a test pins it."""
    parser = _Parser(prog="pdserve", description="Serve LLMs with prefill and decode on separate pools.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_up(commands)
    _add_status(commands)
    _add_explain(commands)
    _add_drain(commands)
    _add_replay(commands)
    add_simulate(commands).set_defaults(run=_simulate)
    add_plan(commands).set_defaults(run=_plan)
    add_verify(commands).set_defaults(run=_verify)
    add_calibrate(commands).set_defaults(run=_calibrate)
    add_render(commands).set_defaults(run=_render)
    add_profile(commands)
    add_kvbench(commands).set_defaults(run=_kvbench)
    _add_model(commands)
    _add_down(commands)
    return parser


def _add_up(commands: Any) -> None:
    up = commands.add_parser("up", help="start the cluster of a spec and serve until Ctrl-C")
    up.add_argument("spec", type=Path, metavar="SPEC", help="spec file, for example deploy/specs/cpu.yaml")
    up.add_argument("--model", help="checkpoint directory or hub name, instead of the spec's")
    up.add_argument("--port", type=int, help="HTTP port, instead of the spec's")
    up.add_argument("--address", help="join this Ray cluster ('auto' or host:port); default: start one here")
    up.set_defaults(run=_up)


def _add_status(commands: Any) -> None:
    status = commands.add_parser("status", help="instances with role, state and load")
    status.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the cluster's URL (default %(default)s)"
    )
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_status)


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser("explain", help="why a request went where it went, and what came of it")
    explain.add_argument(
        "request", metavar="REQUEST_ID", help="the id that the API answered with, or its x-request-id"
    )
    explain.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the cluster's URL (default %(default)s)"
    )
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.set_defaults(run=_explain)


def _add_drain(commands: Any) -> None:
    drain = commands.add_parser(
        "drain", help="empty one instance (or its group), its streams going on elsewhere, and start it anew"
    )
    drain.add_argument("instance", metavar="INSTANCE", help="for example decode-0")
    drain.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the cluster's URL (default %(default)s)"
    )
    drain.add_argument("--api-key", metavar="KEY", help="where the cluster asks for one")
    drain.set_defaults(run=_drain)


def _add_replay(commands: Any) -> None:
    replay = commands.add_parser("replay", help="send a trace at its own arrival times and measure")
    replay.add_argument("trace", metavar="TRACE", help=TRACE_HELP)
    replay.add_argument(
        "--url", default="http://127.0.0.1:8000", help="an OpenAI server (default %(default)s)"
    )
    replay.add_argument("--model", help="model name; default: the server's first")
    add_workload_options(replay)
    replay.add_argument(
        "--goodput", nargs="+", default=[], metavar="SLO", help="ttft:MS tpot:MS, for attainment and goodput"
    )
    replay.add_argument(
        "--slo",
        nargs="+",
        default=[],
        metavar="SLO",
        help="the same, or a YAML file of SLO classes; sent with every request, to be served within that",
    )
    replay.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="per request (default %(default)s)"
    )
    replay.add_argument(
        "--cancel-share", type=float, default=0.0, metavar="X", help="cancel this share at a random time"
    )
    replay.add_argument(
        "--save", type=Path, metavar="FILE", help="keep what came of each request, for `verify`"
    )
    replay.add_argument("--json", action="store_true", help="print JSON")
    replay.set_defaults(run=_replay)


def _add_model(commands: Any) -> None:
    model = commands.add_parser("model", help="build a checkpoint without a download")
    kinds = model.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=_Parser)
    tiny = kinds.add_parser("tiny", help="a small Llama with random weights, for tests and the demo")
    tiny.add_argument("directory", type=Path, metavar="DIR")
    tiny.add_argument("--seed", type=int, default=0)
    tiny.add_argument("--experts", action="store_true", help="a Mixtral, whose layers have experts")
    gemma = kinds.add_parser("gemma", help="Gemma 3 270M, from packages of the 'gemma' extra")
    gemma.add_argument("directory", type=Path, metavar="DIR")
    model.set_defaults(run=_model)


def _add_down(commands: Any) -> None:
    down = commands.add_parser("down", help="stop a cluster that `up` started")
    down.add_argument("--name", help="the spec's name; default: the only one running")
    down.set_defaults(run=_down)


def _up(args: argparse.Namespace) -> int:
    from cluster.spec import load_spec

    overrides: dict[str, Any] = {} if args.model is None else {"model": args.model}
    spec = load_spec(args.spec, overrides)
    if args.port is not None:
        spec = spec.model_copy(update={"ingress": spec.ingress.model_copy(update={"port": args.port})})
    from deploy.ray_up import up

    try:
        return up(spec, address=args.address, say=_say, file=str(args.spec))
    except ServingError as error:
        # What is found wrong in the cluster does not know the file.
        _say(f"pdserve: {str(error).replace('(spec)', str(args.spec))}")
        return _exit_code(error)


def _status(args: argparse.Namespace) -> int:
    from deploy.status import fetch_status, status_text

    status = fetch_status(args.url)
    print(json.dumps(status, indent=2) if args.json else status_text(status))
    return EXIT_OK if status["ready"] else EXIT_FAILED


def _explain(args: argparse.Namespace) -> int:
    from deploy.explain import fetch_explanation
    from router.decisions import explanation_text

    found = fetch_explanation(args.url, args.request)
    print(json.dumps(found, indent=2) if args.json else explanation_text(found))
    return EXIT_OK


def _drain(args: argparse.Namespace) -> int:
    from deploy.drain import drain_instance

    clean = drain_instance(args.url, args.instance, args.api_key)
    _say(f"{args.instance} {'is empty' if clean else 'was cut off at the deadline'}, and starts anew")
    return EXIT_OK if clean else EXIT_FAILED


def _replay(args: argparse.Namespace) -> int:
    from deploy.replay_command import replay_trace

    report = replay_trace(args, say=_say)
    print(json.dumps(report.to_json(), indent=2) if args.json else report.to_text())
    return EXIT_OK


def _simulate(args: argparse.Namespace) -> int:
    from deploy.simulator.command import run_simulate

    report, trusted = run_simulate(args, say=_say)
    print(json.dumps(report.to_json(), indent=2) if args.json else report.to_text())
    return EXIT_OK if trusted else EXIT_FAILED


def _kvbench(args: argparse.Namespace) -> int:
    from deploy.kvbench.command import run_kvbench

    report = run_kvbench(args, say=_say)
    if report is None:
        return EXIT_OK
    print(json.dumps(report.to_json(), indent=2) if args.json else report.to_text())
    return EXIT_OK


def _plan(args: argparse.Namespace) -> int:
    from deploy.planner.command import run_plan

    return run_plan(args, say=_say)


def _verify(args: argparse.Namespace) -> int:
    from deploy.verification.command import run_verify

    return run_verify(args, say=_say)


def _calibrate(args: argparse.Namespace) -> int:
    from deploy.verification.command import run_calibrate

    return run_calibrate(args, say=_say)


def _render(args: argparse.Namespace) -> int:
    from deploy.render.command import run_render

    return run_render(args, say=_say)


def _model(args: argparse.Namespace) -> int:
    if args.kind == "tiny":
        from deploy.model_store import tiny_model_ready

        if not tiny_model_ready(args.directory, seed=args.seed, experts=args.experts):
            from deploy.tiny_model_torch import build_tiny_model

            build_tiny_model(args.directory, seed=args.seed, experts=args.experts)
    else:
        from deploy.gemma_model_torch import build_gemma_model

        build_gemma_model(args.directory)
    print(args.directory)
    return EXIT_OK


def _down(args: argparse.Namespace) -> int:
    from deploy.running import stop_running

    stop_running(args.name, say=_say)
    return EXIT_OK


def _exit_code(error: ServingError) -> int:
    bad_input = isinstance(error, SpecError) or error.facts.get("bad_spec")
    return EXIT_BAD_INPUT if bad_input else EXIT_FAILED


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = make_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except ServingError as error:
        _say(f"pdserve: {error}")
        return _exit_code(error)
    except ValueError as error:
        _say(f"pdserve: {error}")
        return EXIT_BAD_INPUT
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        _say(f"pdserve: {error.filename}: {error.strerror}; name a readable file")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
