"""Preparing by tasks on Ray: the same catalog, byte for byte, and the same messages as in one process."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiger.core.artifacts import Artifact
from tiger.core.config import build
from tiger.core.errors import DataError
from tiger.data.readers import sections
from tiger.pipeline.prepare import prepare
from tiger.run import RunConfig

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(autouse=True)
def _small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "SECTION_BYTES", 20_000)
    monkeypatch.setattr(sections, "_CHUNK", 4_096)


def prepared(root: Path, data: dict[str, Any], megabytes: int, **catalog: Any) -> Artifact:
    values = {"root": str(root), "data": data, "catalog": catalog, "scale": {"in_process_megabytes": megabytes}}
    return prepare(build(RunConfig, values))


def shop(folder: Path) -> dict[str, Any]:
    """Items as JSON lines and Parquet with other columns, interactions as CSV and Parquet, with a bad line each."""
    rng = np.random.default_rng(0)
    rows = [{"item_id": f"i{n}", "title": f"title {n}", "tags": ["a"] if n % 3 else "b"} for n in range(400)]
    (folder / "a.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken"]) + "\n")
    pq.write_table(
        pa.table({"title": ["late"] * 9, "item_id": [f"i{n}" for n in range(395, 404)]}), folder / "b.parquet"
    )
    lines = [f"u{rng.integers(300)},i{rng.integers(404)},{1_500_000_000 + rng.integers(900)}" for _ in range(6_000)]
    (folder / "c.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines, "u1,i1,never"]) + "\n")
    events = [line.split(",") for line in lines[:500]]
    columns = [pa.array(column) for column in zip(*events, strict=True)]
    table = pa.table([*columns[:2], columns[2].cast(pa.int64())], names=["user_id", "item_id", "timestamp"])
    pq.write_table(table, folder / "d.parquet", row_group_size=100)
    return {
        "kind": "tables",
        "items": [str(folder / "a.jsonl"), str(folder / "b.parquet")],
        "interactions": [str(folder / "c.csv"), str(folder / "d.parquet")],
        "max_bad_row_fraction": 0.1,
    }


@pytest.mark.parametrize("rules", [
    {"k_core": 5, "text_fields": ["title", "tags"]},
    {"k_core": 0, "duplicates": "all", "tie_break": "shuffle", "split": "temporal", "text_fields": ["title"]},
])  # fmt: skip
def test_tasks_prepare_what_one_process_prepares(rules: dict[str, Any], tmp_path: Path) -> None:
    data = shop(tmp_path)
    one, other = (prepared(tmp_path / str(size), data, size, **rules) for size in (100, 0))
    assert one.manifest["files"] == other.manifest["files"]
    assert one.metrics == other.metrics
    assert one.metrics["rows"]["interactions"]["examples"][0].startswith(f"{tmp_path}/c.csv:6002: ")


def test_an_error_of_a_task_is_that_of_one_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = shop(tmp_path)
    pq.write_table(pa.table({"user": ["u"], "item_id": ["i1"], "timestamp": [1]}), tmp_path / "d.parquet")
    errors = []
    with caplog.at_level(logging.INFO):
        for size in (100, 0):
            with pytest.raises(DataError) as error:
                prepared(tmp_path / str(size), data, size, text_fields=["title"])
            errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert "d.parquet: no column user_id" in errors[0]
