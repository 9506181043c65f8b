"""Checks cluster.yaml without AWS: with Ray's loader and node provider, EC2's request model, and rules of our own."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from packaging.requirements import Requirement

from tests.manifests import variants
from tests.paths import ROOT

PATH = ROOT / "cluster.yaml"

GLIBC = {"ubuntu 22.04": (2, 35), "ubuntu 24.04": (2, 39), "bookworm": (2, 36)}
OLDEST_DRIVER = {12: 525, 13: 580}
"""NVIDIA driver that each major version of CUDA needs at least."""


@pytest.fixture(params=[0, 1], ids=["as it is", "with its options"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = variants(PATH)[request.param]
    return loaded


def _prepared(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config

    prepared: dict[str, Any] = prepare_config(config)
    return prepared


# ---- Ray reads the file


def test_ray_accepts_cluster_yaml_as_it_is_and_with_its_options(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(_prepared(config))


def test_ray_refuses_cluster_yaml_when_a_key_is_unknown() -> None:
    from ray.autoscaler._private.util import validate_config

    config, _ = variants(PATH)
    config["available_node_types"]["gpu"]["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(_prepared(config))


def test_node_types_stay_within_the_cluster_s_limits(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    assert config["cluster_name"]
    assert set(types) == {"head", "cpu", "gpu"}
    assert all(kind["max_workers"] <= config["max_workers"] for kind in types.values())
    assert sum(kind["max_workers"] for kind in types.values()) <= config["max_workers"]  # all GPUs and all CPUs
    assert types["gpu"]["min_workers"] == 0
    assert types["cpu"]["min_workers"] >= 1  # a submitted job's driver starts at once
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["head"]["max_workers"] == 0


def test_ray_starts_with_tokens_and_a_private_dashboard(config: dict[str, Any]) -> None:
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]


def test_ray_s_command_line_accepts_the_start_commands(config: dict[str, Any]) -> None:
    from ray.scripts.scripts import cli

    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        words = shlex.split(command.split(";")[-1])
        name, *arguments = words[words.index("ray") + 1 :]
        subcommand = cli.get_command(click.Context(cli), name)
        assert subcommand is not None
        subcommand.make_context(name, arguments)


def test_spot_workers_are_an_option_for_gpu_machines_only() -> None:
    as_it_is, with_options = variants(PATH)
    spot = {"MarketType": "spot"}
    for config, kinds in ((as_it_is, set()), (with_options, {"gpu"})):  # the driver runs on a CPU machine
        types = config["available_node_types"]
        assert {name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]} == kinds
    assert with_options["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"] == spot


# ---- what nodes install


def _sync(config: dict[str, Any]) -> list[str]:
    (command,) = [command for command in config["setup_commands"] if "uv sync" in command]
    words = shlex.split(command)
    return words[words.index("sync") + 1 :]


def test_setup_installs_boto3_into_the_environment_that_starts_ray(config: dict[str, Any]) -> None:
    options = _sync(config)
    extras = {options[place + 1] for place, option in enumerate(options) if option == "--extra"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    offered = project["optional-dependencies"]
    assert extras == {"aws", "serve"}
    assert extras <= set(offered)
    assert "boto3" in {Requirement(requirement).name for requirement in offered["aws"]}
    assert any("$HOME/tiger/.venv/bin:$PATH" in command for command in config["setup_commands"])  # whose `ray` it is
    mounted = {Path(place).name for place in config["file_mounts"] if Path(place).parent.name == "tiger"}
    assert mounted == {"pyproject.toml", project["readme"]}  # what `uv sync --no-install-project` reads


def test_head_setup_adds_nothing_after_ray_merged_its_defaults(config: dict[str, Any]) -> None:
    """Ray's default for the head is `pip install boto3`, which misses an environment of uv."""
    prepared = _prepared(config)
    assert prepared["head_setup_commands"] == config["setup_commands"]
    assert prepared["worker_setup_commands"] == config["setup_commands"]
    del config["head_setup_commands"]
    assert any("pip install" in command for command in _prepared(config)["head_setup_commands"])  # what it is there for


