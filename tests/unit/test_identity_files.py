"""Which raw files, vectors and filters change the identity of an artifact."""

from __future__ import annotations

from pathlib import Path

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
from tests.identities import config_of, identities
from tests.paths import CONFIGS
from tests.raw_tables import prepare_files, write_events, write_items
from tiger.core.artifacts import Artifact
from tiger.core.config import load
from tiger.data.readers.sections import scan
from tiger.data.sources.base import Files
from tiger.run import RunConfig

# --- raw files --------------------------------------------------------------------------------------------------


def test_every_raw_file_counts_by_role_order_and_content_and_never_by_name(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items/data.parquet")
    first, second = write_events(tmp_path / "1/data.parquet", "a", 1), write_events(tmp_path / "2/data.parquet", "b", 2)
    one = prepare_files(tmp_path, [items], [first, second])
    assert one.metrics["users"] == 40
    recorded = one.manifest["raw_files"]
    assert [(file["role"], file["position"], file["name"]) for file in recorded] == [
        ("items", 0, "data.parquet"),
        ("interactions", 0, "data.parquet"),
        ("interactions", 1, "data.parquet"),
    ]
    assert [file["bytes"] for file in recorded] == [path.stat().st_size for path in (items, first, second)]

    renamed = first.rename(tmp_path / "1/other-name.parquet")
    assert prepare_files(tmp_path, [items], [renamed, second]).fingerprint == one.fingerprint
    first = renamed.rename(first)
    assert prepare_files(tmp_path, [items], [second, first]).fingerprint != one.fingerprint  # order decides ties
    write_events(first, "c", 3, count=25)
    changed = prepare_files(tmp_path, [items], [first, second])
    assert changed.fingerprint != one.fingerprint
    assert changed.metrics["users"] == 45
    write_items(items, shift=1)
    assert prepare_files(tmp_path, [items], [first, second]).fingerprint != changed.fingerprint


def test_the_role_of_a_file_counts(tmp_path: Path) -> None:
    """Two tables that can both be read as items and as events."""
    columns = {"item_id": [f"i{n % 5}" for n in range(40)], "user_id": [f"u{n // 5}" for n in range(40)]}
    for name, shift in (("x", 0), ("y", 1)):
        rows = columns | {"title": columns["item_id"], "timestamp": [1_400_000_000 + shift + n for n in range(40)]}
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    x, y = tmp_path / "x.parquet", tmp_path / "y.parquet"
    described = []
    for pair in ((x, y), (y, x)):
        files = Files(*([path] for path in pair))
        scans = [scan(file) for _, file in files.roles()]
        described.append(tiger.pipeline.prepare.identify(tiger.pipeline.prepare.describe_files(files, scans)))
    assert described[0] != described[1]
    assert sorted(described[0].values()) == sorted(described[1].values())


def test_another_source_is_another_catalog(tmp_path: Path) -> None:
    items, events = write_items(tmp_path / "items.parquet"), write_events(tmp_path / "events.parquet", "a", 1)
    tables = load(
        RunConfig, None, ["data.kind=tables", f'data.items=["{items}"]', f'data.interactions=["{events}"]'], CONFIGS
    )
    other, base = identities(tables), identities(config_of())
    assert {kind for kind in base if other[kind] != base[kind]} == {"catalog"}


def test_vectors_from_elsewhere_count_by_content(tmp_path: Path) -> None:
    def adopted(name: str, seed: int, *more: str) -> str:
        path = tmp_path / name
        vectors = np.random.default_rng(seed).normal(size=(300, 8))
        ids = [str(n) for n in range(300)]
        pq.write_table(
            pa.table({"item_id": ids, "vector": vectors.tolist(), "sku": ids, "image": (vectors * 2).tolist()}), path
        )
        return tiger.pipeline.embed.adopt(
            config_of(f"embedding.import_path={path}", f"root={tmp_path}/runs", *more)
        ).fingerprint

    one = adopted("a.parquet", 1)
    assert adopted("renamed.parquet", 1) == one
    assert adopted("a.parquet", 2) != one
    assert adopted("a.parquet", 1, "embedding.prefix=x", "embedding.model=y", "embedding.max_tokens=9") == one  # unused
    for key in ("storage_dtype=float16", "vectors_id=sku", "vectors_column=image"):
        assert adopted("a.parquet", 1, f"embedding.{key}") != one


def test_joined_vectors_count_by_content_and_by_the_items_of_the_catalog(tmp_path: Path) -> None:
    items, events = write_items(tmp_path / "items.parquet"), write_events(tmp_path / "events.parquet", "a", 1)

    def joined(catalog: Artifact, seed: int, *more: str, count: int = 30) -> str:
        vectors = np.random.default_rng(seed).normal(size=(count, 8)).tolist()
        table = pa.table({"item_id": [f"i{n}" for n in range(count)], "vector": vectors, "other": vectors})
        pq.write_table(table, tmp_path / "v.parquet")
        return tiger.pipeline.embed.embed(
            config_of(f"embedding.import_path={tmp_path}/v.parquet", f"root={tmp_path}/runs", *more), catalog
        ).fingerprint

    catalog = prepare_files(tmp_path, [items], [events])
    one = joined(catalog, 1)
    assert joined(catalog, 1, "embedding.prefix=x", "embedding.model=y") == one  # unused
    assert len({one, joined(catalog, 2), joined(catalog, 1, "embedding.vectors_column=other")}) == 3
    write_items(items, shift=1)
    assert joined(prepare_files(tmp_path, [items], [events]), 1) != one


def test_histories_count_by_content_and_by_how_they_are_read(tmp_path: Path) -> None:
    items, own = write_items(tmp_path / "items.parquet"), write_events(tmp_path / "own.parquet", "o", 3)
    one, two = (write_events(tmp_path / f"{name}.parquet", name, seed) for name, seed in (("a", 1), ("b", 2)))

    def found(*histories: Path, more: tuple[str, ...] = ()) -> str:
        names = ", ".join(f'"{path}"' for path in histories)
        data = ["data.kind=tables", f'data.items=["{items}"]', f'data.interactions=["{own}"]', *more]
        run = load(RunConfig, None, [*data, f"recommend.histories=[{names}]"], CONFIGS)
        return identities(run)["recommendations"]

    first = found(one)
    assert len({first, found(two), found(one, two), found(two, one), found(one, more=("data.time_unit=ms",))}) == 5
    renamed = one.rename(tmp_path / "renamed.parquet")
    assert found(renamed) == first


def test_a_filter_counts_by_content(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("i1\ni2\n")
    (tmp_path / "b.txt").write_text("i1\ni3\n")
    none, a, b = (
        identities(config_of(*more))["recommendations"]
        for more in (
            [],
            [f"recommend.allowed_items_file={tmp_path}/a.txt"],
            [f"recommend.allowed_items_file={tmp_path}/b.txt"],
        )
    )
    assert len({none, a, b}) == 3
    (tmp_path / "renamed.txt").write_text("i2\ni1\n")
    assert identities(config_of(f"recommend.allowed_items_file={tmp_path}/renamed.txt"))["recommendations"] == a
