"""Connection to a Ray cluster or a local Ray.

Exports what stages need of the cluster: its capacity (`on_ray.capacity`) and the checks of its nodes
(`on_ray.preflight`).
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions

from tiger.core.device import pretended_gpus, usable_gpus
from tiger.core.errors import ConfigError, ResourceError, SecurityError
from tiger.core.storage import Folder
from tiger.on_ray import capacity, placement
from tiger.on_ray.capacity import demand, has_autoscaler, shape, wait_for, wait_for_gpus
from tiger.on_ray.preflight import Node, check_nodes, inspect, inspect_new_nodes, inspected

__all__ = [
    "DEBUG", "Node", "check_environment", "check_nodes", "connect", "cores", "demand", "inspect", "inspect_new_nodes",
    "log_folder", "shape", "wait_for", "wait_for_gpus",
]  # fmt: skip

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_LATE = "timed out during startup"

_REACHABLE_SECONDS = 20

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
        inspected.clear()
        capacity.cuda_gpus.clear()
    if storage is not None:
        inspect_new_nodes(storage)


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
        "; an autoscaler adds nodes on demand" if has_autoscaler() else "",
    )


def _initialize(failure: str, **options: Any) -> None:
    """Call `ray.init`, with Ray's own logs off unless `--debug` was given.

    Ray gives its processes 30 seconds to start, which is too short on a busy machine, so a start is tried again.

    Raises:
        ResourceError: it fails; the message is `failure` and Ray's reason.
    """
    debug = bool(os.environ.get(DEBUG))
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            ray.init(log_to_driver=debug, logging_level=logging.INFO if debug else logging.ERROR, **options)
            return
        except Exception as error:  # a start that takes too long raises no class of its own
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            if _LATE not in reason:
                raise ResourceError(f"{failure} ({reason})") from error
            if attempt == _ATTEMPTS:
                raise ResourceError(
                    f"{failure}: is the machine busy? ({reason}) Run the same command again: finished stages are kept"
                ) from error
            log.warning("Ray did not start within 30 s: is the machine busy? Trying again, %d/%d", attempt, _ATTEMPTS)


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


def log_folder() -> str:
    """Return the folder of this session's log files on this node."""
    node: Any = ray._private.worker.global_worker.node
    return "the session's logs folder" if node is None else node.get_logs_dir_path()
