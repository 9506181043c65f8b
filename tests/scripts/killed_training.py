"""Train WHICH with two workers that are killed now and then; MARKS notes the kills, TARGET is the artifact."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ray

import tiger.on_ray  # noqa: F401  settles Ray's environment
from tests.workers import KilledNowAndThen
from tiger.core.resources import Resources
from tiger.core.storage import Folder
from tiger.on_ray.train import train
from tiger.run import ResourcesConfig


def main(which: str, marks: str, target: str) -> None:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    Path(marks, "driver").write_text(str(os.getpid()))
    resources = ResourcesConfig(training=Resources(max_workers=2, cpus=1), max_failures=5)
    print(json.dumps(train(KilledNowAndThen(which, marks), Folder(target), resources, "test")))


if __name__ == "__main__":
    main(*sys.argv[1:])
