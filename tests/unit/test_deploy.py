"""Checks the KubeRay manifests, the container file and every documented command, without a cluster.

Manifests are validated against KubeRay's own schemas, commands by the code that reads them when they run: Ray's command
line and `tiger.core.config.load`. What runs in a pod or on AWS is not tested here.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import importlib
import importlib.util
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import ray
import yaml

from tests.manifests import variants, with_options
from tests.paths import ROOT
from tiger.cli import TOOLS
from tiger.core.config import dump_toml, load
from tiger.run import CONFIGS, RunConfig
from tiger.tuning import TuningConfig

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


def _cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec") or manifest["spec"]["rayClusterConfig"]


def _groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = _cluster(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def _pod(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]


def _resources(group: dict[str, Any]) -> dict[str, str]:
    """Return the limits of a pod, by which Ray counts what a node has."""
    return _pod(group)["containers"][0]["resources"]["limits"]


def _gpus(group: dict[str, Any]) -> int:
    return int(_resources(group).get("nvidia.com/gpu", 0))


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
        cluster = _cluster(manifest)
        assert cluster["rayVersion"] == ray.__version__  # another version would not join
        assert cluster["authOptions"]["mode"] == "token"
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert len({_pod(group)["containers"][0]["image"] for group in _groups(manifest)}) == 1


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_shared_memory_holds_the_object_store_in_every_group(path: Path) -> None:
    for manifest in variants(path):
        for group in _groups(manifest):
            volumes = {volume["name"]: volume for volume in _pod(group)["volumes"]}
            mounts = {mount["mountPath"]: mount["name"] for mount in _pod(group)["containers"][0]["volumeMounts"]}
            assert set(mounts.values()) == set(volumes)
            shm = volumes[mounts["/dev/shm"]]["emptyDir"]
            assert shm["medium"] == "Memory"
            assert _gibibytes(shm["sizeLimit"]) >= OBJECT_STORE * _gibibytes(_resources(group)["memory"])


def test_rayjob_puts_its_driver_on_a_worker_when_the_cluster_starts() -> None:
    spec = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())["spec"]
    ready = [group for group in spec["rayClusterSpec"]["workerGroupSpecs"] if group["minReplicas"] and not _gpus(group)]
    assert 0 < spec["entrypointNumCpus"] <= max(int(_resources(group)["cpu"]) for group in ready)


def test_rayjob_does_not_repeat_a_job_when_it_fails() -> None:
    """KubeRay retries any failure, also those that end the same way each time, and cannot tell exit codes apart."""
    spec = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())["spec"]
    assert spec["backoffLimit"] == 0
    assert spec["shutdownAfterJobFinishes"] is True


def test_rayjob_keeps_hub_models_on_a_volume_in_every_worker() -> None:
    spec = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())["spec"]
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = _pod(group)["containers"]
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
        (container,) = _pod(group)["containers"]
        files = {variable["name"]: Path(variable["value"]) for variable in container["env"]}
        secret = next(volume["secret"] for volume in _pod(group)["volumes"] if "secret" in volume)
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
        for group in _cluster(manifest)["workerGroupSpecs"]:
            fitting = int(int(_resources(group)["cpu"]) // options.num_cpus)
            if options.num_gpus:
                fitting = min(fitting, int(_gpus(group) // options.num_gpus))
            room += group["maxReplicas"] * fitting
        assert room > deployment.autoscaling_config["max_replicas"]  # else an update at full load waits for room


def test_rayservice_has_gpu_pods_only_when_its_replicas_ask_for_gpus() -> None:
    as_it_is, with_gpus = variants(ROOT / "deploy/rayservice.yaml")
    assert not any(_gpus(group) for group in _groups(as_it_is))
    assert any(_gpus(group) for group in _groups(with_gpus))
    for manifest, gpus in ((as_it_is, 0), (with_gpus, 1)):
        (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
        assert application["deployments"][0]["ray_actor_options"].get("num_gpus", 0) == gpus
    assert "redisAddress" in _cluster(with_gpus)["gcsFaultToleranceOptions"]


# ---- the container file


def _instructions() -> list[tuple[str, str]]:
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "deploy/Containerfile").read_text()).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_containerfile_owns_its_folder_before_workdir_when_built_by_the_classic_builder() -> None:
    instructions = _instructions()
    names = [name for name, _ in instructions]
    (folder,) = [value for name, value in instructions if name == "WORKDIR"]
    (user,) = [value for name, value in instructions if name == "USER"]
    as_root = " ".join(value for name, value in instructions[: names.index("USER")] if name == "RUN")
    assert names.index("USER") < names.index("WORKDIR")
    assert f"mkdir {folder}" in as_root
    assert f"chown {user}:{user} {folder}" in as_root
    copies = [value for name, value in instructions if name == "COPY"]
    assert copies
    assert all(copy.startswith(f"--chown={user}:{user} ") for copy in copies)  # USER does not apply to COPY


def test_containerfile_copies_files_that_exist_and_installs_wget_for_the_probes() -> None:
    instructions = _instructions()
    for name, value in instructions:
        if name == "COPY":
            _, *sources, _ = value.split()
            assert all((ROOT / source).exists() for source in sources)
    assert any(name == "RUN" and "-y wget" in value for name, value in instructions)
    assert not any("<<" in value or "--mount" in value for _, value in instructions)  # BuildKit only


def test_uv_has_one_pinned_version_when_images_and_nodes_install_it() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    (on_nodes,) = re.findall(r"https://astral\.sh/uv/([^/ ]*)/?install\.sh", text)
    (in_image,) = re.findall(r"pip install --no-cache-dir uv(\S*)", (ROOT / "deploy/Containerfile").read_text())
    assert re.fullmatch(r"\d+\.\d+\.\d+", on_nodes)
    assert in_image == f"=={on_nodes}"


# ---- documented commands


@dataclass(frozen=True)
class Documented:
    """A command as it is written in a file: `program` is `ray`, `jobs.NAME`, or `tiger` for a tool."""

    file: str
    program: str
    arguments: tuple[str, ...]
    through: tuple[str, ...] | None = None  # arguments of the `ray job submit` before it

    def __str__(self) -> str:
        return f"{self.file}: {self.program} {' '.join(self.arguments)}"


def _documented(path: Path) -> Iterator[Documented]:
    """Yield the commands of a file: in code fences, code spans, comments and values."""
    text = re.sub(r"(?m)^ *# ?", "", path.read_text())
    text = re.sub(r"\\\n\s*", " ", text)  # continued lines
    for variable, folder in (("$MODEL", "runs/model-1a2b3c4d"), ("$IDS", "runs/semantic_ids-5e6f7a8b")):
        text = text.replace(variable, folder)
    end = r"[^`|;&#>)\n]*"
    job = rf"(?:ray job submit(?P<submit>{end}?) -- )?(?:python -m jobs\.|uv run tiger )(?P<job>\w+)(?P<rest>{end})"
    for match in re.finditer(job, text):
        if match["job"] != "NAME":  # "python -m jobs.NAME [config] [key=value ...]"
            through = None if match["submit"] is None else tuple(shlex.split(match["submit"]))
            program = "tiger" if match["job"] in TOOLS else f"jobs.{match['job']}"
            verb = (match["job"],) if program == "tiger" else ()
            yield Documented(path.name, program, (*verb, *shlex.split(match["rest"])), through)
    for match in re.finditer(rf"(?<![\w.-])ray (?=(?:up|down|dashboard|get-auth-token|start|stop)\b)({end})", text):
        name, *arguments = shlex.split(match[1])
        if arguments or name == "stop":  # others without arguments are mentioned, not meant to be run
            yield Documented(path.name, "ray", (name, *arguments))


COMMANDS = [command for path in DOCUMENTED for command in _documented(path)]
JOBS = [command for command in COMMANDS if command.program not in ("ray", "tiger")]
OF_TOOLS = [command for command in COMMANDS if command.program == "tiger"]
SUBMITTED = [command for command in JOBS if command.through is not None]
OF_RAY = [command for command in COMMANDS if command.program == "ray"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that documented commands name: the example of docs/data.md, and a winner as `jobs.tune` writes it."""
    folder = tmp_path_factory.mktemp("documented")
    (example,) = re.findall(r"(?s)```toml\n(# mine\.toml\n.*?)```", (ROOT / "docs/data.md").read_text())
    (folder / "mine.toml").write_text(example)
    best = load(RunConfig, "beauty-cpu", [], CONFIGS)
    (folder / "best.toml").write_text(dump_toml(best.model_dump(mode="json", serialize_as_any=True)))
    return {path.name: path for path in folder.iterdir()}


