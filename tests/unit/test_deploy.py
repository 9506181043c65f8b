"""Checks the KubeRay manifests, against KubeRay's own schemas, and the container file, without a cluster.

What runs in a pod or on AWS is not tested here.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from tests.manifests import cluster_spec, gpus_of, instructions, limits, pod, variants, with_options
from tests.paths import ROOT
from tiger.run import CONFIGS

SCHEMAS = Path(os.environ.get("TIGER_KUBERAY", ROOT.parent / "shared/data/kuberay"))
MANIFESTS = sorted((ROOT / "deploy").glob("*.yaml"))
DOCUMENTED = [
    ROOT / "template/job.yaml",
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "cluster.yaml",
    *MANIFESTS,
    *sorted(CONFIGS.glob("*.toml")),
]

GPU_PRESETS = {"beauty"}
OBJECT_STORE = 0.3 / 0.95
"""Fraction of a pod's memory that Ray's object store takes, over the fraction of /dev/shm that it fills at most."""


def _strict(schema: Any) -> Any:
    """Objects that list their properties allow no others; an int-or-string is either."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


def _errors(manifest: dict[str, Any]) -> list[str]:
    schema = json.loads(gzip.decompress((SCHEMAS / f"{manifest['kind']}.v1.schema.json.gz").read_bytes()))
    return [error.message for error in jsonschema.Draft7Validator(_strict(schema)).iter_errors(manifest)]


needs_schemas = pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"KubeRay's schemas are not in {SCHEMAS}")


# ---- the manifests


def _groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_spec(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def _gibibytes(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity.removesuffix("Gi"))


@needs_schemas
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kuberay_schema_accepts_manifest_as_it_is_and_with_its_options(path: Path) -> None:
    for manifest in variants(path):
        assert _errors(manifest) == []


@needs_schemas
def test_kuberay_schema_refuses_manifest_when_a_key_or_type_is_wrong() -> None:
    manifest = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())
    mistyped = copy.deepcopy(manifest)
    mistyped["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    assert "'minReplica' was unexpected" in _errors(mistyped)[0]
    mistyped = copy.deepcopy(manifest)
    mistyped["spec"]["backoffLimit"] = "two"
    assert "'two' is not of type 'integer'" in _errors(mistyped)[0]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest_starts_a_cluster_of_this_ray_with_tokens_and_an_idle_head(path: Path) -> None:
    for manifest in variants(path):
        cluster = cluster_spec(manifest)
        assert cluster["rayVersion"] == ray.__version__  # another version would not join
        assert cluster["authOptions"]["mode"] == "token"
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert len({pod(group)["containers"][0]["image"] for group in _groups(manifest)}) == 1


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_shared_memory_holds_the_object_store_in_every_group(path: Path) -> None:
    for manifest in variants(path):
        for group in _groups(manifest):
            volumes = {volume["name"]: volume for volume in pod(group)["volumes"]}
            mounts = {mount["mountPath"]: mount["name"] for mount in pod(group)["containers"][0]["volumeMounts"]}
            assert set(mounts.values()) == set(volumes)
            shm = volumes[mounts["/dev/shm"]]["emptyDir"]
            assert shm["medium"] == "Memory"
            assert _gibibytes(shm["sizeLimit"]) >= OBJECT_STORE * _gibibytes(limits(group)["memory"])


def test_rayjob_puts_its_driver_on_a_worker_when_the_cluster_starts() -> None:
    spec = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())["spec"]
    ready = [
        group for group in spec["rayClusterSpec"]["workerGroupSpecs"] if group["minReplicas"] and not gpus_of(group)
    ]
    assert 0 < spec["entrypointNumCpus"] <= max(int(limits(group)["cpu"]) for group in ready)


def test_rayjob_does_not_repeat_a_job_when_it_fails() -> None:
    """KubeRay retries any failure, also those that end the same way each time, and cannot tell exit codes apart."""
    spec = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())["spec"]
    assert spec["backoffLimit"] == 0
    assert spec["shutdownAfterJobFinishes"] is True


def test_rayjob_keeps_hub_models_on_a_volume_in_every_worker() -> None:
    spec = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())["spec"]
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = pod(group)["containers"]
        variables = {variable["name"]: variable for variable in container["env"]}
        assert variables["HF_HOME"]["value"] in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"] is True  # public models need no token


