"""Connecting to Ray: a cluster that is there, or a local one; and what it has."""

from __future__ import annotations

import logging
import os

import ray

from tiger.errors import ResourceError

log = logging.getLogger(__name__)

RESERVED_CPUS = 2
"""CPUs that long-lived actors leave to Ray Data's reading and writing tasks; without any it stalls in silence."""


def connect() -> None:
    """Joins the cluster of `RAY_ADDRESS` (set inside a Ray job), or starts a local one. Does nothing when connected.

    A local cluster counts two CPUs more than the machine has, for tasks that mostly wait while actors compute.
    """
    if ray.is_initialized():
        return
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
