"""Train on a head without CPUs, before it has other nodes and after; ranks note in FOLDER where they ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

import tiger.on_ray  # noqa: F401  settles Ray's environment
from tests.workers import GpuNotes
from tiger.core import logs
from tiger.core.errors import ResourceError
from tiger.core.resources import Resources
from tiger.core.storage import Folder
from tiger.on_ray.cluster import shape
from tiger.on_ray.train import train
from tiger.run import ResourcesConfig

MEMORY = {"object_store_memory": 100_000_000}


def main(where: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **MEMORY})
    ray.init(address=cluster.address, log_to_driver=False)
    logs.configure_console()
    folder, job = Folder(where), GpuNotes(where)
    try:
        train(job, folder.child("none"), ResourcesConfig(), "none")
    except ResourceError as error:
        print(error)
    for _ in range(2):
        cluster.add_node(num_cpus=4, **MEMORY)
    cluster.wait_for_nodes()
    assert not shape().autoscaling
    found = train(job, folder.child("one"), ResourcesConfig(), "one")
    assert found == {"sum": 1.0, "world": 1}
    one = json.loads(Path(where, "rank-0").read_text())
    found = train(job, folder.child("two"), ResourcesConfig(training=Resources(max_workers=2)), "two")
    assert found == {"sum": 2.0, "world": 2}
    ranks = [json.loads(Path(where, f"rank-{rank}").read_text()) for rank in range(2)]
    print(json.dumps([one, ranks]))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
