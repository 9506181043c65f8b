"""Rows of new and updated items, with the columns of the published ones."""

from __future__ import annotations

import pyarrow as pa
import pytest

from tiger.core.errors import DataError
from tiger.data.catalog import CatalogConfig
from tiger.data.grown_catalog import MergedItems, merge_items

PUBLISHED = pa.table(
    {
        "item_id": pa.array([0, 1], pa.int32()),
        "source_id": ["a", "b"],
        "text": ["Comb. Hair > Combs. $2.00", "Soap"],
        "title": ["Comb", "Soap"],
        "categories": pa.array([[["Hair", "Combs"]], None], pa.list_(pa.list_(pa.string()))),
        "price": [2.0, None],
        "category_leaf": ["Combs", None],
    }
)
CONFIG = CatalogConfig.model_validate({"text_fields": ["title", "categories", "price"]})


def merged(rows: list[dict[str, object]], schema: pa.Schema | None = None) -> MergedItems:
    return merge_items(PUBLISHED, [pa.RecordBatch.from_pylist(rows, schema=schema)], CONFIG)


def test_a_text_table_becomes_what_the_catalog_has() -> None:
    """Of a CSV file: numbers and lists are text."""
    found = merged(
        [{"source_id": "c", "title": " Brush &amp; Co ", "categories": "Hair", "price": "3.5", "color": "red"}]
    )
    assert (found.new, found.updated, found.duplicates, found.ignored) == (1, 0, 0, ["color"])
    assert found.items.schema == PUBLISHED.schema
    assert found.items.slice(0, 2).equals(PUBLISHED)
    assert found.items.slice(2).to_pylist() == [
        {"item_id": 2, "source_id": "c", "text": "Brush & Co. Hair. $3.50", "title": "Brush & Co",
         "categories": [["Hair"]], "price": 3.5, "category_leaf": "Hair"}
    ]  # fmt: skip


def test_updates_stay_in_place_and_new_items_come_behind_in_the_order_of_their_ids() -> None:
    rows = [
        {"source_id": "z", "title": "Z", "categories": None, "price": None},
        {"source_id": "b", "title": "Soap bar", "categories": None, "price": "1"},
        {"source_id": "c", "title": "C", "categories": "X", "price": "1"},
        {"source_id": "c", "title": "C", "categories": None, "price": None},
    ]
    found = merged(rows)
    assert (found.new, found.updates.tolist(), found.duplicates) == (2, [1], 1)
    assert found.items["source_id"].to_pylist() == ["a", "b", "c", "z"]
    assert found.items["item_id"].to_pylist() == [0, 1, 2, 3]
    assert found.items["text"].to_pylist()[1:] == ["Soap bar. $1.00", "C. X. $1.00", "Z"]
    assert found.items["categories"].to_pylist()[1:] == [None, [["X"]], None]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(DataError, match=r"the column price has type string, that of the catalog double"):
        merged([{"source_id": "c", "title": "C", "categories": None, "price": "cheap"}])
    with pytest.raises(DataError, match=r"text_fields contains categories"):
        merged([{"source_id": "c", "title": "C", "price": "1"}])


def test_no_rows_change_nothing() -> None:
    assert merge_items(PUBLISHED, [], CONFIG).items.equals(PUBLISHED)
