"""Run actors and trainings on a Ray that counts two GPUs, and note in FOLDER which GPU each was assigned."""

from __future__ import annotations

import sys

import pyarrow as pa
import pyarrow.parquet as pq
import ray

import tiger.on_ray  # noqa: F401  settles Ray's environment
from tests.workers import GpuNotes, NotesGpu
from tiger.core.errors import ConfigError
from tiger.core.resources import Resources
from tiger.core.storage import Folder
from tiger.on_ray.map import map_shards
from tiger.on_ray.train import train
from tiger.run import ResourcesConfig

SIZES = (10, 5, 10, 10, 3, 10, 10, 10)
"""Rows per shard: shards of unequal lengths are neither joined nor split."""

POOLS = {
    "halves": Resources(min_workers=4),
    "whole": Resources(min_workers=2, gpus=1.0),
    "none": Resources(gpus=0.0),
}


def main(where: str) -> None:
    ray.init(num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=150_000_000)
    folder, rows = Folder(where), 0
    with pq.ParquetWriter(f"{where}/source.parquet", pa.schema([("x", pa.int64())])) as writer:
        for size in SIZES:
            writer.write_table(pa.table({"x": list(range(rows, rows + size))}), row_group_size=size)
            rows += size
    for name, actors in POOLS.items():
        target, arguments = folder.child(name), {"slow": 0.5}
        map_shards(folder, "source.parquet", ["x"], target, NotesGpu, arguments, actors=actors, what=name)
    found = train(GpuNotes(where), folder.child("two"), ResourcesConfig(), "two")
    assert found == {"sum": 2.0, "world": 2}, found
    try:
        train(GpuNotes(where), folder.child("three"), ResourcesConfig(training=Resources(max_workers=3)), "three")
    except ConfigError as error:
        print(error)


if __name__ == "__main__":
    main(sys.argv[1])
