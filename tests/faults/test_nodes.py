"""A cluster of three nodes on one machine that loses one: in the middle of embedding, and in the middle of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from tests.unit.test_training import group

pytestmark = pytest.mark.slow
CHANGES: dict[str, Any] = {"dropout": 0.2, "training": {"epochs": 6, "batch_size": 100, "validate_every_epochs": 1.0}}
CLUSTER = """
import json, os, sys, threading, time
sys.path.insert(0, {tests!r})
os.environ |= {{"PYTHONPATH": {tests!r}, "RAY_health_check_initial_delay_ms": "1000",
               "RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "10"}}
import tiger.on_ray
import ray
from pathlib import Path
from ray.cluster_utils import Cluster
small = dict(object_store_memory=100_000_000)
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False, **small))
nodes = [cluster.add_node(num_cpus=2, **small) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
cluster.wait_for_nodes()
assert len([node for node in ray.nodes() if node["Alive"]]) == 3

def lose_a_node_once(happened):
    while not happened():
        time.sleep(0.1)
    cluster.remove_node(nodes[1], allow_graceful=False)
    Path({folder!r}, "lost").touch()

def end(found):
    Path({folder!r}, "found.json").write_text(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()

def watch(happened):
    threading.Thread(target=lose_a_node_once, args=(happened,), daemon=True).start()
"""
EMBED = """
from tests.faults.test_nodes import slow_double
from tests.faults.test_scale import source
from tiger.on_ray.map import ActorPool, map_shards
folder = source(Path({folder!r}, "table"))
watch(lambda: len(list(Path({folder!r}, "table", "out").glob("*.parquet"))) >= 2)
map_shards(folder, "source.parquet", ["x"], folder.child("out"), slow_double, {{"notes": {folder!r} + "/table/notes"}},
          actors=ActorPool(minimum=2, maximum=2), what="test")
table = folder.read_table("out")
deadline = time.monotonic() + 60  # the head notices by heartbeats that do not come
while (dead := sum(not node["Alive"] for node in ray.nodes())) == 0 and time.monotonic() < deadline:
    time.sleep(0.5)
end([table["x"].to_pylist(), table["y"].to_pylist(), dead])
"""
TRAIN = """
from tests.faults.test_nodes import watched
from tiger.core.storage import Folder
from tiger.run import ResourcesConfig
from tiger.on_ray.train import train

def ready():
    if not Path({folder!r}, "second-save").exists():
        return False
    # What a training leans on beside its workers must not be lost with one of them: by chance it would, once in three.
    places = [actor["Address"]["NodeID"] for actor in ray._private.state.actors().values()
              if actor["ActorClassName"] == "_QueueActor"]
    assert places == [ray.get_runtime_context().get_node_id()], places
    return True

watch(ready)
found = train(watched, {{"folder": {folder!r}}}, Folder({folder!r} + "/artifact"),
              ResourcesConfig(train_workers=2, cpus_per_worker=1, max_failures=5), "test")
end(found)
"""


def slow_double(**arguments: Any) -> Any:
    """Doubles; with two parts written it waits until a node is gone, as a longer stage would meet it."""
    import time

    from tests.faults.test_scale import Double

    worker, table = Double(**arguments), Path(arguments["notes"]).parent

    def slowly(part: Any) -> Any:
        time.sleep(1)
        deadline = time.monotonic() + 120
        while len(list((table / "out").glob("*.parquet"))) >= 2 and not (table.parent / "lost").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return worker(part)

    return slowly


def watched(arguments: dict[str, Any], device: Any, hooks: Any) -> dict[str, Any]:
    """Trains; after the second snapshot it waits until a node is gone, as a longer training would meet it."""
    import time

    import torch

    from tests.unit.test_training import learn, losses
    from tiger.training.loop import Callbacks

    folder, saves = Path(arguments["folder"]), 0

    def save(state: dict[str, Any], metrics: dict[str, Any]) -> None:
        nonlocal saves
        hooks.save(state, metrics)
        saves += 1
        if saves == 2 and not (folder / "lost").exists():
            (folder / "second-save").touch()
            deadline = time.monotonic() + 120
            while not (folder / "lost").exists() and time.monotonic() < deadline:
                time.sleep(0.1)

    torch.set_num_threads(1)
    module, result = learn("tokenizer", Callbacks(report=hooks.report, save=save, load=hooks.load), **CHANGES)
    state = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
    return {"losses": losses(result), "best": result.best, "state": state}


def on_three_nodes(script: str, folder: Path) -> Any:
    # No `ray_tmp` of pytest's: socket paths have at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as ray_folder:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {"RAY_TMPDIR": ray_folder, "RAY_AUTH_MODE": "disabled"}
        text = (CLUSTER + script).format(tests=str(ROOT), folder=str(folder))
        done = subprocess.run(
            [sys.executable, "-c", text], capture_output=True, text=True, timeout=1500, env=environment, check=False
        )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    assert (folder / "lost").exists()
    return json.loads((folder / "found.json").read_text())  # Ray prints lines of its own


def test_a_node_lost_while_embedding_loses_and_doubles_nothing(tmp_path: Path) -> None:
    x, y, dead = on_three_nodes(EMBED, tmp_path)
    assert x == list(range(95))
    assert y == [2 * value for value in x]
    assert dead == 1


def test_a_node_lost_while_training_changes_nothing(tmp_path: Path) -> None:
    truth, _ = group(2, "tokenizer", tmp_path, **CHANGES)
    found = on_three_nodes(TRAIN, tmp_path)
    assert found == {key: truth[key] for key in found}
