"""Progress while a catalog is prepared: rows read, time to go, phases that take long."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiger.core import progress
from tiger.core.config import build
from tiger.core.progress import Progress, timed
from tiger.data.readers import lines as _lines
from tiger.data.readers import parquet as _parquet
from tiger.pipeline.prepare import prepare
from tiger.run import RunConfig


def raw_files(folder: Path, form: str) -> dict[str, Any]:
    """Own files of 20,000 events and 500 items, and the configuration that reads them."""
    rng = np.random.default_rng(0)
    items = [{"item_id": f"i{n}", "title": f"{rng.integers(1 << 60)} {rng.integers(1 << 60)}"} for n in range(500)]
    events = [{"user_id": f"u{n // 20}", "item_id": f"i{rng.integers(500)}", "timestamp": 1_500_000_000 + n}
              for n in range(20_000)]  # fmt: skip
    if form == "amazon":
        items = [{"asin": row["item_id"], "title": row["title"]} for row in items]
        events = [
            {"reviewerID": row["user_id"], "asin": row["item_id"], "unixReviewTime": row["timestamp"]} for row in events
        ]
    names = {}
    for role, rows in (("items", items), ("interactions", events)):
        names[role] = (
            f"{folder}/{'meta_' if role == 'items' else 'reviews_'}x.{'json.gz' if form == 'amazon' else form}"
        )
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), names[role], row_group_size=1_000)
            continue
        if form.startswith("csv"):
            text = "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)])
        else:
            text = "\n".join(map(json.dumps, rows)) if form != "json" else json.dumps(rows)
        data = text.encode()
        Path(names[role]).write_bytes(gzip.compress(data) if names[role].endswith("gz") else data)
    data = {"kind": "amazon", "path": str(folder)} if form == "amazon" else {"kind": "tables", **names}
    return {"root": f"{folder}/runs", "data": data, "catalog": {"k_core": 0, "text_fields": ["title"]}}


@pytest.mark.parametrize("form", ["csv", "csv.gz", "jsonl.gz", "json", "parquet", "amazon"])
def test_reading_shows_how_long_it_will_take(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_lines, "BLOCK", 1 << 14)
    monkeypatch.setattr(_parquet, "BATCH_ROWS", 1_000)
    clock = itertools.count(0.0, 11.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO):
        prepare(build(RunConfig, raw_files(tmp_path, form)))
    for role, rows in (("items", 500), ("interactions", 20_000)):
        lines = [record.message for record in caplog.records if record.message.startswith(f"read {role}: ")]
        assert lines[-1].startswith(f"read {role}: {rows:,} rows, ")
        shares = [int(each[1]) for line in lines if (each := re.search(r", (\d+)%, ETA [\d,]+ s", line))]
        assert shares == sorted(shares)
        assert shares[-1] == 100
        if role == "interactions" and form != "json":  # a document is read as a whole
            assert len(set(shares)) > 3


def test_the_time_to_go_follows_the_share_that_was_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO):
        reading = Progress("read interactions", None, "rows", interval=10)
        now = 130.0
        reading.add(3_000)
        now = 145.0
        reading.at(0.25)
    assert [record.message for record in caplog.records] == [
        "read interactions: 3,000 rows, 100.0/s",  # nothing is known yet of the whole
        "read interactions: 3,000 rows, 66.7/s, 25%, ETA 135 s",
    ]


def test_a_phase_that_takes_long_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        with timed("k-core", after=60):
            pass
        assert not caplog.records
        with timed("k-core", after=0.05):
            time.sleep(0.2)
    assert caplog.records[0].message == "k-core: in progress, 0 s so far"
    assert re.fullmatch(r"k-core: 0\.[2-9] s", caplog.records[-1].message)
