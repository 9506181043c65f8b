"""Metrics of a run as Prometheus reads them from a node of Ray."""

from __future__ import annotations

import time
import urllib.request

from tests.factories import record
from tiger.core import tracking


def test_prometheus_reads_figures_from_the_node(local_ray: None) -> None:
    import ray

    from tiger.on_ray.metrics import Gauges

    with tracking.recording(Gauges("pipeline")):
        record()
        (node,) = ray.nodes()
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        deadline, expected = time.monotonic() + 60, "ray_tiger_usage{"
        while True:
            with urllib.request.urlopen(address, timeout=10) as response:
                lines = [line for line in response.read().decode().splitlines() if line.startswith(expected)]
            if lines or time.monotonic() > deadline:
                break
            time.sleep(1)
    (line,) = lines
    assert line.endswith(" 0.75")
    assert all(label in line for label in ('job="pipeline"', 'stage="tokenizer"', 'at="1"'))
