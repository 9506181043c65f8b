"""Placement: bundles of CPUs and GPUs packed onto the nodes that a cluster has, or may start.

Plain arithmetic without Ray, so that tests cover clusters larger than the test machine. Ray places a bundle on one
node, so the total resources of a cluster do not determine whether a bundle fits.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tiger.core.errors import ConfigError, ResourceError

TASK_CPUS = 0.25
"""CPUs per task that reads or writes; it mostly waits."""

RESERVED_CPUS = 2.0
"""CPUs that actors leave free for Ray Data's reading and writing tasks; without any it stalls."""

GPU_FRACTION = 0.5
"""Fraction of a GPU per actor of a pool: one actor tokenizes or reads the next shard while the other one computes."""

ROWS_PER_GPU = 1024
"""Rows of a training batch per GPU below which another GPU costs more in launches and communication than it saves."""

_GPU_WORKER_CPUS = 4.0  # for collating and copying the next batches

_EPSILON = 1e-6


@dataclass(frozen=True)
class Bundle:
    """Resources of one actor, worker, trial or replica on one node; a fraction of a GPU is on one GPU."""

    cpus: float
    gpus: float = 0.0

    @property
    def resources(self) -> dict[str, float]:
        """The bundle as Ray's resources."""
        return {name: value for name, value in (("CPU", self.cpus), ("GPU", self.gpus)) if value}

    def __str__(self) -> str:
        return _amount(self.cpus, self.gpus)


@dataclass(frozen=True)
class Node:
    """Resources of a node; `gpus` are those visible to CUDA."""

    cpus: float
    gpus: float = 0.0

    def __str__(self) -> str:
        return _amount(self.cpus, self.gpus)


def counted(count: float, noun: str) -> str:
    """Format a count: `1 shard`, `2 shards`."""
    return f"{count:g} {noun}{'s' * (count != 1)}"


def _amount(cpus: float, gpus: float) -> str:
    text = counted(cpus, "CPU")
    return f"{text} and {counted(gpus, 'GPU')}" if gpus else text


@dataclass(frozen=True)
class Cluster:
    """The nodes of a cluster, and those that an autoscaler may add.

    Attributes:
        nodes: alive nodes.
        can_add: node types of the autoscaler, each with the number of further nodes that may be started.
        autoscaling: whether an autoscaler runs. If it does and `can_add` is None, its limits are unknown.
    """

    nodes: tuple[Node, ...]
    can_add: tuple[tuple[Node, int], ...] | None = ()
    autoscaling: bool = False

    @property
    def gpus(self) -> int:
        """Number of GPUs of the alive nodes."""
        return int(sum(node.gpus for node in self.nodes))

    @property
    def possible_nodes(self) -> tuple[Node, ...]:
        """The alive nodes and those that the autoscaler may add, as far as its limits are known."""
        if not self.autoscaling:
            return self.nodes
        return (*self.nodes, *(node for node, count in self.can_add or () for _ in range(count)))

    @property
    def limits_known(self) -> bool:
        """Whether the cluster cannot have more than `possible_nodes`."""
        return not self.autoscaling or self.can_add is not None

    def __str__(self) -> str:
        text = "the cluster has " + (_counted((node, 1) for node in self.nodes) or "no node for work yet")
        if not self.autoscaling:
            return text
        if self.can_add is None:
            return f"{text}; the limits of its autoscaler are unknown"
        return f"{text}; its autoscaler may add {_counted(self.can_add) or 'no more'}"


def _counted(nodes: Iterable[tuple[Node, int]]) -> str:
    counts: dict[str, int] = {}
    for node, count in nodes:
        if count and (node.cpus or node.gpus):
            counts[str(node)] = counts.get(str(node), 0) + count
    return ", ".join(f"{counted(count, 'node')} with {name}" for name, count in counts.items())


class Fit(enum.Enum):
    """Whether bundles fit the alive nodes, may fit once the autoscaler has added nodes, or never fit."""

    NOW = "now"
    LATER = "later"
    NEVER = "never"


class _Free:
    """Free resources of a node while bundles are placed."""

    def __init__(self, node: Node) -> None:
        self.cpus, self.gpus = node.cpus, [1.0] * int(node.gpus)

    def take(self, bundle: Bundle) -> bool:
        """Place a bundle if it fits; return whether it does."""
        if bundle.cpus > self.cpus + _EPSILON:
            return False
        if bundle.gpus >= 1:
            free = [index for index, left in enumerate(self.gpus) if left > 1 - _EPSILON]
            if len(free) < round(bundle.gpus):
                return False
            for index in free[: round(bundle.gpus)]:
                self.gpus[index] = 0.0
        elif bundle.gpus > 0:
            fitting = [index for index, left in enumerate(self.gpus) if left > bundle.gpus - _EPSILON]
            if not fitting:
                return False
            self.gpus[min(fitting, key=self.gpus.__getitem__)] -= bundle.gpus
        self.cpus -= bundle.cpus
        return True


