"""Connecting to Ray: a cluster that is there, or a local one; what it has; and what it lacks, before minute one."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tiger.artifacts import Folder
from tiger.errors import ResourceError, SecurityError
from tiger.progress import Progress

log = logging.getLogger(__name__)

_PACKAGES = ("ray", "torch", "pyarrow", "numpy", "sentence-transformers")
_LEAST_DISK, _LEAST_STORE = 1 << 30, 75 << 20  # bytes; Ray itself asks for 75 MiB of object store
_ANSWER_SECONDS = 120

RESERVED_CPUS = 2
"""CPUs that long-lived actors leave to Ray Data's reading and writing tasks; without any it stalls in silence."""


_UNSAFE = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
)


def require_safe(environment: Mapping[str, str]) -> None:
    """Refuses switches under which reading a Parquet file or a checkpoint would run code that is in it.

    Raises:
        SecurityError: one is on; names it.
    """
    for name in _UNSAFE:
        if environment.get(name, "").lower() not in ("", "0", "false"):
            raise SecurityError(f"{name} is set: with it, data files can run code on every node; unset it")


def connect(storage: Folder | None = None) -> None:
    """Joins the cluster of `RAY_ADDRESS` (set inside a Ray job), or starts a local one, unless connected already.

    A local cluster counts two CPUs more than the machine has, for tasks that mostly wait while actors compute.

    Args:
        storage: a folder that all nodes must be able to read and write; looked at once a connection.

    Raises:
        ResourceError: a node lacks something that the run will need.
        SecurityError: the environment lets data files run code.
    """
    require_safe(os.environ)
    if not ray.is_initialized():
        _join()
        _checked.clear()
    if storage is not None and not _checked.is_set():
        _checked.set()
        require_healthy(look(storage), storage)


_checked = threading.Event()  # the storage, in this connection


def _join() -> None:
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            num_cpus=cores() + RESERVED_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    resources = ray.cluster_resources()
    if os.environ.get("RAY_AUTH_MODE") == "disabled" and len({node["NodeManagerAddress"] for node in ray.nodes()}) > 1:
        log.warning(
            "this cluster asks nobody for a token: whoever reaches its ports runs code; set RAY_AUTH_MODE=token"
        )
    log.info(
        "ray %s: %d nodes, %g CPUs, %g GPUs",
        ray.__version__,
        sum(node["Alive"] for node in ray.nodes()),
        resources.get("CPU", 0),
        resources.get("GPU", 0),
    )


def cores() -> int:
    """Cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def cluster_cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 0))


def cluster_gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def require(cpus: float, gpus: float, what: str) -> None:
    """Refuses what the cluster can never give, instead of waiting for it.

    Raises:
        ResourceError: names what is asked for and what there is.
    """
    has_cpus, has_gpus = cluster_cpus(), cluster_gpus()
    if cpus > has_cpus or gpus > has_gpus:
        raise ResourceError(
            f"{what} needs {cpus:g} CPUs and {gpus:g} GPUs; the cluster has {has_cpus} and {has_gpus}. Ask for fewer "
            "workers or actors, or for less per worker, or add nodes"
        )


@dataclass(frozen=True)
class Node:
    """What a node answered, as it sees itself.

    Attributes:
        sees_storage: whether it can read what the driver wrote there.
        free_disk: bytes under the storage where that is a local path, else -1.
        object_store: bytes.
        versions: of Python and of the packages that pass objects between nodes.
    """

    address: str
    sees_storage: bool
    free_disk: int
    object_store: int
    versions: dict[str, str]


def look(storage: Folder) -> list[Node]:
    """Asks every node, the driver's first.

    Raises:
        ResourceError: nodes do not answer.
    """
    token = f".reachable-{uuid4().hex}"
    storage.write_bytes(token, b"")
    alive = [node for node in ray.nodes() if node["Alive"]]
    own = ray.get_runtime_context().get_node_id()
    alive.sort(key=lambda node: node["NodeID"] != own)

    def asked(node: dict[str, Any]) -> tuple[str, str, str, int]:
        store = int(node["Resources"].get("object_store_memory", 0))
        return storage.uri, token, node["NodeManagerAddress"], store

    try:
        if len(alive) == 1 and alive[0]["NodeID"] == own:  # this machine: no process need be started to ask it
            return [_see(*asked(alive[0]))]
        answers = [
            ray.remote(_see)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote(*asked(node))
            for node in alive
        ]
        nodes: list[Node] = ray.get(answers, timeout=_ANSWER_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise ResourceError(
            f"not all of {len(alive)} nodes answered in {_ANSWER_SECONDS} s; look at `ray status` and the nodes' logs"
        ) from None
    finally:
        storage.filesystem.delete_file(storage.join(token))
    return nodes


def _see(uri: str, token: str, address: str, object_store: int) -> Node:
    local = "://" not in uri
    sees = Path(uri, token).exists() if local else Folder(uri).exists(token)
    there = next((path for path in [Path(uri), *Path(uri).parents] if path.exists()), Path("/"))
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    return Node(address, sees, shutil.disk_usage(there).free if local else -1, object_store, versions)


def require_healthy(nodes: Sequence[Node], storage: Folder) -> None:
    """Holds what nodes answered against what a run needs.

    Raises:
        ResourceError: storage that not all nodes share, another version somewhere, too little disk or object store;
            names the nodes and the cure.
    """
    blind = [node.address for node in nodes if not node.sees_storage]
    if blind:
        raise ResourceError(
            f"the storage {storage.uri} is not shared: {len(blind)} of {len(nodes)} nodes do not see what the driver "
            f"wrote there ({', '.join(blind[:5])}); set root to s3://, gs:// or a folder that is mounted on all nodes"
        )
    for node in nodes:
        for name, version in node.versions.items():
            if version != nodes[0].versions[name]:
                raise ResourceError(
                    f"{name} is {nodes[0].versions[name]} on {nodes[0].address} and {version} on {node.address}; "
                    "install the pins of pyproject.toml, or the same image, on all nodes"
                )
        if 0 <= node.free_disk < _LEAST_DISK:
            raise ResourceError(
                f"{node.address} has {node.free_disk / 1e9:.2f} GB free under {storage.uri}, at least "
                f"{_LEAST_DISK / 1e9:.2f} are needed; free some, or set root elsewhere"
            )
        if node.object_store < _LEAST_STORE:
            raise ResourceError(
                f"{node.address} has an object store of {node.object_store / 1e6:.0f} MB, at least "
                f"{_LEAST_STORE / 1e6:.0f} are needed; start Ray with a larger --object-store-memory"
            )


def wait_for_gpus(count: int, minutes: float) -> None:
    """Asks an autoscaling cluster for GPUs and waits until they are there.

    Raises:
        ResourceError: they do not come in time.
    """
    if cluster_gpus() >= count:
        return
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{"GPU": 1}] * count)
    progress, deadline = (
        Progress("waiting for GPUs", count, "GPUs", done=cluster_gpus()),
        time.monotonic() + 60 * minutes,
    )
    while (there := cluster_gpus()) < count:
        progress.add(there - progress.done)
        if time.monotonic() > deadline:
            raise ResourceError(
                f"{count} GPUs were asked for (scale.gpus), {there} are there after {minutes:g} minutes; look at "
                "`ray status`, raise the cluster's limits, or set scale.gpus lower"
            )
        time.sleep(2)
    progress.close()
