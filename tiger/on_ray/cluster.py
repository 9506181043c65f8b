"""Connection to a Ray cluster or a local Ray, inspection of its nodes, and preflight checks."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tiger.core.device import pretended_gpus, usable_gpus
from tiger.core.errors import ConfigError, ResourceError, SecurityError, last_line
from tiger.core.storage import PARTIAL, Folder
from tiger.on_ray import placement
from tiger.on_ray.placement import Bundle, Cluster, Fit

log = logging.getLogger(__name__)

_PACKAGES = ("ray", "torch", "pyarrow", "numpy", "sentence-transformers")
_MIN_DISK, _MIN_STORE = 1 << 30, 75 << 20  # bytes; Ray itself requires 75 MiB of object store
_ANSWER_SECONDS = 120
_REACHABLE_SECONDS = 20
_REPORT_SECONDS = 30

DEBUG = "TIGER_DEBUG"
"""Environment variable that `--debug` sets: Ray's own log lines reach the console."""

_UNSAFE = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
)


def check_environment(environment: Mapping[str, str]) -> None:
    """Reject environment variables that enable code execution when reading data.

    Raises:
        SecurityError: one is set; names it.
    """
    for name in _UNSAFE:
        if environment.get(name, "").lower() not in ("", "0", "false"):
            raise SecurityError(f"{name} is set: with it, data files can run code on every node; unset it")


def connect(storage: Folder | None = None) -> None:
    """Join the cluster of `RAY_ADDRESS` (set inside a Ray job), or one started on this machine, or start a local one.

    A local cluster has two CPUs more than the machine, for tasks that mostly wait while actors compute.

    Args:
        storage: a folder that all nodes must be able to read and write. Every node is inspected once per connection;
            call this at the beginning of every stage, to inspect the nodes that joined since the last call.

    Raises:
        ConfigError: `RAY_ADDRESS` is an address of Ray Client.
        ResourceError: the cluster cannot be reached, or a node does not meet the requirements of the run.
        SecurityError: the environment enables code execution when reading data.
    """
    check_environment(os.environ)
    if not ray.is_initialized():
        _join()
        _inspected.clear()
        _cuda_gpus.clear()
    if storage is not None:
        inspect_new_nodes(storage)


_inspected: set[str] = set()  # ids of the nodes inspected in this connection
_cuda_gpus: dict[str, int] = {}  # node id -> number of GPUs visible to CUDA


def _join() -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("ray://", "http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS = {address}: a driver must run inside the cluster. Submit it: ray job submit --address "
            "http://HEAD:8265 --working-dir . -- python -m jobs.NAME; on one of its nodes set RAY_ADDRESS to HEAD:6379"
        )
    if not address and (found := _cluster_of_this_machine()):
        log.info(
            "joining the Ray cluster at %s that was started on this machine; RAY_ADDRESS=local starts another", found
        )
        address = found
    if address in ("", "local"):
        gpus = pretended_gpus() or usable_gpus()
        _initialize(
            "a local Ray does not start",
            address="local",
            num_cpus=cores() + int(placement.RESERVED_CPUS),
            num_gpus=gpus,
            include_dashboard=False,
        )
    else:
        _require_reachable(address)
        _use_token_if_there_is_one()
        _initialize(
            f"the Ray cluster at {address} rejects this process. If it requires a token, set "
            "RAY_AUTH_MODE=token and the token in RAY_AUTH_TOKEN or ~/.ray/auth_token; see `ray status`",
            address=address,
        )
    _set_console_levels()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if os.environ.get("RAY_AUTH_MODE") == "disabled" and len({node["NodeManagerAddress"] for node in nodes}) > 1:
        log.warning(
            "cluster authentication is disabled: anyone with network access can run code; set RAY_AUTH_MODE=token"
        )
    resources = ray.cluster_resources()
    log.info(
        "ray %s: %s, %g CPUs, %g GPUs%s",
        ray.__version__,
        placement.counted(len(nodes), "node"),
        resources.get("CPU", 0),
        resources.get("GPU", 0),
        "; an autoscaler adds nodes on demand" if _has_autoscaler() else "",
    )