def _place(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> list[_Free] | None:
    """Place bundles first-fit, largest first, preferring nodes without GPUs for CPU work; None if not all fit."""
    free = [_Free(node) for node in sorted(nodes, key=lambda node: (node.gpus, node.cpus))]
    for bundle in sorted(bundles, key=lambda bundle: (bundle.gpus, bundle.cpus), reverse=True):
        if not any(node.take(bundle) for node in free):
            return None
    return free


def pack(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> bool:
    """Return whether all bundles fit the nodes at once."""
    return _place(bundles, nodes) is not None


def capacity(bundle: Bundle, nodes: Sequence[Node], reserved_cpus: float = 0.0) -> int:
    """Return how many copies of a bundle fit the nodes, with some CPUs left free for short tasks."""
    free = [_Free(node) for node in nodes]
    for node in sorted(free, key=lambda node: (len(node.gpus) > 0, -node.cpus)):
        left = min(reserved_cpus, node.cpus)
        node.cpus, reserved_cpus = node.cpus - left, reserved_cpus - left
    count = 0
    for node in free:
        while node.take(bundle):
            count += 1
    return count


def fit(bundles: Sequence[Bundle], cluster: Cluster) -> Fit:
    """Return whether a cluster can hold all bundles at once: now, later, or never."""
    if pack(bundles, cluster.nodes):
        return Fit.NOW
    if cluster.autoscaling and (cluster.can_add is None or pack(bundles, cluster.possible_nodes)):
        return Fit.LATER
    return Fit.NEVER


def require_fit(bundles: Sequence[Bundle], cluster: Cluster, what: str) -> None:
    """Check that the cluster can hold the bundles, now or later.

    Raises:
        ResourceError: it never can; names the request, and the existing and possible nodes.
    """
    if fit(bundles, cluster) is not Fit.NEVER:
        return
    each = f"{len(bundles)} x {bundles[0]}, each on one node"
    raise ResourceError(
        f"{what} needs {each}; {cluster}. Ask for fewer workers or actors, or for less per worker, or add nodes"
    )


def uses_gpus(cluster: Cluster, gpus: int | None) -> bool:
    """Return whether a run computes on GPUs.

    Args:
        cluster: the cluster.
        gpus: `scale.gpus`, the number of GPUs to use; 0: none; None: those of the alive nodes.
    """
    return cluster.gpus > 0 if gpus is None else gpus > 0


@dataclass(frozen=True)
class Plan:
    """Minimum and maximum number of copies of a bundle."""

    bundle: Bundle
    minimum: int
    maximum: int

    def describe(self, noun: str) -> str:
        """Return the plan for a log line: `1 to 4 actors with 1 CPU each`."""
        minimum = "" if self.minimum == self.maximum else f"{self.minimum} to "
        return f"{minimum}{counted(self.maximum, noun)} with {self.bundle}" + " each" * (self.maximum > 1)

    @property
    def at_once(self) -> list[Bundle]:
        """The bundles that must be available before the work begins."""
        return [self.bundle] * self.minimum


def plan_pool(
    cluster: Cluster,
    shards: int,
    *,
    minimum: int = 1,
    maximum: int | None = None,
    cpus: float = 1.0,
    gpus_per_actor: float | None = None,
    gpus: int | None = None,
    what: str = "a pool",
) -> Plan:
    """Plan a pool of actors that process shards.

    The pool may grow to the maximum size of the cluster. If the limits of an autoscaler are unknown, the pool requests
    one actor per shard, and the autoscaler stops at its own limits.

    Args:
        cluster: the cluster.
        shards: number of shards.
        minimum: number of actors that must be available before work begins.
        maximum: maximum number of actors; None: as many as the cluster can hold.
        cpus: CPUs per actor without a GPU.
        gpus_per_actor: fraction of a GPU per actor; 0: none; None: `GPU_FRACTION` if the run uses GPUs.
        gpus: see `uses_gpus`.
        what: the pool, for messages.

    Raises:
        ResourceError: the minimum never fits.
    """
    on_gpus = gpus_per_actor > 0 if gpus_per_actor is not None else uses_gpus(cluster, gpus)
    fraction = (GPU_FRACTION if gpus_per_actor is None else gpus_per_actor) if on_gpus else 0.0
    bundle = Bundle(1.0, fraction) if on_gpus else Bundle(cpus)
    minimum = min(minimum, shards)
    require_fit([bundle] * minimum, cluster, f"{what} of {counted(minimum, 'actor')}")
    most = shards if maximum is None else min(maximum, shards)
    if on_gpus and gpus:
        most = min(most, max(1, int(gpus * int(1 / fraction + _EPSILON))))
    if cluster.limits_known:
        nodes = cluster.possible_nodes
        holds = capacity(bundle, nodes, RESERVED_CPUS) or capacity(bundle, nodes, 2 * TASK_CPUS)
        if not holds:  # the actor alone fits, but not together with the tasks that read and write for it
            require_fit([Bundle(bundle.cpus + 2 * TASK_CPUS, bundle.gpus)], cluster, f"{what} of 1 actor and its tasks")
        most = min(most, max(holds, minimum))
    return Plan(bundle, minimum, max(most, minimum))


def plan_training(
    cluster: Cluster,
    *,
    workers: int | None = None,
    cpus: float | None = None,
    gpus: int | None = None,
    batch_size: int | None = None,
    what: str = "training",
) -> Plan:
    """Plan a process group for training: one GPU per worker, or CPUs only.

    Args:
        cluster: the cluster.
        workers: size of the group; None: one per `ROWS_PER_GPU` rows of a batch and at most one per GPU; one on CPUs.
        cpus: CPUs per worker; None: 4 with a GPU if the node has them, else as many as one node can provide.
        gpus: see `uses_gpus`.
        batch_size: rows per step over all workers; None: one worker per GPU.
        what: the training, for messages.

    Raises:
        ConfigError: more workers than GPUs.
        ResourceError: the group never fits.
    """
    on_gpus = uses_gpus(cluster, gpus)
    if on_gpus:
        available = gpus or cluster.gpus
        if workers is None:
            workers = available if batch_size is None else max(1, min(available, batch_size // ROWS_PER_GPU))
        if workers > available:
            raise ConfigError(
                f"scale.training.max_workers = {workers} is more than the {available} GPUs of this run, and a worker "
                "needs a whole GPU; decrease it, increase scale.gpus, or set scale.gpus = 0 to train on CPUs"
            )
    workers = workers or 1
    if cpus is not None:
        bundle = Bundle(cpus, float(on_gpus))
    elif on_gpus:
        per_gpu = max((node.cpus / node.gpus for node in cluster.possible_nodes if node.gpus), default=1.0)
        bundle = Bundle(max(1.0, min(_GPU_WORKER_CPUS, float(int(per_gpu)))), 1.0)
        while bundle.cpus > 1 and not pack([bundle] * workers, cluster.possible_nodes):
            bundle = Bundle(bundle.cpus - 1, 1.0)
    else:
        bundle = Bundle(_most_cpus(workers, cluster.possible_nodes))
    require_fit([bundle] * workers, cluster, f"{what} with {counted(workers, 'worker')}")
    return Plan(bundle, workers, workers)


def _most_cpus(workers: int, nodes: Sequence[Node]) -> float:
    """Return the maximum CPUs per worker, leaving `RESERVED_CPUS` free on some node if possible."""
    reserved = [Bundle(1.0)] * int(RESERVED_CPUS)
    largest = int(max((node.cpus for node in nodes), default=1.0))
    for left_free in (reserved, []):
        for cpus in range(largest, 0, -1):
            if pack([Bundle(float(cpus))] * workers + left_free, nodes):
                return float(cpus)
    return 1.0


def plan_trials(
    cluster: Cluster, *, workers: int = 1, cpus: float = 1.0, gpus: float = 0.0, concurrent: int | None = None
) -> Plan:
    """Plan how many trials of a sweep run at once; `minimum` and `maximum` count trials of `workers` bundles each.

    Raises:
        ConfigError: workers of one trial would share a GPU, which NCCL does not support.
        ResourceError: a single trial never fits.
    """
    if workers > 1 and 0 < gpus < 1:
        raise ConfigError(
            f"tuning.resources.max_workers = {workers} with tuning.resources.gpus = {gpus:g}: workers of one trial "
            "cannot share a GPU; set tuning.resources.gpus = 1, or tuning.resources.max_workers = 1"
        )
    bundle = Bundle(cpus, gpus)
    require_fit([bundle] * workers, cluster, f"a trial with {counted(workers, 'worker')}")
    if concurrent is None:
        nodes = cluster.possible_nodes
        holds = capacity(bundle, nodes, 0.0 if gpus else RESERVED_CPUS) // workers
        concurrent = max(1, holds)
        while concurrent > 1 and not pack([bundle] * (workers * concurrent), nodes):
            concurrent -= 1
    return Plan(bundle, 1, concurrent)


def plan_replicas(cluster: Cluster, *, replicas: int, cpus: float, gpus: float | None, scale_gpus: int | None) -> Plan:
    """Plan the replicas of a service.

    Args:
        cluster: the cluster.
        replicas: number of replicas.
        cpus: CPUs per replica.
        gpus: GPUs, or the fraction of one, per replica; 0: none; None: one if the run uses GPUs.
        scale_gpus: see `uses_gpus`.

    Raises:
        ResourceError: the replicas never fit.
    """
    if gpus is None:
        gpus = float(uses_gpus(cluster, scale_gpus))
    bundle = Bundle(cpus, gpus)
    require_fit([bundle] * replicas, cluster, f"serving with {counted(replicas, 'replica')}")
    return Plan(bundle, replicas, replicas)