def _served(manifest: dict[str, Any]) -> dict[str, Any]:
    (application,) = yaml.safe_load(with_options(manifest["spec"]["serveConfigV2"]))["applications"]
    return application


def test_rayservice_names_an_application_that_exists_with_its_arguments() -> None:
    from tiger.core.config import build
    from tiger.on_ray import replica
    from tiger.on_ray.serve import IMPORT_PATH, application

    manifest = yaml.safe_load((ROOT / "deploy/rayservice.yaml").read_text())
    served = _served(manifest)
    assert served["import_path"] == IMPORT_PATH
    assert application(served["args"])
    (server,) = served["deployments"]
    assert server["name"] == replica.deployment.name
    assert build(replica.ModelConfig, server["user_config"]).model.startswith("s3://")
    for group in _groups(manifest):
        (container,) = pod(group)["containers"]
        files = {variable["name"]: Path(variable["value"]) for variable in container["env"]}
        secret = next(volume["secret"] for volume in pod(group)["volumes"] if "secret" in volume)
        assert str(files[replica.TOKEN_FILE].parent) in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert secret["defaultMode"] & 0o007 == 0  # `read_token` refuses a file that every user can read


def test_rayservice_starts_new_replicas_before_it_stops_old_ones_when_updated() -> None:
    from ray.serve.schema import ServeDeploySchema

    for manifest in variants(ROOT / "deploy/rayservice.yaml"):
        config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
        (deployment,) = config.applications[0].deployments
        assert deployment.max_surge_percent == 100
        assert deployment.autoscaling_config["min_replicas"] >= 2
        options, room = deployment.ray_actor_options, 0
        for group in cluster_spec(manifest)["workerGroupSpecs"]:
            fitting = int(int(limits(group)["cpu"]) // options.num_cpus)
            if options.num_gpus:
                fitting = min(fitting, int(gpus_of(group) // options.num_gpus))
            room += group["maxReplicas"] * fitting
        assert room > deployment.autoscaling_config["max_replicas"]  # else an update at full load waits for room


def test_rayservice_has_gpu_pods_only_when_its_replicas_ask_for_gpus() -> None:
    as_it_is, with_gpus = variants(ROOT / "deploy/rayservice.yaml")
    assert not any(gpus_of(group) for group in _groups(as_it_is))
    assert any(gpus_of(group) for group in _groups(with_gpus))
    for manifest, gpus in ((as_it_is, 0), (with_gpus, 1)):
        (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
        assert application["deployments"][0]["ray_actor_options"].get("num_gpus", 0) == gpus
    assert "redisAddress" in cluster_spec(with_gpus)["gcsFaultToleranceOptions"]


# ---- the container file


def test_containerfile_owns_its_folder_before_workdir_when_built_by_the_classic_builder() -> None:
    steps = instructions()
    names = [name for name, _ in steps]
    (folder,) = [value for name, value in steps if name == "WORKDIR"]
    (user,) = [value for name, value in steps if name == "USER"]
    as_root = " ".join(value for name, value in steps[: names.index("USER")] if name == "RUN")
    assert names.index("USER") < names.index("WORKDIR")
    assert f"mkdir {folder}" in as_root
    assert f"chown {user}:{user} {folder}" in as_root
    copies = [value for name, value in steps if name == "COPY"]
    assert copies
    assert all(copy.startswith(f"--chown={user}:{user} ") for copy in copies)  # USER does not apply to COPY


def test_containerfile_copies_files_that_exist_and_installs_wget_for_the_probes() -> None:
    steps = instructions()
    for name, value in steps:
        if name == "COPY":
            _, *sources, _ = value.split()
            assert all((ROOT / source).exists() for source in sources)
    assert any(name == "RUN" and "-y wget" in value for name, value in steps)
    assert not any("<<" in value or "--mount" in value for _, value in steps)  # BuildKit only


def test_uv_has_one_pinned_version_when_images_and_nodes_install_it() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    (on_nodes,) = re.findall(r"https://astral\.sh/uv/([^/ ]*)/?install\.sh", text)
    (in_image,) = re.findall(r"pip install --no-cache-dir uv(\S*)", (ROOT / "deploy/Containerfile").read_text())
    assert re.fullmatch(r"\d+\.\d+\.\d+", on_nodes)
    assert in_image == f"=={on_nodes}"