def _initialize(failure: str, **options: Any) -> None:
    """Call `ray.init`, with Ray's own logs off unless `--debug` was given.

    Raises:
        ResourceError: it fails; the message is `failure` and Ray's reason.
    """
    debug = bool(os.environ.get(DEBUG))
    try:
        ray.init(log_to_driver=debug, logging_level=logging.INFO if debug else logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ResourceError(f"{failure} ({reason})") from error


def _set_console_levels() -> None:
    """Log only warnings of Ray Data, Train and Tune to the console, unless `--debug` was given.

    Ray's log files in the session's folder are not affected.
    """
    level = logging.DEBUG if os.environ.get(DEBUG) else logging.WARNING
    for name in ("ray.data", "ray.train", "ray.tune"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(level)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that its progress bars are off


def _cluster_of_this_machine() -> str | None:
    """Return the address of a head node started on this machine with `ray start --head`, None if none answers."""
    address = ray._private.utils.read_ray_address()
    return address if address and _answers(address, seconds=2) else None


def _answers(address: str, seconds: float) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds):
            return True
    except (OSError, ValueError):
        return False


def _require_reachable(address: str) -> None:
    """Wait up to `_REACHABLE_SECONDS` for a head node to answer.

    Raises:
        ResourceError: nothing listens at the address; without this check `ray.init` waits for minutes.
    """
    if ":" not in address:  # "auto"
        return
    deadline = time.monotonic() + _REACHABLE_SECONDS
    while not _answers(address, seconds=5):
        if time.monotonic() > deadline:
            raise ResourceError(
                f"no Ray cluster answers at RAY_ADDRESS = {address}; correct it, or unset it to start a local Ray"
            )
        time.sleep(1)


def _use_token_if_there_is_one() -> None:
    """Enable token authentication if a token exists and `RAY_AUTH_MODE` is not set.

    `ray start --head` requires a token if there is one on its machine, but a driver uses it only with
    RAY_AUTH_MODE=token.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def cores() -> int:
    """Return the number of cores this process may use, given its affinity and the container's CPU quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(bound, int(ray._private.utils.get_num_cpus(override_docker_cpu_warning=True))))


def shape() -> Cluster:
    """Return the resources of the cluster now, and those that its autoscaler may add.

    Only GPUs visible to CUDA are counted; every node with GPUs is queried once.

    Raises:
        ResourceError: a node with GPUs does not answer.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    _ask_for_gpus([node for node in alive if node["Resources"].get("GPU") and node["NodeID"] not in _cuda_gpus])
    nodes = [
        placement.Node(node["Resources"].get("CPU", 0.0), float(_cuda_gpus.get(node["NodeID"], 0))) for node in alive
    ]
    offering = tuple(node for node in nodes if node.cpus or node.gpus)
    autoscaling = _has_autoscaler()
    return Cluster(offering, _can_add(nodes) if autoscaling else (), autoscaling)


def _ask_for_gpus(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Query how many of the GPUs that Ray counts on these nodes are visible to CUDA."""
    own = ray.get_runtime_context().get_node_id()
    asked: dict[str, Any] = {}
    for node in nodes:
        if node["NodeID"] == own:  # this machine, without starting a process
            _cuda_gpus[own] = usable_gpus()
        else:
            asked[node["NodeID"]] = _on_node(node, usable_gpus).remote()
    try:
        _cuda_gpus.update(zip(asked, ray.get(list(asked.values()), timeout=_ANSWER_SECONDS), strict=True))
    except ray.exceptions.GetTimeoutError:
        raise ResourceError(
            f"not all of {len(asked)} nodes with GPUs answered in {_ANSWER_SECONDS} s; see `ray status` and their logs"
        ) from None
    for node in nodes:
        counted = int(node["Resources"]["GPU"])
        _cuda_gpus[node["NodeID"]] = min(counted, _cuda_gpus[node["NodeID"]])
        if _cuda_gpus[node["NodeID"]] < counted:
            log.warning(
                "%s: Ray counts %d GPUs, CUDA sees %d; the others (Apple, Intel, or without a driver) are not used",
                node["NodeManagerAddress"],
                counted,
                _cuda_gpus[node["NodeID"]],
            )


def _on_node(node: Mapping[str, Any], function: Any) -> Any:
    """Return a remote function that runs on one node without using its resources."""
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=strategy)


