"""`pdserve render`: parses and prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import SpecError
from cluster.instance import Role
from deploy.workload_options import count_from


def add_render(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the command line; returns its parser."""
    render: argparse.ArgumentParser = commands.add_parser(
        "render", help="a spec as a Ray Serve config, or as a manifest for KubeRay"
    )
    render.add_argument("kind", choices=("serve", "kuberay"))
    render.add_argument("spec", type=Path, metavar="SPEC", help="spec file")
    render.add_argument("--model", help="checkpoint directory or hub name, instead of the spec's")
    render.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there; default: print it")
    kuberay = render.add_argument_group("for kuberay")
    kuberay.add_argument("--image", metavar="IMAGE", help="with pdserve, vLLM and Ray")
    kuberay.add_argument("--namespace", metavar="NAME")
    kuberay.add_argument("--pvc", metavar="CLAIM:PATH", help="volume with checkpoints, and where to mount it")
    kuberay.add_argument("--secret", metavar="NAME", help="whose entries become environment variables")
    kuberay.add_argument(
        "--node-selector", action="append", default=[], metavar="ROLE:KEY=VALUE", help="may be repeated"
    )
    kuberay.add_argument("--rdma", metavar="RESOURCE", help="a device plugin's, one for each GPU")
    kuberay.add_argument(
        "--cpus-per-gpu", type=count_from, default=8, metavar="N", help="default %(default)s"
    )
    kuberay.add_argument(
        "--memory-per-gpu", type=count_from, default=64, metavar="GIB", help="default %(default)s"
    )
    return render


def run_render(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Run the command; returns the exit code. Raises ValueError, SpecError for input that can't be used."""
    from cluster.spec import load_spec
    from deploy.render.kuberay import manifests
    from deploy.render.serve_config import serve_config
    from deploy.render.text import to_yaml

    if args.kind == "kuberay" and not args.image:
        raise ValueError("give --image: one with pdserve, vLLM and Ray")
    spec = load_spec(args.spec, {"model": args.model} if args.model else {})
    if not spec.model.startswith("/") and spec.model.count("/") != 1:
        raise SpecError(
            file=str(args.spec),
            path="model",
            value=spec.model,
            allowed="every machine must find it: give --model with an absolute path or a hub name",
        )
    made = [serve_config(spec)] if args.kind == "serve" else manifests(spec, _options(args))
    text = to_yaml(made)
    if args.output is None:
        print(text, end="")
        return 0
    args.output.write_text(text, encoding="utf-8")
    say(f"wrote {args.output}. Next:\n  {_next(args, spec)}")
    return 0


def _options(args: argparse.Namespace) -> Any:
    from importlib.metadata import version

    from deploy.render.kuberay import KubeRayOptions

    claim, _, path = (args.pvc or "").partition(":")
    if args.pvc and not (claim and path.startswith("/")):
        raise ValueError(f"--pvc is {args.pvc!r}, expected CLAIM:/PATH")
    selectors: dict[Role, dict[str, str]] = {}
    for text in args.node_selector:
        role, _, label = text.partition(":")
        key, _, value = label.partition("=")
        if role not in list(Role) or not key or not value:
            raise ValueError(f"--node-selector is {text!r}, expected prefill:KEY=VALUE or decode:KEY=VALUE")
        selectors.setdefault(Role(role), {})[key] = value
    return KubeRayOptions(
        image=args.image,
        ray_version=version("ray"),
        namespace=args.namespace,
        claim=(claim, path) if args.pvc else None,
        secret=args.secret,
        selectors=selectors,
        rdma=args.rdma,
        cpus_per_gpu=args.cpus_per_gpu,
        memory_gib_per_gpu=args.memory_per_gpu,
    )


def _next(args: argparse.Namespace, spec: Any) -> str:
    if args.kind == "kuberay":
        namespace = f" -n {args.namespace}" if args.namespace else ""
        return (
            f"kubectl apply -f {args.output}\n"
            f"  kubectl{namespace} port-forward svc/{spec.name}-serve-svc {spec.ingress.port}"
        )
    from deploy.render.serve_config import ENVIRONMENT

    words = " ".join(f"{key}={value}" for key, value in ENVIRONMENT.items())
    return f"{words} ray start --head   # on every machine\n  serve deploy {args.output}"
