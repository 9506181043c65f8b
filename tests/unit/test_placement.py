"""Where work fits, without Ray: GPUs x kinds of clusters, for every kind of work."""

from __future__ import annotations

import itertools
import random

import pytest

from tiger.core.errors import ConfigError, ResourceError
from tiger.on_ray import placement
from tiger.on_ray.placement import Bundle, Cluster, Fit, Node

CPU_NODE, GPU_NODE = Node(8), Node(8, 1)
LAPTOP = Cluster((Node(10),))
CLUSTERS = {
    "one big node": Cluster((Node(16),)),
    "one big node, 1 GPU": Cluster((Node(16, 1),)),
    "one big node, 8 GPUs": Cluster((Node(64, 8),)),
    "four small nodes": Cluster((Node(4),) * 4),
    "four small nodes, 1 GPU": Cluster((*[Node(4)] * 3, Node(4, 1))),
    "four small nodes, 8 GPUs": Cluster((Node(4, 2),) * 4),
    "no node yet": Cluster((), ((CPU_NODE, 4),), autoscaling=True),
    "no node yet, 8 GPUs": Cluster((), ((CPU_NODE, 4), (GPU_NODE, 8)), autoscaling=True),
    "limits not known": Cluster((CPU_NODE,), None, autoscaling=True),
    "mixed": Cluster((CPU_NODE, CPU_NODE, Node(16, 4))),
}


def bundles(plan: placement.Plan) -> tuple[float, float, int, int]:
    return plan.bundle.cpus, plan.bundle.gpus, plan.minimum, plan.maximum


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        # cluster, scale.gpus, (CPUs, GPUs, least, most) of a pool for 1,000 shards
        ("one big node", None, (1, 0, 1, 14)),
        ("one big node, 1 GPU", None, (1, 0.5, 1, 2)),
        ("one big node, 1 GPU", 0, (1, 0, 1, 14)),
        ("one big node, 8 GPUs", None, (1, 0.5, 1, 16)),
        ("one big node, 8 GPUs", 2, (1, 0.5, 1, 4)),
        ("four small nodes", None, (1, 0, 1, 14)),
        ("four small nodes, 1 GPU", None, (1, 0.5, 1, 2)),
        ("four small nodes, 8 GPUs", None, (1, 0.5, 1, 14)),
        ("no node yet", None, (1, 0, 1, 30)),
        ("no node yet, 8 GPUs", 8, (1, 0.5, 1, 16)),
        ("limits not known", None, (1, 0, 1, 1000)),
        ("limits not known", 4, (1, 0.5, 1, 8)),
        ("mixed", None, (1, 0.5, 1, 8)),
    ],
)
def test_pool_fits_what_the_cluster_can_become(name: str, gpus: int | None, expected: tuple[float, ...]) -> None:
    assert bundles(placement.plan_pool(CLUSTERS[name], 1000, gpus=gpus)) == expected


def test_pool_respects_shards_limits_and_fractions() -> None:
    assert placement.plan_pool(LAPTOP, 3).maximum == 3
    assert placement.plan_pool(LAPTOP, 100, maximum=2).maximum == 2
    assert placement.plan_pool(LAPTOP, 100, cpus=4).maximum == 2
    assert placement.plan_pool(LAPTOP, 1, minimum=4).minimum == 1
    many = Cluster((Node(64, 8),))
    assert placement.plan_pool(many, 1000, gpus_per_actor=0.3).maximum == 24  # 3 of each GPU, not 8 / 0.3 = 26
    assert placement.plan_pool(many, 1000, gpus_per_actor=0.3, gpus=2).maximum == 6
    assert placement.plan_pool(many, 1000, gpus_per_actor=1.0).maximum == 8
    assert placement.plan_pool(many, 1000, gpus_per_actor=0.0).bundle == Bundle(1)


