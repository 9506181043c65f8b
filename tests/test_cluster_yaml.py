"""cluster.yaml, held offline against Ray's own schema and loader, and against what they do not look at."""

from __future__ import annotations

from pathlib import Path

import yaml

PATH = Path(__file__).parents[1] / "cluster.yaml"


def test_ray_accepts_it() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(PATH.read_text())))


def test_what_the_schema_does_not_check() -> None:
    config = yaml.safe_load(PATH.read_text())
    types = config["available_node_types"]
    assert config["cluster_name"]
    assert all(kind["max_workers"] <= config["max_workers"] for kind in types.values())
    assert sum(kind.get("min_workers", 0) for kind in types.values()) <= config["max_workers"]
    assert types["gpu"]["min_workers"] == 0
    assert types["head"]["resources"] == {"CPU": 0}
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
