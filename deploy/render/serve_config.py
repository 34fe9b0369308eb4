"""A spec as a Ray Serve config: what `serve deploy` and a RayService take."""

from __future__ import annotations

from typing import Any, Literal

from cluster.spec import ClusterSpec

IMPORT_PATH = "deploy.ray_app:build"
# Of every process of the cluster, read by Ray and Serve when they start. With HAProxy a token costs a tenth
# of what it costs in Serve's Python proxy; in a second event loop the ingress costs a quarter more.
ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def raw(spec: ClusterSpec) -> dict[str, Any]:
    """The spec's keys, without those that are as by default; `parse_spec` makes an equal spec of them."""
    found: dict[str, Any] = spec.model_dump(mode="json", exclude_defaults=True)
    return found


def serve_config(
    spec: ClusterSpec, *, proxies: Literal["HeadOnly", "EveryNode"] | None = None
) -> dict[str, Any]:
    """As `ray.serve.schema.ServeDeploySchema`, the spec inline.

    Args:
        proxies: where requests arrive: at Ray's head, or at every node that has an ingress replica; by
            default at the latter where there are several replicas.

    How many ingress replicas there are, and with which options, `deploy.ray_app` says from the spec: written
    here as well it could be changed here alone.
    """
    return {
        "proxy_location": proxies or ("EveryNode" if spec.ingress.replicas > 1 else "HeadOnly"),
        "http_options": {"host": spec.ingress.host, "port": spec.ingress.port},
        "applications": [
            {
                "name": spec.name,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": {"spec": raw(spec)},
            }
        ],
    }
