"""The capacity of the cluster: its nodes, those that its autoscaler may add, and waiting for room."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tiger.core.device import usable_gpus
from tiger.core.errors import ResourceError
from tiger.on_ray import placement
from tiger.on_ray.placement import Bundle, Cluster, Fit

log = logging.getLogger(__name__)

ANSWER_SECONDS = 120  # for a node to answer
_REPORT_SECONDS = 30

cuda_gpus: dict[str, int] = {}  # node id -> number of GPUs visible to CUDA


def shape() -> Cluster:
    """Return the resources of the cluster now, and those that its autoscaler may add.

    Only GPUs visible to CUDA are counted; every node with GPUs is queried once.

    Raises:
        ResourceError: a node with GPUs does not answer.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    _ask_for_gpus([node for node in alive if node["Resources"].get("GPU") and node["NodeID"] not in cuda_gpus])
    nodes = [
        placement.Node(node["Resources"].get("CPU", 0.0), float(cuda_gpus.get(node["NodeID"], 0))) for node in alive
    ]
    offering = tuple(node for node in nodes if node.cpus or node.gpus)
    autoscaling = has_autoscaler()
    return Cluster(offering, _can_add(nodes) if autoscaling else (), autoscaling)


def _ask_for_gpus(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Query how many of the GPUs that Ray counts on these nodes are visible to CUDA."""
    own = ray.get_runtime_context().get_node_id()
    asked: dict[str, Any] = {}
    for node in nodes:
        if node["NodeID"] == own:  # this machine, without starting a process
            cuda_gpus[own] = usable_gpus()
        else:
            asked[node["NodeID"]] = on_node(node, usable_gpus).remote()
    try:
        cuda_gpus.update(zip(asked, ray.get(list(asked.values()), timeout=ANSWER_SECONDS), strict=True))
    except ray.exceptions.GetTimeoutError:
        raise ResourceError(
            f"not all of {len(asked)} nodes with GPUs answered in {ANSWER_SECONDS} s; see `ray status` and their logs"
        ) from None
    for node in nodes:
        counted = int(node["Resources"]["GPU"])
        cuda_gpus[node["NodeID"]] = min(counted, cuda_gpus[node["NodeID"]])
        if cuda_gpus[node["NodeID"]] < counted:
            log.warning(
                "%s: Ray counts %d GPUs, CUDA sees %d; the others (Apple, Intel, or without a driver) are not used",
                node["NodeManagerAddress"],
                counted,
                cuda_gpus[node["NodeID"]],
            )


def on_node(node: Mapping[str, Any], function: Any) -> Any:
    """Return a remote function that runs on one node without using its resources."""
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=strategy)


def has_autoscaler() -> bool:
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
            min(free.get(node["NodeID"], {}).get("GPU", 0.0), float(cuda_gpus.get(node["NodeID"], 0))),
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
