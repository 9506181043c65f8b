"""Preflight: every node is inspected once, and must have what a run requires of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
import ray.exceptions

from tiger.core.errors import ResourceError, last_line
from tiger.core.storage import PARTIAL, Folder
from tiger.core.versions import installed_versions
from tiger.on_ray.capacity import ANSWER_SECONDS, on_node

_MIN_DISK, _MIN_STORE = 1 << 30, 75 << 20  # bytes; Ray itself requires 75 MiB of object store

inspected: set[str] = set()  # ids of the nodes inspected in this connection


@dataclass(frozen=True)
class Node:
    """Inspection of a node, by itself.

    Attributes:
        address: IP address.
        sees_storage: whether it can read a file that the driver wrote there.
        free_disk: free bytes on the disk of the storage if that is a local path, else -1.
        object_store: bytes.
        versions: versions of Python and of the packages whose objects are sent between nodes.
    """

    address: str
    sees_storage: bool
    free_disk: int
    object_store: int
    versions: dict[str, str]


def inspect_new_nodes(storage: Folder) -> None:
    """Check the nodes that joined since the last call against the requirements of a run.

    Raises:
        ResourceError: a node does not meet one; names the node and how to fix it.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    new = [node for node in alive if node["NodeID"] not in inspected]
    if not new:
        return
    check_nodes(inspect(storage, new), storage)
    inspected.update(node["NodeID"] for node in new)


def inspect(storage: Folder, nodes: Sequence[Mapping[str, Any]] | None = None) -> list[Node]:
    """Inspect nodes, all alive ones by default; the driver's node is always included, as the first one.

    Raises:
        ResourceError: nodes do not answer.
    """
    token = f".reachable-{uuid4().hex}{PARTIAL}"  # if the driver is killed, it is removed with other temporary files
    storage.write_bytes(token, b"")
    own = ray.get_runtime_context().get_node_id()
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    others = [node for node in (alive.values() if nodes is None else nodes) if node["NodeID"] != own]

    def question(node: Mapping[str, Any]) -> tuple[str, str, str, int]:
        store = int(node["Resources"].get("object_store_memory", 0))
        return storage.uri, token, node["NodeManagerAddress"], store

    try:
        answers = [on_node(node, _describe_node).remote(*question(node)) for node in others]
        return [_describe_node(*question(alive[own])), *ray.get(answers, timeout=ANSWER_SECONDS)]
    except ray.exceptions.GetTimeoutError:
        raise ResourceError(
            f"not all of {len(others)} nodes answered in {ANSWER_SECONDS} s; see `ray status` and the nodes' logs"
        ) from None
    except ray.exceptions.RayError as error:
        raise ResourceError(f"a node cannot be inspected: {last_line(error)}") from None
    finally:
        storage.filesystem.delete_file(storage.join(token))


def _describe_node(uri: str, token: str, address: str, object_store: int) -> Node:
    local = "://" not in uri
    try:
        sees = Path(uri, token).exists() if local else Folder(uri).exists(token)
    except OSError:  # an object store that denies access to this node
        sees = False
    there = next((path for path in [Path(uri), *Path(uri).parents] if path.exists()), Path("/"))
    return Node(address, sees, shutil.disk_usage(there).free if local else -1, object_store, installed_versions())


def check_nodes(nodes: Sequence[Node], storage: Folder) -> None:
    """Check inspected nodes against the requirements of a run.

    Raises:
        ResourceError: storage that is not shared by all nodes, different versions, too little disk or object store;
            names the nodes and how to fix it.
    """
    without_storage = [node.address for node in nodes if not node.sees_storage]
    if without_storage:
        raise ResourceError(
            f"the storage {storage.uri} is not shared: {len(without_storage)} of {len(nodes)} nodes do not see a file "
            f"that the driver wrote there ({', '.join(without_storage[:5])}); set root to s3://, gs:// or a folder "
            "that is mounted on all nodes, and grant all of them access to it"
        )
    for node in nodes:
        for name, version in node.versions.items():
            if _comparable(name, version) != _comparable(name, nodes[0].versions[name]):
                raise ResourceError(
                    f"{name} is {nodes[0].versions[name]} on {nodes[0].address} and {version} on {node.address}; "
                    "install the pins of pyproject.toml, or the same image, on all nodes"
                )
        if 0 <= node.free_disk < _MIN_DISK:
            raise ResourceError(
                f"{node.address} has {node.free_disk / 1e9:.2f} GB free under {storage.uri}, at least "
                f"{_MIN_DISK / 1e9:.2f} are needed; free some, or set root to another disk"
            )
        if node.object_store < _MIN_STORE:
            raise ResourceError(
                f"{node.address} has an object store of {node.object_store / 1e6:.0f} MB, at least "
                f"{_MIN_STORE / 1e6:.0f} are needed; start Ray with a larger --object-store-memory"
            )


def _comparable(name: str, version: str) -> str:
    """Return the version that must be equal on all nodes: for Python, as in Ray, only major and minor."""
    return ".".join(version.split(".")[:2]) if name == "python" else version
