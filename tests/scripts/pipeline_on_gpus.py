"""Run `tiger pipeline` with OVERRIDES on a Ray of six CPUs that counts GPUS GPUs."""

from __future__ import annotations

import sys

import ray

import tiger.on_ray  # noqa: F401  settles Ray's environment
from tiger.cli import main

if __name__ == "__main__":
    gpus, *overrides = sys.argv[1:]
    ray.init(
        num_cpus=6, num_gpus=int(gpus), include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000
    )
    main(["pipeline", *overrides])