def test_setup_installs_a_python_that_the_project_supports(config: dict[str, Any]) -> None:
    options = _sync(config)
    python = options[options.index("--python") + 1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert python in Requirement(f"python{project['requires-python']}").specifier
    assert "--managed-python" in options  # the same on all nodes, whatever their images have


# ---- images


def _images() -> dict[str, str]:
    """Return the system of every image that the project's packages are installed on."""
    config, _ = variants(PATH)
    images = {}
    for name, kind in config["available_node_types"].items():
        (version,) = re.findall(r"ubuntu[-/](?:server/)?(\d\d\.\d\d)/", kind["node_config"]["ImageId"])
        images[f"cluster.yaml {name}"] = f"ubuntu {version}"
    (base,) = re.findall(r"(?m)^FROM \S+-slim-(\w+)$", (ROOT / "deploy/Containerfile").read_text())
    return images | {"Containerfile": base}


def _needed_glibc() -> dict[str, tuple[int, int]]:
    """Return the glibc that each installed package with compiled code needs, by its wheel's tag or by its files."""
    needed = {}
    for package in importlib.metadata.distributions():
        name, wheel = package.metadata["Name"], package.read_text("WHEEL") or ""
        versions = [(int(major), int(minor)) for major, minor in re.findall(r"manylinux_(\d+)_(\d+)_", wheel)]
        legacy = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
        versions += [version for tag, version in legacy.items() if f"{tag}_" in wheel]
        if versions:
            needed[name] = min(versions)  # a wheel with several tags runs on the oldest of them
        elif re.search(r"(?m)^Tag: .*-linux_", wheel):  # built without a promise: read what its code asks for
            needed[name] = max(_glibc_symbols(package), default=(0, 0))
    return needed


def _glibc_symbols(package: importlib.metadata.Distribution) -> Iterator[tuple[int, int]]:
    for file in package.files or []:
        path = Path(str(file.locate()))
        if path.is_file() and (path.suffix == ".so" or path.name in ("raylet", "gcs_server")):
            for major, minor in re.findall(rb"GLIBC_(\d+)\.(\d+)", path.read_bytes()):
                yield int(major), int(minor)


def test_wheels_run_on_the_glibc_of_every_image() -> None:
    needed = _needed_glibc()
    assert {"torch", "pyarrow", "ray", "numpy"} <= set(needed)
    assert needed["torch"] > (2, 27)  # Ubuntu 18.04, Ray's default image, would not do
    for image, system in _images().items():
        too_new = {name: version for name, version in needed.items() if version > GLIBC[system]}
        assert not too_new, f"{image} has glibc {GLIBC[system]}"


def test_ray_does_not_replace_the_images_by_its_default(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.aws.config import DEFAULT_AMI, _check_ami

    given = {name: kind["node_config"]["ImageId"] for name, kind in config["available_node_types"].items()}
    prepared = _prepared(config)
    _check_ami(prepared)
    used = {name: kind["node_config"]["ImageId"] for name, kind in prepared["available_node_types"].items()}
    assert used == given
    assert not set(used.values()) & set(DEFAULT_AMI.values())


def test_gpu_image_has_a_driver_for_the_installed_cuda() -> None:
    """The image's name does not tell its driver; the file states what it must have, and CUDA's version decides that."""
    config, _ = variants(PATH)
    types = config["available_node_types"]
    cuda = int(importlib.metadata.version("cuda-toolkit").split(".")[0])
    assert "nvidia-driver-gpu" in types["gpu"]["node_config"]["ImageId"]
    for file in ("cluster.yaml", "deploy/rayjob.yaml", "deploy/rayservice.yaml", "docs/clusters.md"):
        text = re.sub(r"\n *#? *", " ", (ROOT / file).read_text())
        stated = {int(driver) for driver in re.findall(r"NVIDIA driver of (\d+) or later", text)}
        assert stated == {OLDEST_DRIVER[cuda]}, file
        assert set(re.findall(r"for CUDA (\d+)", text)) <= {str(cuda)}, file


# ---- AWS, as far as it can be seen from here


def test_aws_provider_can_be_imported_where_ray_up_runs() -> None:
    from ray.autoscaler._private.providers import _get_node_provider_cls

    assert _get_node_provider_cls({"type": "aws"}).__name__ == "AWSNodeProvider"  # ModuleNotFoundError without boto3


def test_every_node_type_has_an_instance_profile_and_the_head_s_is_kept(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.aws.config import _configure_iam_role

    prepared = _configure_iam_role(_prepared(config) | {"head_node": {}})  # would call AWS to make a role of its own
    assert prepared["head_node"] == {}
    profiles = {
        name: kind["node_config"]["IamInstanceProfile"]["Name"]
        for name, kind in prepared["available_node_types"].items()
    }
    assert profiles.pop("head") not in profiles.values()  # workers have no right to start machines
    text = PATH.read_text()
    for name in {*profiles.values(), "tiger-head"}:
        assert f"#   {name}:" in text  # its policy is described
    assert "iam:PassRole" in text
    assert "ssm:GetParameters" in text


def test_ec2_accepts_the_request_for_every_node_type(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's node provider makes the request, and botocore validates it with EC2's model instead of sending it."""
    from botocore.stub import Stubber
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    prepared = _prepared(config)
    provider = AWSNodeProvider(prepared["provider"], prepared["cluster_name"])
    client = provider.ec2_fail_fast.meta.client
    sent: list[dict[str, Any]] = []
    client.meta.events.register("provide-client-params.ec2.RunInstances", lambda params, **_: sent.append(params))
    answer = {"Instances": [{"InstanceId": "i-1", "State": {"Name": "pending"}}]}
    for name, kind in prepared["available_node_types"].items():
        # What `ray up` finds out from the account; all else comes from the file.
        found = {"SubnetIds": ["subnet-1"], "SecurityGroupIds": ["sg-1"], "KeyName": "ray"}
        with Stubber(client) as stub:
            stub.add_response("run_instances", answer)
            assert provider._create_node(kind["node_config"] | found, {"ray-node-name": name}, 1)
            stub.assert_no_pending_responses()
        request = sent.pop()
        for key, value in kind["node_config"].items():
            assert request[key] == value  # ImageId too: EC2 itself looks up what follows resolve:ssm:
        assert request["ImageId"].startswith(("resolve:ssm:/aws/service/", "ami-"))


def test_ec2_refuses_the_request_when_a_key_is_mistyped(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from botocore.exceptions import ParamValidationError
    from botocore.stub import Stubber

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = boto3.client("ec2", region_name="us-west-2")
    request = variants(PATH)[0]["available_node_types"]["gpu"]["node_config"] | {"InstanceMarketOption": {}}
    with Stubber(client) as stub, pytest.raises(ParamValidationError, match="InstanceMarketOption"):
        stub.add_response("run_instances", {})
        client.run_instances(MinCount=1, MaxCount=1, **request)