def test_pool_with_two_cpus_leaves_room_for_tasks() -> None:
    assert placement.plan_pool(Cluster((Node(2),)), 100).maximum == 1
    with pytest.raises(ResourceError, match="a pool of 1 actor and its tasks needs 1 x 1.5 CPUs"):
        placement.plan_pool(Cluster((Node(1),)), 100)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # cluster, options, (CPUs, GPUs, workers, workers)
        ("one big node", {}, (14, 0, 1, 1)),
        ("one big node", {"workers": 2}, (7, 0, 2, 2)),
        ("four small nodes", {}, (4, 0, 1, 1)),  # never the 14 CPUs that they have together
        ("four small nodes", {"workers": 3}, (4, 0, 3, 3)),
        ("four small nodes", {"workers": 8}, (1, 0, 8, 8)),
        ("one big node, 1 GPU", {}, (4, 1, 1, 1)),
        ("one big node, 1 GPU", {"gpus": 0}, (14, 0, 1, 1)),
        ("one big node, 8 GPUs", {}, (4, 1, 8, 8)),
        ("one big node, 8 GPUs", {"batch_size": 256}, (4, 1, 1, 1)),  # 32 rows per GPU would be slower than one GPU
        ("one big node, 8 GPUs", {"batch_size": 4096}, (4, 1, 4, 4)),
        ("one big node, 8 GPUs", {"batch_size": 256, "workers": 8}, (4, 1, 8, 8)),
        ("four small nodes, 8 GPUs", {}, (2, 1, 8, 8)),
        ("no node yet", {}, (8, 0, 1, 1)),
        ("no node yet, 8 GPUs", {"gpus": 8}, (4, 1, 8, 8)),
        ("limits not known", {"gpus": 2}, (1, 1, 2, 2)),
        ("mixed", {"workers": 4}, (4, 1, 4, 4)),
        ("mixed", {"gpus": 0}, (16, 0, 1, 1)),
    ],
)
def test_training_fits_single_nodes(name: str, options: dict[str, int], expected: tuple[float, ...]) -> None:
    assert bundles(placement.plan_training(CLUSTERS[name], **options)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("one big node, 1 GPU", {"workers": 2}, "scale.training.max_workers = 2 is more than the 1 GPUs"),
        ("one big node, 8 GPUs", {"workers": 9}, "more than the 8 GPUs"),
        ("one big node, 8 GPUs", {"workers": 4, "gpus": 2}, "more than the 2 GPUs"),
    ],
)
def test_training_refuses_more_workers_than_gpus(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        placement.plan_training(CLUSTERS[name], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("one big node", {"workers": 2, "cpus": 9}),
        ("four small nodes", {"cpus": 5}),  # fits the sum of the nodes, and none of them
        ("one big node", {"gpus": 1}),
        ("no node yet", {"gpus": 1}),
        ("no node yet", {"cpus": 9}),
        ("four small nodes, 8 GPUs", {"workers": 8, "cpus": 3}),
    ],
)
def test_training_refuses_what_never_fits(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ResourceError, match="training with .* needs .*each on one node; the cluster has"):
        placement.plan_training(CLUSTERS[name], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("one big node", {}, 14),
        ("one big node", {"cpus": 4}, 3),
        ("four small nodes", {"cpus": 3}, 3),  # one per node, and the tasks' CPUs; 4 by sums
        ("four small nodes", {"cpus": 2, "workers": 2}, 3),
        ("one big node, 8 GPUs", {"gpus": 1}, 8),
        ("one big node, 8 GPUs", {"gpus": 0.25}, 32),
        ("mixed", {"gpus": 1, "workers": 2}, 2),
        ("no node yet", {}, 30),
        ("one big node", {"concurrent": 3}, 3),
    ],
)
def test_trials_run_as_many_at_once_as_fit(name: str, options: dict[str, float], most: int) -> None:
    assert placement.plan_trials(CLUSTERS[name], **options).maximum == most  # type: ignore[arg-type]


def test_trials_of_several_workers_do_not_share_a_gpu() -> None:
    with pytest.raises(ConfigError, match="cannot share a GPU"):
        placement.plan_trials(CLUSTERS["one big node, 8 GPUs"], workers=2, gpus=0.5)
    with pytest.raises(ResourceError, match="a trial with 1 worker needs 1 x 5 CPUs"):
        placement.plan_trials(CLUSTERS["four small nodes"], cpus=5)


@pytest.mark.parametrize(
    ("name", "gpus", "scale_gpus", "expected"),
    [
        ("one big node", None, None, 0),
        ("one big node, 8 GPUs", None, None, 1),
        ("one big node, 8 GPUs", 0.25, None, 0.25),
        ("one big node, 8 GPUs", None, 0, 0),
        ("one big node, 8 GPUs", 0, None, 0),
    ],
)
def test_replicas_take_gpus_only_if_the_run_does(
    name: str, gpus: float | None, scale_gpus: int | None, expected: float
) -> None:
    plan = placement.plan_replicas(CLUSTERS[name], replicas=2, cpus=2, gpus=gpus, scale_gpus=scale_gpus)
    assert bundles(plan) == (2, expected, 2, 2)


def test_replicas_that_never_fit_are_refused() -> None:
    with pytest.raises(ResourceError, match="serving with 9 replicas needs 9 x 2 CPUs"):
        placement.plan_replicas(CLUSTERS["one big node"], replicas=9, cpus=2, gpus=None, scale_gpus=None)
    with pytest.raises(ResourceError, match="serving with 1 replica needs 1 x 1 CPU and 1 GPU"):
        placement.plan_replicas(CLUSTERS["one big node"], replicas=1, cpus=1, gpus=1, scale_gpus=None)


def test_fit_waits_only_for_what_an_autoscaler_can_bring() -> None:
    assert placement.fit([Bundle(8)], CLUSTERS["no node yet"]) is Fit.LATER
    assert placement.fit([Bundle(9)], CLUSTERS["no node yet"]) is Fit.NEVER
    assert placement.fit([Bundle(8)] * 5, CLUSTERS["no node yet"]) is Fit.NEVER
    assert placement.fit([Bundle(99)], CLUSTERS["limits not known"]) is Fit.LATER
    assert placement.fit([Bundle(8)], CLUSTERS["limits not known"]) is Fit.NOW
    assert placement.fit([Bundle(1)], Cluster(())) is Fit.NEVER
    with pytest.raises(ResourceError, match="the cluster has no node for work yet"):
        placement.require_fit([Bundle(1)], Cluster(()), "a pool")


def test_pack_never_exceeds_a_node() -> None:
    """Against a slow truth: every assignment of bundles to nodes."""
    random_ = random.Random(0)
    found = 0
    for _ in range(300):
        nodes = [Node(random_.randint(0, 4), random_.randint(0, 2)) for _ in range(random_.randint(1, 3))]
        asked = [Bundle(random_.randint(1, 3), random_.choice([0, 0, 1])) for _ in range(random_.randint(1, 4))]

        def holds(places: tuple[int, ...], nodes: list[Node] = nodes, asked: list[Bundle] = asked) -> bool:
            return all(
                sum(bundle.cpus for bundle, place in zip(asked, places, strict=True) if place == index) <= node.cpus
                and sum(bundle.gpus for bundle, place in zip(asked, places, strict=True) if place == index) <= node.gpus
                for index, node in enumerate(nodes)
            )

        truth = any(map(holds, itertools.product(range(len(nodes)), repeat=len(asked))))
        if placement.pack(asked, nodes):
            assert truth, (asked, nodes)  # greedy packing may miss an assignment, and never invents one
            found += 1
    assert found > 50
