"""A rendered Serve config, taken by Ray Serve: its schema, and a cluster that answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.serve.schema import ServeDeploySchema

from cluster.spec import ClusterSpec, parse_spec
from deploy.ray_app import build
from deploy.render.kuberay import KubeRayOptions, manifests
from deploy.render.serve_config import ENVIRONMENT, IMPORT_PATH, serve_config
from deploy.tiny_model_torch import build_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PORT = 18231
# What `serve deploy` does: the config goes to the dashboard of a running cluster, whose nodes have what a
# RayService gives to its pods.
DEPLOY = """
import json, sys, time, urllib.request
import ray
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

config, resources = json.load(sys.stdin)
context = ray.init(
    address="local", num_cpus=4, resources=resources, include_dashboard=True, dashboard_port=18265,
    object_store_memory=128 << 20, log_to_driver=False,
)
try:
    ServeSubmissionClient(f"http://{context.dashboard_url}").deploy_applications(config)
    url = "http://127.0.0.1:%d" % config["http_options"]["port"]
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url + "/pdserve/status", timeout=5) as answer:
                rows = json.load(answer)["instances"]
                if all(row["state"] == "ready" for row in rows):
                    break
        except OSError:
            pass
        assert time.monotonic() < deadline, "not ready in time"
        time.sleep(0.5)
    body = {"model": "chat", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    body["return_token_ids"] = True
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        print(json.dumps(json.load(answer)["choices"][0]["token_ids"]))
finally:
    serve.shutdown()
    ray.shutdown()
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ClusterSpec:
    model = build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return parse_spec(
        {
            "name": "rendered",
            "model": str(model),
            "served_model_name": "chat",
            "device": "cpu",
            "engine": "sim",
            "sim": {"step_s": 0.005},
            "prefill": {"cpus": 0.1, "resources": {"pdserve_prefill": 1}},
            "decode": {"count": 2, "cpus": 0.1, "resources": {"pdserve_decode": 1}},
            "ingress": {"port": PORT, "cpus": 0.1, "resources": {"pdserve_ingress": 1}},
            "batch": {"directory": str(model.parent / "batches")},
        }
    )


def test_serve_takes_it(spec: ClusterSpec) -> None:
    schema = ServeDeploySchema.model_validate(serve_config(spec))
    assert not schema.model_extra
    (application,) = schema.applications
    assert not application.model_extra
    module, _, name = IMPORT_PATH.partition(":")
    assert (module, name) == (build.__module__, build.__name__)
    bound = build(application.args)
    assert bound._bound_deployment.ray_actor_options["resources"] == {"pdserve_ingress": 1}


def test_so_it_does_from_a_ray_service(spec: ClusterSpec) -> None:
    import yaml

    (service,) = manifests(spec, KubeRayOptions(image="i", ray_version="2.60.0"))
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert schema.http_options.host == "0.0.0.0"
    assert parse_spec(schema.applications[0].args["spec"]).name == spec.name


def test_a_cluster_that_was_deployed_so_answers(spec: ClusterSpec) -> None:
    from tests.twins import expected_tokens

    # Room for just what there is: whoever took another's place would keep it from starting.
    resources = {"pdserve_prefill": 1, "pdserve_decode": 2, "pdserve_ingress": 1}
    ran = subprocess.run(
        [sys.executable, "-c", DEPLOY],
        input=json.dumps([serve_config(spec), resources]),
        env={
            **os.environ,
            **ENVIRONMENT,
            # No other load balancer is to notice that it ends.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
            "PYTHONPATH": str(Path.cwd()),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout.splitlines()[-1]) == expected_tokens([7], 4)
