"""Embed on an autoscaling cluster without nodes; print how many it had at most, and how many are left."""

from __future__ import annotations

import json
import sys
import threading
import time

import pyarrow as pa
import ray

import tiger.on_ray  # noqa: F401  settles Ray's environment
from tests.workers import NotesGpu
from tiger.core import logs
from tiger.core.resources import Resources
from tiger.core.storage import Folder
from tiger.on_ray import cluster
from tiger.on_ray.map import map_shards


def main(where: str) -> None:
    ray.init(log_to_driver=False)
    logs.configure_console()
    folder = Folder(where)
    folder.write_table("source.parquet", pa.table({"x": list(range(40))}), row_group_size=1)
    before = cluster.shape()
    assert before.autoscaling and not before.nodes, before
    counts = [0]

    def watch() -> None:
        while True:
            counts.append(len(cluster.shape().nodes))
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()
    target, arguments = folder.child("out"), {"slow": 3.0}
    map_shards(folder, "source.parquet", ["x"], target, NotesGpu, arguments, actors=Resources(), what="embed")
    deadline = time.monotonic() + 180
    while cluster.shape().nodes and time.monotonic() < deadline:
        time.sleep(1)
    print(json.dumps({"most": max(counts), "left": len(cluster.shape().nodes)}))


if __name__ == "__main__":
    main(sys.argv[1])
