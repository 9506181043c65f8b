"""The look at a cluster before minute one: planted answers of nodes, and a real local Ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tiger.artifacts import Folder
from tiger.errors import ResourceError
from tiger.scale import cluster
from tiger.scale.cluster import Node

GOOD = Node("10.0.0.1", True, 50 << 30, 1 << 30, {"python": "3.12.1", "torch": "2.11.0"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sees_storage": False}, r"is not shared: 1 of 3 nodes do not see .* \(10.0.0.2\); set root to s3://"),
        ({"versions": GOOD.versions | {"torch": "2.12.0"}}, "torch is 2.11.0 on 10.0.0.1 and 2.12.0 on 10.0.0.2"),
        ({"versions": GOOD.versions | {"python": "3.11.9"}}, "python is 3.12.1 on 10.0.0.1 and 3.11.9"),
        ({"free_disk": 1 << 20}, "10.0.0.2 has 0.00 GB free"),
        ({"object_store": 10 << 20}, "10.0.0.2 has an object store of 10 MB"),
    ],
)
def test_what_a_node_lacks_is_said_with_the_cure(changes: dict[str, object], message: str) -> None:
    nodes = [GOOD, dataclasses.replace(GOOD, address="10.0.0.2", **changes), GOOD]  # type: ignore[arg-type]
    with pytest.raises(ResourceError, match=message):
        cluster.require_healthy(nodes, Folder("runs"))


def test_an_object_store_has_no_disk_to_run_out_of() -> None:
    cluster.require_healthy([dataclasses.replace(GOOD, free_disk=-1)], Folder("runs"))


@pytest.mark.usefixtures("local_ray")
def test_a_real_node_answers_and_nothing_is_left(tmp_path: Path) -> None:
    (node,) = cluster.look(Folder(str(tmp_path / "runs")))
    assert node.sees_storage
    assert node.object_store == 200_000_000
    assert {"python", "ray", "torch"} <= node.versions.keys()
    cluster.require_healthy([node], Folder(str(tmp_path)))
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.usefixtures("local_ray")
def test_gpus_that_do_not_come_are_not_waited_for_in_silence() -> None:
    with pytest.raises(ResourceError, match=r"2 GPUs were asked for \(scale.gpus\), 0 are there"):
        cluster.wait_for_gpus(2, minutes=0.05)
