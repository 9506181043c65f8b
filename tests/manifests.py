"""Read the KubeRay manifests, as they are and with their options taken, and the container file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.paths import ROOT


def with_options(text: str) -> str:
    """Return a YAML file with its options taken: indented lines with # and no space, or more than one, after it."""
    return re.sub(r"(?m)^( +)#(?=\S|  )", r"\1", text)


def variants(path: Path) -> list[Any]:
    """Return a YAML file as it is, and with its options taken."""
    return [yaml.safe_load(path.read_text()), yaml.safe_load(with_options(path.read_text()))]


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the cluster of a RayJob or a RayService."""
    return manifest["spec"].get("rayClusterSpec") or manifest["spec"]["rayClusterConfig"]


def pod(group: dict[str, Any]) -> dict[str, Any]:
    """Return the pod specification of a group of nodes."""
    return group["template"]["spec"]


def limits(group: dict[str, Any]) -> dict[str, str]:
    """Return the limits of a pod, by which Ray counts what a node has."""
    return pod(group)["containers"][0]["resources"]["limits"]


def gpus_of(group: dict[str, Any]) -> int:
    """Return the GPUs of a pod."""
    return int(limits(group).get("nvidia.com/gpu", 0))


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the container file, each a name and its arguments."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "deploy/Containerfile").read_text()).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]
