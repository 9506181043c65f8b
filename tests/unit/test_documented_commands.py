"""Checks every documented command, without running it, by the code that reads it when it runs: Ray's command line, the
tools' own help, and `tiger.core.config.load`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import yaml

from tests.manifests import cluster_spec, gpus_of, instructions, limits
from tests.paths import ROOT
from tiger.cli import TOOLS
from tiger.core.config import dump_toml, load
from tiger.run import CONFIGS, RunConfig
from tiger.tuning import TuningConfig

DOCUMENTED = [
    ROOT / "template/job.yaml",
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "cluster.yaml",
    *sorted((ROOT / "deploy").glob("*.yaml")),
    *sorted(CONFIGS.glob("*.toml")),
]

GPU_PRESETS = {"beauty"}


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
    (command,) = [json.loads(value) for name, value in instructions() if name == "CMD"]
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
    groups = cluster_spec(manifest)["workerGroupSpecs"]
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"].values()
    on_aws = sum(kind["max_workers"] * kind["resources"].get("GPU", 0) for kind in types)
    aws = on_aws, max(kind["resources"]["CPU"] for kind in types if kind.get("min_workers"))
    kubernetes = sum(group["maxReplicas"] * gpus_of(group) for group in groups), int(limits(groups[0])["cpu"])
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
