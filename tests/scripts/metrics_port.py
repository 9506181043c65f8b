"""Print the port on which this node exports metrics to Prometheus."""

from __future__ import annotations

import ray

from tiger.on_ray import cluster

cluster.connect()  # with the token of this machine, as the command line does
print(ray.nodes()[0]["MetricsExportPort"])
