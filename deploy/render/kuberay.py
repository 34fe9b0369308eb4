"""A spec as a RayService of KubeRay: one worker group per role, one pod per instance; or with `colocate` one
group whose pods are nodes.

The fields are those of `ray.io/v1` (KubeRay 1.4 and later). What follows from how KubeRay works:

- Traffic goes to pods that are ready, and a worker pod is ready when Serve's proxy answers in it. Only pods
  of the group `ingress` have one: pods of engines stay at 0/1, which keeps requests away from them.
- A change of `serveConfigV2` alone is applied to the running cluster, whose controller refuses another spec.
  So the spec's digest stands in the pods' annotations: any change makes a new cluster, to which KubeRay
  switches when it answers, and the old one drains.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.instance import Role
from cluster.placement import gpus_per_node, sharing
from cluster.spec import ClusterSpec
from deploy.render.serve_config import ENVIRONMENT, raw, serve_config
from deploy.render.text import to_yaml

SERVE_PORT_NAME = "serve"
HEAD_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001}
PROFILE_DIRECTORY = "/etc/pdserve"
# After the drain: what a pod has to end itself in.
GRACE_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeRayOptions:
    """What a cluster of machines is like, which a spec does not say.

    Attributes:
        image: with pdserve, vLLM and Ray; the same for all pods.
        namespace: None for that of `kubectl`.
        ray_version: of the image.
        cpus_per_gpu, memory_gib_per_gpu: of an engine's pod.
        ingress_memory_gib: of an ingress' pod, and of the head.
        claim: (name of a PersistentVolumeClaim, where it is mounted), with the checkpoints.
        secret: whose entries are environment variables of all pods, for example HF_TOKEN.
        selectors: node labels by role, which choose the type of GPU.
        rdma: a device plugin's resource, one for each GPU, for example `rdma/hca_shared_devices_a`.
    """

    image: str
    ray_version: str
    namespace: str | None = None
    cpus_per_gpu: int = 8
    memory_gib_per_gpu: int = 64
    ingress_memory_gib: int = 8
    claim: tuple[str, str] | None = None
    secret: str | None = None
    selectors: Mapping[Role, Mapping[str, str]] = field(default_factory=dict)
    rdma: str | None = None


def manifests(spec: ClusterSpec, options: KubeRayOptions) -> list[dict[str, Any]]:
    """What `kubectl apply` takes: the RayService, and before it a ConfigMap where the spec names profiles.

    Raises ValueError for a profile that can't be read, and for a placement that groups of pods can't have.
    """
    profiles = _profiles(spec)
    shown = _served(spec, profiles)
    digest = hashlib.sha256(json.dumps([raw(shown), profiles], sort_keys=True).encode()).hexdigest()[:16]
    made: list[dict[str, Any]] = []
    if profiles:
        made.append(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": _metadata(f"{spec.name}-profiles", options),
                "data": profiles,
            }
        )
    pods = _Pods(shown, options, digest, bool(profiles))
    service = {
        "rayVersion": options.ray_version,
        "headGroupSpec": pods.head(),
        "workerGroupSpecs": [pods.ingress(), *pods.engines()],
    }
    made.append(
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayService",
            "metadata": _metadata(spec.name, options),
            "spec": {
                "serveConfigV2": to_yaml([serve_config(shown, proxies="EveryNode")]),
                "excludeHeadPodFromServeSvc": True,
                # Time for the requests of the old cluster to end, from when the new one answers.
                "rayClusterDeletionDelaySeconds": math.ceil(spec.deadlines.drain_s) + GRACE_S,
                "rayClusterConfig": service,
            },
        }
    )
    return made


def _instances_of_pod(spec: ClusterSpec, role: Role) -> int:
    """As many of a data-parallel group as a node has GPUs for, the same in each pod: within one NVLink is
    there for their exchange."""
    pool = spec.pool(role)
    fit = max(1, gpus_per_node(spec, role) // pool.ranks)
    return max(n for n in range(1, min(fit, pool.data_parallel_size) + 1) if not pool.data_parallel_size % n)


class _Pods:
    """Groups of pods of one cluster."""

    def __init__(self, spec: ClusterSpec, options: KubeRayOptions, digest: str, profiles: bool) -> None:
        self._spec = spec
        self._options = options
        self._digest = digest
        self._profiles = profiles

    def head(self) -> dict[str, Any]:
        """Ray's own processes and Serve's controller; nothing is placed there."""
        resources = {"cpu": "2", "memory": f"{self._options.ingress_memory_gib}Gi"}
        return {
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
            "template": self._pod("ray-head", resources, ports=HEAD_PORTS),
        }

    def ingress(self) -> dict[str, Any]:
        """A pod for each replica."""
        ingress = self._spec.ingress
        resources = {
            "cpu": str(max(2, math.ceil(ingress.cpus))),
            "memory": f"{self._options.ingress_memory_gib}Gi",
        }
        start = _start(max(1.0, ingress.cpus), ingress.resources)
        pod = self._pod("ray-worker", resources, ports={SERVE_PORT_NAME: ingress.port})
        return self._group("ingress", ingress.replicas, start, pod)

    def engines(self) -> list[dict[str, Any]]:
        """A pod for each instance, for what of a data-parallel group fits a node, or for each node with
        instances of both pools."""
        spec = self._spec
        if spec.colocate is None:
            pods = {role: _instances_of_pod(spec, role) for role in Role}
            return [
                self._engines(str(role), {role: many}, spec.pool(role).count // many)
                for role, many in pods.items()
                if spec.pool(role).count
            ]
        roles = dict(spec.places())
        nodes = Counter(
            tuple(sum(roles[one] is role for one in node) for role in Role) for node in sharing(spec)
        )
        if len(nodes) > 1:
            had = ", ".join(f"{count} with {p}P + {d}D" for (p, d), count in nodes.items())
            raise ValueError(
                f"colocate: the nodes are not alike ({had}), and pods of a group are: choose counts of which "
                "each node has the same"
            )
        ((composition, count),) = nodes.items()
        return [self._engines("node", dict(zip(Role, composition, strict=True)), count)]

    def _engines(self, name: str, instances: Mapping[Role, int], count: int) -> dict[str, Any]:
        """A group of pods with so many instances of each role."""
        options = self._options
        pools = [(self._spec.pool(role), many) for role, many in instances.items() if many]
        ranks = sum(pool.ranks * many for pool, many in pools)
        cpus = sum(
            max(math.ceil(pool.cpus), options.cpus_per_gpu * pool.ranks) * many for pool, many in pools
        )
        resources = {"cpu": str(cpus), "memory": f"{options.memory_gib_per_gpu * ranks}Gi"}
        has_gpus = self._spec.device == "gpu" and self._spec.engine == "vllm"
        if has_gpus:
            resources["nvidia.com/gpu"] = str(ranks)
        if options.rdma:
            resources[options.rdma] = str(ranks)
        pinned: Counter[str] = Counter()
        for pool, many in pools:
            pinned.update({key: value * many for key, value in pool.resources.items()})
        start = _start(sum(pool.cpus * many for pool, many in pools), pinned)
        pod = self._pod("ray-worker", resources)
        body = pod["spec"]
        body["nodeSelector"] = self._selector([role for role, many in instances.items() if many])
        if has_gpus:
            body["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        if options.rdma:  # registered memory is locked memory
            body["containers"][0]["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
        return self._group(name, count, start, pod)

    def _selector(self, roles: Sequence[Role]) -> dict[str, str]:
        """Labels of a node for these. Raises ValueError where they want different ones."""
        found: dict[str, str] = {}
        for role in roles:
            for key, value in self._options.selectors.get(role, {}).items():
                if found.setdefault(key, value) != value:
                    raise ValueError(f"colocate: the pools want nodes with {key} {found[key]} and {value}")
        return found

    def _group(self, name: str, count: int, start: dict[str, str], pod: dict[str, Any]) -> dict[str, Any]:
        return {
            "groupName": name,
            "replicas": count,
            "minReplicas": count,
            "maxReplicas": count,
            "rayStartParams": start,
            "template": pod,
        }

    def _pod(
        self, name: str, resources: dict[str, str], *, ports: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """A pod template with one container that has so much and no less."""
        options = self._options
        # Ranks of an instance, and transfers within a node, speak through it; 64 MiB are the default.
        volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
        mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
        if options.claim:
            claim, path = options.claim
            volumes.append(
                {"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
            )
            mounts.append({"name": "models", "mountPath": path})
        if self._profiles:
            volumes.append({"name": "profiles", "configMap": {"name": f"{self._spec.name}-profiles"}})
            mounts.append({"name": "profiles", "mountPath": PROFILE_DIRECTORY})
        container: dict[str, Any] = {
            "name": name,
            "image": options.image,
            "env": [{"name": key, "value": value} for key, value in ENVIRONMENT.items()],
            "resources": {"requests": resources, "limits": dict(resources)},
            "volumeMounts": mounts,
        }
        if options.secret:
            container["envFrom"] = [{"secretRef": {"name": options.secret}}]
        if ports:
            container["ports"] = [{"name": key, "containerPort": port} for key, port in ports.items()]
        return {
            "metadata": {"annotations": {"pdserve/spec": self._digest}},
            "spec": {
                "containers": [container],
                "volumes": volumes,
                "terminationGracePeriodSeconds": math.ceil(self._spec.deadlines.drain_s) + GRACE_S,
            },
        }


def _metadata(name: str, options: KubeRayOptions) -> dict[str, Any]:
    return {"name": name} | ({"namespace": options.namespace} if options.namespace else {})


def _served(spec: ClusterSpec, profiles: Mapping[str, str]) -> ClusterSpec:
    """The spec as the pods shall read it: reachable from others, profiles where they are mounted, and each
    instance in a pod of its role."""
    where: str | dict[Role, str] | None = spec.sim.profile
    if isinstance(where, str):
        where = f"{PROFILE_DIRECTORY}/{next(iter(profiles))}"
    elif where is not None:
        where = {role: f"{PROFILE_DIRECTORY}/{role}.json" for role in where}
    pools = {
        str(role): pool.model_copy(update={"resources": _pinned(pool.resources, role)})
        for role, pool in ((role, spec.pool(role)) for role in Role)
    }
    return spec.model_copy(
        update={
            "ingress": spec.ingress.model_copy(
                update={"host": "0.0.0.0", "resources": _pinned(spec.ingress.resources, "ingress")}
            ),
            "sim": spec.sim.model_copy(update={"profile": where}),
            **pools,
        }
    )


def _pinned(resources: Mapping[str, float], group: str) -> dict[str, float]:
    return {**resources, f"pdserve_{group}": 1.0}


def _start(cpus: float, resources: Mapping[str, float]) -> dict[str, str]:
    """What `ray start` is told: room for one instance or replica, and for nothing else."""
    return {"num-cpus": str(math.ceil(cpus)), "resources": f"'{json.dumps(dict(resources))}'"}


def _profiles(spec: ClusterSpec) -> dict[str, str]:
    """The profiles' texts by the name of the file that they shall be."""
    given = spec.sim.profile
    if given is None:
        return {}
    files = {"profile": given} if isinstance(given, str) else {str(role): given[role] for role in given}
    found = {}
    for name, path in files.items():
        try:
            found[f"{name}.json"] = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"sim.profile: {path}: {error.strerror}") from None
    return found
