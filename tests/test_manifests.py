"""The files in deploy/: Kubernetes' own schemas accept the manifests, KubeRay knows the fields, and Ray reads the settings."""

import ast
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from sdxl.settings import VARIABLES
from tests.conftest import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
KUBERNETES = "1.37"
ANY = object()
RAY_SERVICE: dict[str, Any] = {
    "serveConfigV2": str,
    "excludeHeadPodFromServeSvc": bool,
    "rayClusterConfig": {
        "rayVersion": str,
        "authOptions": {"mode": str},
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": {"idleTimeoutSeconds": int},
        "headGroupSpec": {"rayStartParams": ANY, "template": ANY},
        "workerGroupSpecs": [
            {
                "groupName": str,
                "replicas": int,
                "minReplicas": int,
                "maxReplicas": int,
                "rayStartParams": ANY,
                "template": ANY,
            }
        ],
    },
}
"""The fields of KubeRay's RayService that the manifest uses, and their types, by its API reference (1.6.2)."""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


def ray_service() -> dict[str, Any]:
    [service] = documents("rayservice.yaml")
    return service


def templates() -> dict[str, dict[str, Any]]:
    """Name → pod template of the RayService."""
    cluster = ray_service()["spec"]["rayClusterConfig"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers}


def containers() -> list[dict[str, Any]]:
    pods = [*templates().values(), documents("deployment.yaml")[0]["spec"]["template"]]
    return [container for pod in pods for container in pod["spec"]["containers"]]


def accept(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def pod_template(template: dict[str, Any]) -> dict[str, Any]:
    """A document that Kubernetes knows, around a template of KubeRay's."""
    return {"apiVersion": "v1", "kind": "PodTemplate", "template": template}


def unknown_fields(given: Any, known: Any, where: str = "spec") -> list[str]:
    """What in `given` has another name or type than in `known`."""
    if known is ANY:
        return []
    if isinstance(known, dict):
        if not isinstance(given, dict):
            return [where]
        wrong = [f"{where}.{name}" for name in given.keys() - known.keys()]
        return wrong + [
            one
            for name in given.keys() & known.keys()
            for one in unknown_fields(given[name], known[name], f"{where}.{name}")
        ]
    if isinstance(known, list):
        if not isinstance(given, list):
            return [where]
        return [one for item in given for one in unknown_fields(item, known[0], f"{where}[]")]
    return [] if type(given) is known else [where]


def test_kubernetes_accepts_the_deployment_and_its_service():
    deployment, service = documents("deployment.yaml")
    accept(deployment)
    accept(service)
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    wrong = copy.deepcopy(deployment)
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        accept(wrong)


@pytest.mark.parametrize("name", ["head", "gpu"])
def test_kubernetes_accepts_the_pods_of_the_ray_service(name: str):
    template = templates()[name]
    accept(pod_template(template))
    wrong = copy.deepcopy(template)
    wrong["spec"]["containers"][0]["ports"][0]["containerPort"] = "8000"
    with pytest.raises(kubernetes_validate.ValidationError):
        accept(pod_template(wrong))


def test_kuberay_knows_the_fields_of_the_ray_service():
    service = ray_service()
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert service.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert unknown_fields(service["spec"], RAY_SERVICE) == []
    cluster = service["spec"]["rayClusterConfig"]
    params = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(isinstance(text, str) for one in params for text in one["rayStartParams"].values())
    cluster["workerGroupSpecs"][0]["minReplicas"] = "1"
    cluster["headgroupSpec"] = {}
    wrong = unknown_fields(service["spec"], RAY_SERVICE)
    assert sorted(wrong) == [
        "spec.rayClusterConfig.headgroupSpec",
        "spec.rayClusterConfig.workerGroupSpecs[].minReplicas",
    ]


def test_ray_is_of_one_version():
    [pinned] = [line for line in (DEPLOY / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    assert pinned == f"ray[serve]=={ray_service()['spec']['rayClusterConfig']['rayVersion']}"


def test_both_serve_configs_differ_in_their_host_and_their_replicas_only():
    local = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    cluster = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])
    assert local["http_options"].pop("host") == "127.0.0.1"
    assert cluster["http_options"].pop("host") == "0.0.0.0"
    for config in (local, cluster):
        painters, gateway = config["applications"][0]["deployments"]
        del painters["autoscaling_config"]["min_replicas"], painters["autoscaling_config"]["max_replicas"]
        del gateway["num_replicas"]
    assert local == cluster


def test_there_are_as_many_nodes_as_replicas():
    service = ray_service()["spec"]
    painters, _ = yaml.safe_load(service["serveConfigV2"])["applications"][0]["deployments"]
    [group] = service["rayClusterConfig"]["workerGroupSpecs"]
    scaling = painters["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (group["minReplicas"], group["maxReplicas"])
    [worker] = templates()["gpu"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == str(painters["ray_actor_options"]["num_gpus"])


def test_the_serve_config_names_what_the_code_has():
    """By the syntax tree: the module itself imports Ray, which warns about itself."""
    module = ast.parse((DEPLOY / "ray_serve.py").read_text())
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    [application] = yaml.safe_load((DEPLOY / "serve.yaml").read_text())["applications"]
    assert application["import_path"] == "deploy.ray_serve:app"
    assert {one["name"] for one in application["deployments"]} <= classes.keys()
    settings = [node for node in classes["FleetSettings"].body if isinstance(node, ast.AnnAssign)]
    assert application["args"].keys() <= {ast.unparse(node.target) for node in settings}


def test_the_variables_exist():
    named = {entry["name"] for one in containers() for entry in one.get("env", [])}
    assert named - {"HF_HOME"} <= VARIABLES.keys()


def test_ray_reads_the_serve_configs(tmp_path: Path):
    """In another process, because Ray warns about itself."""
    cluster = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])
    local = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    (tmp_path / "configs.json").write_text(json.dumps([local, cluster]))
    code = (
        "import json, sys\nfrom ray.serve.schema import ServeDeploySchema\n"
        "for config in json.load(open(sys.argv[1])): ServeDeploySchema.model_validate(config)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "configs.json")], check=True, cwd=REPOSITORY)