def _loaded(command: Documented, written: dict[str, Path]) -> tuple[str, RunConfig]:
    """Return the name of a job's configuration and the configuration itself, read as `jobs.command` reads it."""
    assert importlib.util.find_spec(command.program), f"there is no module {command.program}"
    arguments = [argument for argument in command.arguments if argument not in ("--debug", "--help")]
    arguments = [re.sub(r"=N$", "=1", argument) for argument in arguments]  # "model.seed=N"
    searched = [argument for argument in arguments if argument.startswith("tuning.")]
    arguments = [argument for argument in arguments if argument not in searched]
    name = arguments.pop(0) if arguments and "=" not in arguments[0] else "sample"
    if re.search(r"model-[0-9a-f]{8}$", name):  # the folder of a trained model
        module = importlib.import_module(command.program.replace("jobs.", "tiger.pipeline."))
        assert all(argument.partition(".")[0] in module.SECTIONS_ON_MODEL for argument in arguments)
        name = "sample"
        if "data.kind=tables" in arguments:  # the files are those of the verb's own section
            arguments += ['data.items=["-"]', 'data.interactions=["-"]']
    if command.program == "jobs.tune":
        space = [argument.removeprefix("tuning.") for argument in searched]
        assert load(TuningConfig, str(CONFIGS / f"{name}.tune.toml"), space, CONFIGS).space
    else:
        assert not searched
    file = written[Path(name).name] if name.endswith(".toml") else name
    return name, load(RunConfig, str(file), arguments, CONFIGS)


