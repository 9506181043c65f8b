"""The look at a cluster before minute one: planted answers of nodes, and a real local Ray."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import pytest

from tiger.core.errors import ConfigError, ResourceError
from tiger.core.storage import Folder
from tiger.on_ray import cluster
from tiger.on_ray.cluster import Node
from tiger.on_ray.placement import Bundle
from tiger.on_ray.watch import watching

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
        cluster.check_nodes(nodes, Folder("runs"))


def test_an_object_store_has_no_disk_to_run_out_of() -> None:
    cluster.check_nodes([dataclasses.replace(GOOD, free_disk=-1)], Folder("runs"))


@pytest.mark.usefixtures("local_ray")
def test_a_real_node_answers_and_nothing_is_left(tmp_path: Path) -> None:
    (node,) = cluster.inspect(Folder(str(tmp_path / "runs")))
    assert node.sees_storage
    assert node.object_store == 200_000_000
    assert {"python", "ray", "torch"} <= node.versions.keys()
    cluster.check_nodes([node], Folder(str(tmp_path)))
    assert list((tmp_path / "runs").iterdir()) == []


def test_node_with_another_patch_release_of_python_is_accepted() -> None:
    other = dataclasses.replace(GOOD, address="10.0.0.2", versions=GOOD.versions | {"python": "3.12.9"})
    cluster.check_nodes([GOOD, other], Folder("runs"))


@pytest.mark.usefixtures("local_ray")
def test_gpus_that_cannot_come_are_an_error() -> None:
    with pytest.raises(ResourceError, match=r"test: requested 2 GPUs \(scale.gpus\), and CUDA sees 0"):
        cluster.wait_for_gpus(2, "test", minutes=0.05)


@pytest.mark.usefixtures("local_ray")
def test_wait_for_reports_pending_demand_until_room_is_there(caplog: pytest.LogCaptureFixture) -> None:
    import ray

    holder = ray.util.placement_group([{"CPU": 3}])
    assert holder.wait(30)
    try:
        with (
            caplog.at_level("INFO"),
            pytest.raises(ResourceError, match=r"2 x 1 CPU not available after 0.05 minutes"),
        ):
            cluster.wait_for([Bundle(1.0)] * 2, "test", minutes=0.05)
        assert "pending: " in caplog.text
        assert "2 x 1 CPU" in caplog.text
        assert "of 4 CPUs free" in caplog.text
        timer = threading.Timer(2, ray.util.remove_placement_group, [holder])
        timer.start()
        cluster.wait_for([Bundle(1.0)] * 2, "test", minutes=1)
        timer.join()
    finally:
        ray.util.remove_placement_group(holder)
    with pytest.raises(ResourceError, match="test needs 1 x 5 CPUs, each on one node; the cluster has 1 node"):
        cluster.wait_for([Bundle(5.0)], "test", minutes=1)


@pytest.mark.usefixtures("local_ray")
def test_watch_reports_a_stage_without_progress(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), watching("embed", "ray-data/ray-data.log", details=lambda: "shard 7", seconds=0.5):
        deadline = time.monotonic() + 30
        while "no progress" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    (line, *_) = [record.message for record in caplog.records if "no progress" in record.message]
    assert line.startswith("embed: no progress for ")
    assert "pending: nothing; 4 of 4 CPUs free; shard 7; see " in line
    assert line.endswith("/logs/ray-data/ray-data.log")
    caplog.clear()
    with caplog.at_level("INFO"), watching("embed", "", seconds=1.0) as watch:
        for _ in range(15):
            time.sleep(0.1)
            watch.progress()
    assert "no progress" not in caplog.text


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("ray://127.0.0.1:10001", ConfigError, "a driver must run inside the cluster. Submit it: ray job submit"),
        ("http://127.0.0.1:8265", ConfigError, "Submit it: ray job submit"),
        ("127.0.0.1:1", ResourceError, "no Ray cluster answers at RAY_ADDRESS = 127.0.0.1:1; correct it"),
        ("nowhere.invalid:6379", ResourceError, "no Ray cluster answers at RAY_ADDRESS = nowhere.invalid:6379"),
    ],
)
def test_join_refuses_an_address_without_a_cluster(
    address: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster, "_REACHABLE_SECONDS", 1)
    with pytest.raises(error, match=message):
        cluster._join()


@pytest.mark.parametrize(("cuda", "pretended", "expected"), [(0, "", 0), (2, "", 2), (0, "3", 3)])
def test_local_ray_counts_the_gpus_that_cuda_sees(
    cuda: int, pretended: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Mac Ray itself would count one."""
    started: list[dict[str, object]] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: cuda)
    monkeypatch.setenv("TIGER_PRETEND_GPUS", pretended)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(cluster, "_initialize", lambda failure, **options: started.append(options))
    with pytest.raises(Stop):
        monkeypatch.setattr(cluster, "_set_console_levels", _stop)
        cluster._join()
    assert started[0]["num_gpus"] == expected
    assert started[0]["address"] == "local"


@pytest.mark.parametrize(("late", "starts"), [(2, True), (3, False)])
def test_a_slow_start_is_tried_again(
    late: int, starts: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray raises a bare `Exception` when its processes take longer than 30 seconds to start."""
    calls: list[dict[str, object]] = []

    def init(**options: object) -> None:
        calls.append(options)
        if len(calls) <= late:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr("ray.init", init)
    if starts:
        cluster._initialize("a local Ray does not start", address="local")
    else:
        with pytest.raises(ResourceError, match=r"does not start: is the machine busy\? \(The current node"):
            cluster._initialize("a local Ray does not start", address="local")
    assert len(calls) == 3
    assert "Ray did not start within 30 s: is the machine busy? Trying again, 2/3" in caplog.text


class Stop(Exception):
    """Ends a function after the part that a test looks at."""


def _stop() -> None:
    raise Stop


def test_cores_stay_within_a_container_s_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._private.utils

    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(ray._private.utils, "get_num_cpus", lambda **_: 2)
    assert cluster.cores() == 2
    monkeypatch.setattr(ray._private.utils, "get_num_cpus", lambda **_: 128)
    assert cluster.cores() == 64
    monkeypatch.setattr(ray._private.utils, "get_num_cpus", lambda **_: 0)
    assert cluster.cores() == 1