def _has_autoscaler() -> bool:
    """Return whether an autoscaler can start nodes.

    Ray's monitor runs on every head node and reports even if it cannot start nodes; then each node's type is named
    after the node itself.
    """
    from ray.experimental.internal_kv import _internal_kv_get

    types = {
        node["NodeID"]: node["Labels"]["ray.io/node-group"]
        for node in ray.nodes()
        if "ray.io/node-group" in node["Labels"]
    }
    try:
        status = json.loads(_internal_kv_get(b"__autoscaling_status") or b"{}")
        types |= (status.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    except (ValueError, AttributeError, TypeError):
        log.debug("the autoscaler's status cannot be read")
    return any(name != f"node_{node_id}" for node_id, name in types.items())


def _can_add(nodes: Sequence[placement.Node]) -> tuple[tuple[placement.Node, int], ...] | None:
    """Return the autoscaler's node types with the number of further nodes of each; None if they are unknown."""
    config = ray._private.state.state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    types = []
    for group in config.node_group_configs:
        node = placement.Node(float(group.resources.get("CPU", 0)), float(group.resources.get("GPU", 0)))
        there = sum(other == node for other in nodes)
        types.append((node, 1_000 if group.max_count < 0 else max(0, int(group.max_count) - there)))
    return tuple(types)


def available_nodes() -> list[placement.Node]:
    """Return the free resources of alive nodes."""
    free = ray._private.state.available_resources_per_node()
    return [
        placement.Node(
            free.get(node["NodeID"], {}).get("CPU", 0.0),
            min(free.get(node["NodeID"], {}).get("GPU", 0.0), float(_cuda_gpus.get(node["NodeID"], 0))),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def wait_for(bundles: Sequence[Bundle], what: str, minutes: float) -> None:
    """Wait until the cluster has room for bundles: other jobs end, or the autoscaler starts nodes.

    The bundles are requested as a placement group, which the autoscaler counts as demand, and released immediately.

    Args:
        bundles: at least one bundle.
        what: the stage, for messages.
        minutes: maximum time to wait.

    Raises:
        ResourceError: they never fit, or not in time; reports the pending demand.
    """
    placement.require_fit(bundles, shape(), what)
    if placement.pack(bundles, available_nodes()):
        return
    begin = reported = time.monotonic()
    request = f"{len(bundles)} x {bundles[0]}"
    group = ray.util.placement_group([bundle.resources for bundle in bundles])
    try:
        log.info("%s: waiting for %s; %s", what, request, demand())
        while not group.wait(1):
            now = time.monotonic()
            if now - begin > 60 * minutes:
                raise ResourceError(
                    f"{what}: {request} not available after {minutes:g} minutes; {demand()}. "
                    "See `ray status`, increase the limits of the cluster, or wait longer (scale.wait_minutes)"
                )
            if now - reported >= _REPORT_SECONDS:
                reported = now
                log.info("%s: waiting for %.0f s for %s; %s", what, now - begin, request, demand())
    finally:
        ray.util.remove_placement_group(group)
    log.info("%s: available after %.0f s", what, time.monotonic() - begin)


def wait_for_gpus(gpus: int | None, what: str, minutes: float) -> None:
    """Wait until the cluster has this many GPUs visible to CUDA, and at least one node with CPUs.

    Args:
        gpus: `scale.gpus`; None or 0: do not wait for GPUs.
        what: the stage, for messages.
        minutes: maximum time to wait.

    Raises:
        ResourceError: the cluster can never have them, or they are not available in time.
    """
    now = shape()
    if gpus and now.gpus < gpus:
        if not now.autoscaling or placement.fit([Bundle(0.0, 1.0)] * gpus, now) is Fit.NEVER:
            raise ResourceError(
                f"{what}: requested {gpus} GPUs (scale.gpus), and CUDA sees {now.gpus}; {now}. Decrease scale.gpus "
                "(0: CPUs), or add nodes with GPUs"
            )
        wait_for([Bundle(0.0, 1.0)] * gpus, what, minutes)
        if (there := shape().gpus) < gpus:
            raise ResourceError(f"{what}: Ray counts {gpus} GPUs, CUDA sees {there}; install the driver on their nodes")
    elif not any(node.cpus for node in now.nodes):
        wait_for([Bundle(1.0)], what, minutes)


def demand() -> str:
    """Return the pending demand and the free resources of the cluster, for a log line."""
    pending: dict[str, int] = {}
    try:
        from ray.autoscaler.v2.sdk import get_cluster_status

        demands = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands
        for each in [*demands.placement_group_demand, *demands.ray_task_actor_demand]:
            for request in each.bundles_by_count:
                name = " + ".join(f"{value:g} {key}" for key, value in sorted(request.bundle.items()) if value >= 1e-3)
                pending[name] = pending.get(name, 0) + request.count
    except Exception as error:  # not a public interface of Ray; without it the line is shorter
        log.debug("the resource demand cannot be read: %r", error)
    total, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{free.get(name, 0):g} of {total[name]:g} {name}s free" for name in ("CPU", "GPU") if total.get(name)]
    asked = ", ".join(f"{count} x {name or 'no CPU'}" for name, count in pending.items())
    return f"pending: {asked or 'nothing'}; {', '.join(parts) or 'no node for work yet'}"


def log_folder() -> str:
    """Return the folder of this session's log files on this node."""
    node: Any = ray._private.worker.global_worker.node
    return "the session's logs folder" if node is None else node.get_logs_dir_path()


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
    new = [node for node in alive if node["NodeID"] not in _inspected]
    if not new:
        return
    check_nodes(inspect(storage, new), storage)
    _inspected.update(node["NodeID"] for node in new)


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
        answers = [_on_node(node, _describe_node).remote(*question(node)) for node in others]
        return [_describe_node(*question(alive[own])), *ray.get(answers, timeout=_ANSWER_SECONDS)]
    except ray.exceptions.GetTimeoutError:
        raise ResourceError(
            f"not all of {len(others)} nodes answered in {_ANSWER_SECONDS} s; see `ray status` and the nodes' logs"
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
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    return Node(address, sees, shutil.disk_usage(there).free if local else -1, object_store, versions)


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