def test_commands_are_found_in_every_file_that_documents_them() -> None:
    assert {command.file for command in JOBS} >= {"README.md", "clusters.md", "data.md", "cluster.yaml", "rayjob.yaml"}
    assert {command.program for command in JOBS} >= {"jobs.pipeline", "jobs.serve", "jobs.tune", "jobs.evaluate"}
    assert {command.arguments[0] for command in OF_RAY} >= {"up", "dashboard", "get-auth-token", "start"}
    assert {command.file for command in SUBMITTED} >= {"clusters.md", "cluster.yaml"}


@pytest.mark.parametrize("command", JOBS, ids=str)
def test_documented_job_is_accepted_by_the_configuration_loader(command: Documented, written: dict[str, Path]) -> None:
    _loaded(command, written)


def test_container_command_is_accepted_by_the_configuration_loader(written: dict[str, Path]) -> None:
    (command,) = [json.loads(value) for name, value in _instructions() if name == "CMD"]
    assert command[:2] == ["python", "-m"]
    _loaded(Documented("Containerfile", command[2], tuple(command[3:])), written)


@pytest.mark.parametrize("command", OF_TOOLS, ids=str)
def test_documented_tool_has_the_options_that_are_written(
    command: Documented, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *arguments = command.arguments
    with contextlib.suppress(SystemExit):
        importlib.import_module(TOOLS[verb]).main(["--help"])
    printed = capsys.readouterr().out
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in printed


@pytest.mark.parametrize("command", OF_RAY, ids=str)
def test_documented_ray_command_is_accepted_by_its_command_line(command: Documented) -> None:
    from ray.scripts.scripts import cli

    name, *arguments = command.arguments
    subcommand = cli.get_command(click.Context(cli), name)
    assert subcommand is not None
    subcommand.make_context(name, arguments)


def _largest_clusters() -> dict[str, tuple[int, int]]:
    """Return the GPUs that each described cluster can have, and the CPUs of a machine for the driver."""
    manifest = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())
    groups = _cluster(manifest)["workerGroupSpecs"]
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"].values()
    on_aws = sum(kind["max_workers"] * kind["resources"].get("GPU", 0) for kind in types)
    aws = on_aws, max(kind["resources"]["CPU"] for kind in types if kind.get("min_workers"))
    kubernetes = sum(group["maxReplicas"] * _gpus(group) for group in groups), int(_resources(groups[0])["cpu"])
    return {"cluster.yaml": aws, "clusters.md": aws, "rayjob.yaml": kubernetes}


@pytest.mark.parametrize("command", JOBS, ids=str)
def test_documented_job_asks_for_gpus_when_a_gpu_preset_runs_on_a_cluster(
    command: Documented, written: dict[str, Path]
) -> None:
    name, run = _loaded(command, written)
    on_cluster = "://" in run.root or command.through is not None
    if on_cluster and name in GPU_PRESETS:
        gpus, _ = _largest_clusters()[command.file]
        assert run.scale.gpus, "without scale.gpus, a cluster that begins with no GPU machine never starts one"
        assert run.scale.gpus <= gpus


def test_gpu_presets_name_all_configurations_that_are_not_for_cpus() -> None:
    shipped = {path.stem for path in CONFIGS.glob("*.toml") if "." not in path.stem}
    assert shipped - {"sample"} - {name for name in shipped if name.endswith("-cpu")} == GPU_PRESETS


@pytest.mark.parametrize("command", SUBMITTED, ids=str)
def test_submitted_job_keeps_its_driver_off_the_head(command: Documented) -> None:
    from ray.dashboard.modules.job.cli import submit

    assert command.through is not None
    options = submit.make_context("submit", [*command.through, "--", "python"]).params
    _, cpus = _largest_clusters()[command.file]
    assert options["working_dir"] == "."
    assert 0 < options["entrypoint_num_cpus"] <= cpus
