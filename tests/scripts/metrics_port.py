"""Print the port on which this node exports metrics to Prometheus."""

from __future__ import annotations

import os

import ray

ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
print(ray.nodes()[0]["MetricsExportPort"])
