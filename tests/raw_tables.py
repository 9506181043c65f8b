"""Write tables of items and events as users have them, prepare a catalog of them, and read it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import tiger.pipeline.embed
import tiger.pipeline.evaluate
import tiger.pipeline.item_vectors
import tiger.pipeline.prepare
import tiger.pipeline.recommend
import tiger.pipeline.semantic_ids
import tiger.pipeline.train
import tiger.pipeline.tune
from tests.paths import CONFIGS
from tiger.core.artifacts import Artifact
from tiger.core.config import build, load
from tiger.data.catalog import Catalog
from tiger.pipeline.prepare import prepare
from tiger.run import RunConfig

ITEMS = [f"p{n:02d}" for n in range(12)]
TITLES = [f"{a} {b}" for a in ("Linen", "Walnut", "Copper", "Slate") for b in ("Bowl", "Stool", "Lamp")]
START = 1_450_000_000
EVENTS = [(f"c{user}", ITEMS[(3 * user + 2 * step) % 12], START + 1000 * user + 60 * step)
          for user in range(8) for step in range(5)]  # fmt: skip


def items_csv(folder: Path, header: str = "item_id,title,maker") -> Path:
    lines = [
        header,
        *(f"{name},{title} no {n},m{n % 3}" for n, (name, title) in enumerate(zip(ITEMS, TITLES, strict=True))),
    ]
    return put(folder / "items.csv", "\n".join(lines) + "\n")


def events_csv(
    folder: Path, rows: Any = EVENTS, header: str = "user_id,item_id,timestamp", name: str = "events.csv"
) -> Path:
    return put(folder / name, "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


def put(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def run(folder: Path, items: Any, interactions: Any, catalog: dict[str, Any] | None = None, **data: Any) -> Artifact:
    names = {"items": items, "interactions": interactions}
    paths = {
        key: [str(each) for each in (value if isinstance(value, list) else [value])] for key, value in names.items()
    }
    values = {
        "root": str(folder / "runs"),
        "data": {"kind": "tables", **paths, **data},
        "catalog": {"text_fields": ["title", "maker"], "k_core": 0, **(catalog or {})},
    }
    return prepare(build(RunConfig, values))


def histories(artifact: Artifact) -> dict[str, list[str]]:
    catalog = Catalog(artifact)
    names, found = catalog.source_ids, catalog.histories
    return {user: [names[item] for item in found.of(row)] for row, user in enumerate(found.source_ids)}


def truth(rows: Any = EVENTS) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for user, item, _ in sorted(rows, key=lambda row: row[2]):
        found.setdefault(str(user), []).append(item)
    return found


def rows_of(artifact: Artifact, table: str = "interactions") -> dict[str, Any]:
    return artifact.metrics["rows"][table]


def write_items(path: Path, count: int = 30, shift: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        "item_id": [f"i{n}" for n in range(count)],
        "title": [f"title {n} {(n + shift) * 7919}" for n in range(count)],
    }
    pq.write_table(pa.table(rows), path)
    return path


def write_events(path: Path, users: str, seed: int, count: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = [
        (f"{users}{user}", f"i{item}", 1_400_000_000 + place)
        for user in range(count)
        for place, item in enumerate(rng.permutation(30)[:12])
    ]
    pq.write_table(pa.table(dict(zip(("user_id", "item_id", "timestamp"), zip(*rows, strict=True), strict=True))), path)
    return path


def prepare_files(root: Path, items: list[Path], events: list[Path], *more: str) -> Artifact:
    overrides = [
        "data.kind=tables", f"data.items={json.dumps([str(path) for path in items])}",
        f"data.interactions={json.dumps([str(path) for path in events])}", 'catalog.text_fields=["title"]',
        "catalog.k_core=0", f"root={root}/runs",
    ]  # fmt: skip
    return tiger.pipeline.prepare.prepare(load(RunConfig, None, [*overrides, *more], CONFIGS))
