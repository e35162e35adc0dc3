"""kuberay/: manifests that fit Kubernetes' schemas, pods without rights that they don't need, nothing that the world can reach.

RayCluster and RayJob themselves are checked by our own rules and their pods by Kubernetes' schema: no package ships KubeRay's schema.
"""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest

from tests.clusters.files import CLUSTERS, IMAGE, documents, pinned, values

KUBERNETES = "1.36"
MANIFESTS = [
    pytest.param(manifest, id=f"{path.stem}-{manifest['kind']}")
    for path in sorted((CLUSTERS / "kuberay").glob("*.yaml"))
    for manifest in documents(path)
]
OURS = ("RayCluster", "RayJob")


def read(name: str) -> dict[str, Any]:
    [manifest] = documents(CLUSTERS / "kuberay" / name)
    return manifest


def pod_templates(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return list(values(manifest, "template"))


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_fits_kubernetes_schema_and_so_do_the_pods_in_it(manifest: dict[str, Any]) -> None:
    if manifest["kind"] in OURS:
        assert manifest["apiVersion"] == "ray.io/v1"
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    for template in pod_templates(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_schema_refuses_what_is_no_field_of_a_pod() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": {"containers": [{"name": "c", "imagee": "x"}]}}
    with pytest.raises(kubernetes_validate.ValidationError, match="imagee"):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_is_in_kdbenchs_namespace_and_opens_nothing(manifest: dict[str, Any]) -> None:
    assert manifest["metadata"].get("namespace", manifest["metadata"]["name"]) == "kdbench"
    assert manifest["kind"] not in ("Ingress", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
    if manifest["kind"] == "Service":
        assert manifest["spec"]["type"] == "ClusterIP"
    for key in ("hostNetwork", "hostPort", "hostPath", "nodePort", "privileged"):
        assert list(values(manifest, key)) == []


@pytest.mark.parametrize("manifest", [m for m in MANIFESTS if pod_templates(m.values[0])])
def test_no_pod_runs_as_root_or_may_become_it(manifest: dict[str, Any]) -> None:
    for template in pod_templates(manifest):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        for container in pod["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert IMAGE.fullmatch(container["image"])
            assert not [entry for entry in container.get("env", ()) if "TOKEN" in entry["name"] or "PASSWORD" in entry["name"]]


def test_only_the_namespace_itself_and_the_operator_reach_a_pod() -> None:
    everybody, operator = documents(CLUSTERS / "kuberay" / "network-policy.yaml")
    assert everybody["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": {}}]}]}
    [rule] = operator["spec"]["ingress"]
    assert [set(source) for source in rule["from"]] == [{"namespaceSelector", "podSelector"}]  # both at once
    assert rule["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert operator["spec"]["podSelector"]["matchLabels"] == {"ray.io/node-type": "head"}


def test_the_job_brings_the_very_cluster_that_stands_alone() -> None:
    assert read("rayjob.yaml")["spec"]["rayClusterSpec"] == read("raycluster.yaml")["spec"]


def test_the_cluster_asks_for_a_token_and_is_of_the_pinned_ray() -> None:
    cluster = read("raycluster.yaml")["spec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_gpu_groups_come_from_zero_and_ask_for_their_gpus() -> None:
    groups = {group["groupName"]: group for group in read("raycluster.yaml")["spec"]["workerGroupSpecs"]}
    assert sorted(groups) == ["gpu-1", "gpu-8"]
    for name, group in groups.items():
        assert (group["minReplicas"], group["replicas"]) == (0, 0)
        [container] = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == name.removeprefix("gpu-")
        assert container["image"].endswith("-gpu")


def test_the_job_goes_on_after_a_lost_cluster_and_keeps_its_results() -> None:
    job = read("rayjob.yaml")["spec"]
    assert job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"] is True
    assert "--set runtime.address=auto" in job["entrypoint"]
    assert "--results /shared/results" in job["entrypoint"]
    claims = {claim["claimName"] for claim in values(job, "persistentVolumeClaim")}
    made = {m["metadata"]["name"] for path in ("storage.yaml", "mlflow.yaml") for m in documents(CLUSTERS / "kuberay" / path)}
    assert claims == {"kdbench-shared"} <= made
