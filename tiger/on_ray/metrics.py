"""Metrics of a running stage as Ray metrics, which every node exports to Prometheus next to Ray's own.

https://docs.ray.io/en/latest/ray-observability/user-guides/add-app-metrics.html
"""

from __future__ import annotations

from collections.abc import Mapping

import ray
from ray.util.metrics import Gauge


class Gauges:
    """A sink of `tiger.core.tracking`: `usage@1` of the tokenizer is `ray_tiger_usage{stage="tokenizer", at="1"}`."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.gauges: dict[str, Gauge] = {}

    def __call__(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Set one gauge per metric; ignore them if Ray is not initialized."""
        if not ray.is_initialized():
            return
        for metric, value in metrics.items():
            name, _, at = metric.partition("@")
            if name not in self.gauges:
                what = f"{name.replace('_', ' ')} of a stage of TIGER"
                self.gauges[name] = Gauge(f"tiger_{name}", what, tag_keys=("job", "stage", "at"))
            self.gauges[name].set(value, {"job": self.job, "stage": stage, "at": at})
