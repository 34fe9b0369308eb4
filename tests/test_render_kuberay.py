"""A spec as a RayService."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.instance import Role
from cluster.spec import ClusterSpec, parse_spec
from deploy.render.kuberay import KubeRayOptions, manifests

OPTIONS = KubeRayOptions(image="registry.example/pdserve:1", ray_version="2.60.0")

# Fields of ray.io/v1 that are used; KubeRay's CRDs refuse others or drop them without a word.
SERVICE = {
    "serveConfigV2",
    "excludeHeadPodFromServeSvc",
    "rayClusterDeletionDelaySeconds",
    "rayClusterConfig",
}
CLUSTER = {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"rayStartParams", "template"}
GROUP = HEAD | {"groupName", "replicas", "minReplicas", "maxReplicas"}


def spec_of(**more: Any) -> ClusterSpec:
    return parse_spec(
        {
            "name": "chat",
            "model": "/models/llama",
            "engine_options": {"max_model_len": 16384},
            "prefill": {"count": 3, "tensor_parallel_size": 2},
            "decode": {"count": 2, "tensor_parallel_size": 4, "cpus": 40},
            "ingress": {"replicas": 2, "port": 8100},
            "deadlines": {"drain_s": 45},
            **more,
        }
    )


def service_of(spec: ClusterSpec, options: KubeRayOptions = OPTIONS) -> dict[str, Any]:
    made = manifests(spec, options)[-1]
    assert made["kind"] == "RayService"
    assert made["apiVersion"] == "ray.io/v1"
    service: dict[str, Any] = made["spec"]
    return service


def groups_of(service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in service["rayClusterConfig"]["workerGroupSpecs"]}


def container_of(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    found: dict[str, Any] = container
    return found


def test_its_fields_are_those_of_a_ray_service() -> None:
    service = service_of(spec_of())
    assert set(service) == SERVICE
    assert set(service["rayClusterConfig"]) == CLUSTER
    assert set(service["rayClusterConfig"]["headGroupSpec"]) == HEAD
    for group in groups_of(service).values():
        assert set(group) == GROUP
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    yaml.safe_dump(service)


def test_a_pod_for_every_instance_and_replica_with_what_it_needs() -> None:
    groups = groups_of(service_of(spec_of()))
    assert {name: group["replicas"] for name, group in groups.items()} == {
        "ingress": 2,
        "prefill": 3,
        "decode": 2,
    }
    limits = {name: container_of(group)["resources"]["limits"] for name, group in groups.items()}
    assert limits["prefill"] == {"cpu": "16", "memory": "128Gi", "nvidia.com/gpu": "2"}
    # The spec's own cores, where they are more.
    assert limits["decode"] == {"cpu": "40", "memory": "256Gi", "nvidia.com/gpu": "4"}
    assert "nvidia.com/gpu" not in limits["ingress"]
    for group in groups.values():
        assert container_of(group)["resources"]["requests"] == container_of(group)["resources"]["limits"]


def test_each_instance_and_replica_runs_in_a_pod_of_its_own_group() -> None:
    """Anywhere else it would take the place of one that is not there yet."""
    service = service_of(spec_of())
    served = yaml.safe_load(service["serveConfigV2"])["applications"][0]["args"]["spec"]
    for name, group in groups_of(service).items():
        params = group["rayStartParams"]
        # Ray reads it as JSON from a shell's word.
        assert params["resources"] == f"'{{\"pdserve_{name}\": 1.0}}'"
        assert served[name]["resources"] == {f"pdserve_{name}": 1.0}
        assert int(params["num-cpus"]) >= served[name].get("cpus", 1)
    assert service["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_a_pod_for_every_node_where_instances_share_one() -> None:
    """Two prefill instances of two GPUs and one decode instance of four on each of three nodes."""
    pools = {"prefill": {"count": 6, "tensor_parallel_size": 2, "cpus": 3}}
    pools["decode"] = {"count": 3, "tensor_parallel_size": 4, "resources": {"big": 0.5}}
    service = service_of(spec_of(colocate=8, **pools))
    assert set(groups_of(service)) == {"ingress", "node"}
    node = groups_of(service)["node"]
    assert node["replicas"] == 3
    assert container_of(node)["resources"]["limits"] == {
        "cpu": "64",
        "memory": "512Gi",
        "nvidia.com/gpu": "8",
    }
    assert node["rayStartParams"]["resources"] == (
        '\'{"pdserve_prefill": 2.0, "big": 0.5, "pdserve_decode": 1.0}\''
    )
    assert node["rayStartParams"]["num-cpus"] == "7"


def test_nodes_that_are_not_alike_are_no_group_of_pods() -> None:
    pools = {"prefill": {"count": 3, "tensor_parallel_size": 2}, "decode": {"count": 2}}
    with pytest.raises(ValueError, match="the nodes are not alike"):
        service_of(spec_of(colocate=4, **pools))
    labels = {Role.PREFILL: {"gpu": "h100"}, Role.DECODE: {"gpu": "a100"}}
    options = replace(OPTIONS, selectors=labels)
    pools = {"prefill": {"count": 2}, "decode": {"count": 2}}
    with pytest.raises(ValueError, match="nodes with gpu h100 and a100"):
        service_of(spec_of(colocate=2, **pools), options)


def test_the_spec_arrives_as_it_was_and_listens_to_others() -> None:
    spec = spec_of(slo={"classes": {"chat": {"ttft_ms": 300}}, "default": "chat"})
    served = parse_spec(yaml.safe_load(service_of(spec)["serveConfigV2"])["applications"][0]["args"]["spec"])
    assert served.ingress.host == "0.0.0.0"
    like_before = served.model_copy(
        update={"ingress": spec.ingress, "prefill": spec.prefill, "decode": spec.decode}
    )
    assert like_before == spec


def test_only_ingress_pods_are_asked_for_requests() -> None:
    service = service_of(spec_of(ingress={"port": 8100}))
    groups = groups_of(service)
    assert yaml.safe_load(service["serveConfigV2"])["proxy_location"] == "EveryNode"
    assert container_of(groups["ingress"])["ports"] == [{"name": "serve", "containerPort": 8100}]
    assert "ports" not in container_of(groups["prefill"])


def test_another_spec_is_another_cluster() -> None:
    """KubeRay would otherwise hand it to a running controller, which serves one spec in its life."""

    def digest(spec: ClusterSpec) -> str:
        found = {
            group["template"]["metadata"]["annotations"]["pdserve/spec"]
            for group in groups_of(service_of(spec)).values()
        }
        (one,) = found
        return str(one)

    assert digest(spec_of()) == digest(spec_of())
    assert digest(spec_of()) != digest(spec_of(policy="mooncake"))


def test_a_drain_has_its_time() -> None:
    service = service_of(spec_of())
    assert service["rayClusterDeletionDelaySeconds"] >= 45
    for group in groups_of(service).values():
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 45


def test_what_the_machines_are_like() -> None:
    options = KubeRayOptions(
        image="i",
        ray_version="2.60.0",
        namespace="llm",
        claim=("weights", "/models"),
        secret="hub",
        selectors={Role.PREFILL: {"gpu": "h100"}},
        rdma="rdma/hca",
    )
    made = manifests(spec_of(), options)[-1]
    assert made["metadata"] == {"name": "chat", "namespace": "llm"}
    groups = groups_of(made["spec"])
    assert groups["prefill"]["template"]["spec"]["nodeSelector"] == {"gpu": "h100"}
    assert groups["decode"]["template"]["spec"]["nodeSelector"] == {}
    prefill = container_of(groups["prefill"])
    assert prefill["resources"]["limits"]["rdma/hca"] == "2"
    assert prefill["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    head = made["spec"]["rayClusterConfig"]["headGroupSpec"]
    for group in (head, *groups.values()):
        container = container_of(group)
        assert {"name": "models", "mountPath": "/models"} in container["volumeMounts"]
        assert container["envFrom"] == [{"secretRef": {"name": "hub"}}]
        names = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert names == {mount["name"] for mount in container["volumeMounts"]}


def test_profiles_travel_along(tmp_path: Path) -> None:
    for role in Role:
        (tmp_path / f"{role}-cpu.json").write_text(f'"{role}"')
    both = {str(role): str(tmp_path / f"{role}-cpu.json") for role in Role}
    config, service = manifests(spec_of(sim={"profile": both}), OPTIONS)
    assert config["kind"] == "ConfigMap"
    assert config["data"] == {"prefill.json": '"prefill"', "decode.json": '"decode"'}
    served = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["spec"]
    (mount,) = [
        one for one in container_of(groups_of(service["spec"])["ingress"])["volumeMounts"]
        if one["name"] == "profiles"
    ]  # fmt: skip
    assert served["sim"]["profile"] == {str(role): f"{mount['mountPath']}/{role}.json" for role in Role}
    with pytest.raises(ValueError, match=r"sim.profile: .*none.json: No such file"):
        manifests(spec_of(sim={"profile": str(tmp_path / "none.json")}), OPTIONS)
    one, service = manifests(spec_of(sim={"profile": both["decode"]}), OPTIONS)
    assert one["data"] == {"profile.json": '"decode"'}


def test_without_gpus_no_pod_asks_for_one() -> None:
    groups = groups_of(service_of(spec_of(device="cpu", engine="sim")))
    for group in groups.values():
        assert "nvidia.com/gpu" not in container_of(group)["resources"]["limits"]


def test_a_pool_without_instances_has_no_group() -> None:
    assert set(groups_of(service_of(spec_of(policy="unsplit", prefill={"count": 0})))) == {
        "ingress",
        "decode",
    }


@pytest.mark.parametrize(
    ("size", "ranks", "pods", "gpus"), [(16, 1, 2, 8), (8, 2, 2, 8), (2, 1, 1, 2), (6, 2, 2, 6)]
)
def test_what_of_a_group_fits_a_node_is_one_pod(size: int, ranks: int, pods: int, gpus: int) -> None:
    decode = {"count": size, "data_parallel_size": size, "tensor_parallel_size": ranks}
    group = groups_of(service_of(spec_of(decode=decode)))["decode"]
    assert group["replicas"] == pods
    assert container_of(group)["resources"]["limits"]["nvidia.com/gpu"] == str(gpus)
