"""The real benchmark: what the readers and rules make of it (TIGER, table 1)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.paths import BEAUTY, CONFIGS
from tiger.core.config import load
from tiger.data.catalog import Catalog
from tiger.pipeline.prepare import prepare
from tiger.run import RunConfig

pytestmark = pytest.mark.beauty


def test_the_numbers_of_the_paper(tmp_path: Path) -> None:
    run = load(RunConfig, "beauty-cpu", [f"data.path={BEAUTY}", f"root={tmp_path}"], CONFIGS)
    artifact = prepare(run)
    assert {name: artifact.metrics[name] for name in ("users", "items", "interactions", "training_examples")} == {
        "users": 22_363,
        "items": 12_101,
        "interactions": 198_502,
        "training_examples": 131_413,
    }
    catalog = Catalog(artifact)
    assert sum("&amp;" in title for title in catalog.titles) == 0
    assert len(catalog.histories.evaluation("test")) == 22_363
    assert not any(record["skipped"] for record in artifact.metrics["rows"].values())
