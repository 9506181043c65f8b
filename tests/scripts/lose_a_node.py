"""Lose one of three nodes in the middle of a stage, and write what came of it to FOLDER/found.json."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "10",
}  # before Ray is imported

import tiger.on_ray  # noqa: I001  settles Ray's environment
import ray
from ray.cluster_utils import Cluster

import tiger.on_ray.recommend
from tests.large_catalogs import SlowEvaluation, evaluate_shop, ids_of_shards, shop
from tests.workers import Watched, slow_double, source
from tiger.core.config import build
from tiger.core.resources import Resources
from tiger.core.storage import Folder
from tiger.data import user_tables
from tiger.data.prepare.build import Sizes
from tiger.data.readers import sections
from tiger.on_ray.map import map_shards
from tiger.on_ray.tasks import RayTasks
from tiger.on_ray.train import train as train_on_ray
from tiger.pipeline import prepare as preparation
from tiger.run import ResourcesConfig, RunConfig
from tiger.tokenizers import shards

MEMORY = {"object_store_memory": 100_000_000}


def lose_a_node_once(happened: Callable[[], bool], cluster: Cluster, node: Any, folder: Path) -> None:
    while not happened():
        time.sleep(0.1)
    cluster.remove_node(node, allow_graceful=False)
    (folder / "lost").touch()


def embed(where: Path, watch: Callable[[Callable[[], bool]], None]) -> Any:
    folder = source(where / "table")
    watch(lambda: len(list((where / "table/out").glob("*.parquet"))) >= 2)
    arguments = {"notes": str(where / "table/notes")}
    actors = Resources(min_workers=2, max_workers=2)
    map_shards(folder, "source.parquet", ["x"], folder.child("out"), slow_double, arguments, actors=actors, what="test")
    table = folder.read_table("out")
    deadline = time.monotonic() + 60  # the head notices by heartbeats that do not come
    while (dead := sum(not node["Alive"] for node in ray.nodes())) == 0 and time.monotonic() < deadline:
        time.sleep(0.5)
    return [table["x"].to_pylist(), table["y"].to_pylist(), dead]


def train(where: Path, watch: Callable[[Callable[[], bool]], None]) -> Any:
    def ready() -> bool:
        if not (where / "second-save").exists():
            return False
        # What a training uses in addition to its workers must not be lost with one of them: by chance it would be, once
        # in three.
        actors = ray._private.state.actors().values()
        nodes = [actor["Address"]["NodeID"] for actor in actors if actor["ActorClassName"] == "_QueueActor"]
        assert nodes == [ray.get_runtime_context().get_node_id()], nodes
        return True

    watch(ready)
    resources = ResourcesConfig(training=Resources(max_workers=2, cpus=1), max_failures=5)
    return train_on_ray(Watched(str(where)), Folder(str(where / "artifact")), resources, "test")


def prepare(where: Path, watch: Callable[[Callable[[], bool]], None]) -> Any:
    sections.SECTION_BYTES, sections._CHUNK = 100_000, 10_000
    preparation.Sizes = lambda: Sizes(run_bytes=20_000, item_range_bytes=20_000, run_rows=4_000, range_rows=5_000)
    watch(lambda: len(list(where.glob("runs/catalog-*/scratch/tables/interactions-*.parquet"))) >= 5)
    return preparation.prepare(build(RunConfig, shop(where, megabytes=0))).manifest["files"]


def tokenize(where: Path, watch: Callable[[Callable[[], bool]], None]) -> Any:
    shards.group_shards.__defaults__ = (500,)
    shards._RANGE_ROWS = 300
    watch(lambda: len(list(where.glob("scratch/codes-*.parquet"))) >= 5)
    return ids_of_shards(where, RayTasks(Folder(str(where))))


def evaluate(where: Path, watch: Callable[[Callable[[], bool]], None]) -> Any:
    user_tables.SHARD_USERS = 200
    tiger.on_ray.recommend.EvaluateShard = SlowEvaluation
    watch(lambda: len(list(where.glob("runs/evaluation-*/ranks/*.parquet"))) >= 5)
    return evaluate_shop(where)


def main(stage: str, where: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **MEMORY})
    nodes = [cluster.add_node(num_cpus=2, **MEMORY) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    assert len([node for node in ray.nodes() if node["Alive"]]) == 3

    def watch(happened: Callable[[], bool]) -> None:
        threading.Thread(target=lose_a_node_once, args=(happened, cluster, nodes[1], where), daemon=True).start()

    stages = {"embed": embed, "train": train, "prepare": prepare, "tokenize": tokenize, "evaluate": evaluate}
    found = stages[stage](where, watch)
    (where / "found.json").write_text(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
