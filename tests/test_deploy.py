"""The KubeRay manifests, held offline against KubeRay's own schemas, and against what a schema does not say."""

from __future__ import annotations

import copy
import gzip
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

ROOT = Path(__file__).parents[1]
SCHEMAS = Path(os.environ.get("TIGER_KUBERAY", ROOT.parent / "shared/data/kuberay"))
MANIFESTS = sorted((ROOT / "deploy").glob("*.yaml"))


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


@needs_schemas
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kuberay_accepts_it(path: Path) -> None:
    assert _errors(yaml.safe_load(path.read_text())) == []


@needs_schemas
def test_the_check_finds_mistakes() -> None:
    manifest = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())
    mistyped = copy.deepcopy(manifest)
    mistyped["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    assert "'minReplica' was unexpected" in _errors(mistyped)[0]
    mistyped = copy.deepcopy(manifest)
    mistyped["spec"]["backoffLimit"] = "two"
    assert "'two' is not of type 'integer'" in _errors(mistyped)[0]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_what_a_schema_does_not_say(path: Path) -> None:
    spec = yaml.safe_load(path.read_text())["spec"]
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    assert cluster["rayVersion"] == ray.__version__  # another one would not join
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    gpu = next(group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert gpu["minReplicas"] == 0
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert "/dev/shm" in mounts
        assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory"


def test_the_service_names_what_there_is() -> None:
    from jobs.serve import application
    from tiger.scale import serve

    manifest = yaml.safe_load((ROOT / "deploy/rayservice.yaml").read_text())["spec"]
    (served,) = yaml.safe_load(manifest["serveConfigV2"])["applications"]
    assert served["import_path"] == "jobs.serve:application"
    assert application(served["args"])  # its arguments are those that the application takes
    assert [each["name"] for each in served["deployments"]] == [serve.Server.__name__]
    cluster = manifest["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        files = {variable["name"]: Path(variable["value"]) for variable in container["env"]}
        secret = next(volume["secret"] for volume in pod["volumes"] if "secret" in volume)
        assert str(files[serve.TOKEN_FILE].parent) in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert secret["defaultMode"] & 0o007 == 0  # `read_token` refuses what every user can read
