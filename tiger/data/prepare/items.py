"""Items: raw rows -> one row per item, sorted by id, with one text each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tiger.core.errors import DataError
from tiger.core.external_sort import KeyRange, Run, TableStore, read_range, write_run
from tiger.data.prepare.raw import RawData
from tiger.data.profile import ColumnCounts, Quantiles, count_columns
from tiger.data.readers.merge import PIECE, clean_batches, fullest_rows, take_rows, texts_array
from tiger.data.readers.row_counts import RowCounts, listed
from tiger.data.sources.base import field_name
from tiger.data.texts import field_text

KEY = "source_id"
SHOWN = ("title", "categories", "category", "category_leaf", "price")
"""Fields that are kept in addition to those of the text, if the items have them: for lists of items and for reports."""

_GROUP_BYTES = 1 << 20


@dataclass(frozen=True)
class ItemRuns:
    """Runs of one part of the raw items.

    Attributes:
        runs: sorted by item id.
        schema: of all of them together; None without rows.
        columns: all columns of the rows, also those that are not kept.
        counts: of the rows.
        rows: number of rows in the runs.
    """

    runs: list[Run]
    schema: pa.Schema | None
    columns: list[str]
    counts: RowCounts
    rows: int


def read_item_runs(
    raw: RawData, part: int, text_fields: tuple[str, ...], store: TableStore, run_bytes: int
) -> ItemRuns:
    """Read and clean a part of the items, and write it as runs of about `run_bytes` bytes.

    Raises:
        DataError: see the reader; or a batch has no column `source_id`.
    """
    batches, counts = raw.read("items", part, (*text_fields, *SHOWN))
    columns: dict[str, None] = {}
    schema: pa.Schema | None = None
    runs: list[Run] = []
    rows = 0
    for number, tables in enumerate(_chunked(clean_batches(batches, (*text_fields, *SHOWN), columns), run_bytes)):
        table = join_by_name(tables)
        schema = table.schema if schema is None else common_schema([schema, table.schema])
        table = take_rows(table, np.asarray(pc.sort_indices(table[KEY])))
        group = max(1, len(table) * _GROUP_BYTES // max(table.nbytes, 1))
        name = f"items-{part:05d}-{number:04d}"
        runs.append(write_run(store, name, table, KEY, group, table.nbytes / len(table)))
        rows += len(table)
    return ItemRuns(runs, schema, list(columns), counts, rows)


def _chunked(tables: Iterator[pa.Table], size: int) -> Iterator[list[pa.Table]]:
    pending, held = [], 0
    for table in tables:
        if not len(table):
            continue
        pending.append(table)
        held += table.nbytes
        if held >= size:
            yield pending
            pending, held = [], 0
    if pending:
        yield pending


def common_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Return the schema that tables with these schemas have together.

    Raises:
        DataError: the types of a column do not match.
    """
    try:
        return pa.unify_schemas(list(schemas), promote_options="permissive")
    except pa.ArrowException as error:
        raise _incompatible(error) from None


def join_by_name(tables: Sequence[pa.Table]) -> pa.Table:
    """Concatenate tables by column name; missing columns are null, types are widened.

    Raises:
        DataError: the types of a column do not match.
    """
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise _incompatible(error) from None


def _incompatible(error: Exception) -> DataError:
    reason = str(error).partition("\n")[0]
    return DataError(f"the item files have incompatible columns: {reason[:300]}")


def merge_item_range(
    store: TableStore, runs: Sequence[Run], schema: pa.Schema, keys: KeyRange, part: int
) -> tuple[int, int]:
    """Write the items of one range of ids, one row each; return the number of items, and of duplicate rows."""
    tables = [table for _, table in read_range(store, runs, keys, KEY)]
    table = join_by_name([schema.empty_table(), *tables])
    kept = fullest_rows(table) if len(table) else table
    store.write(_items_name(part), kept)
    return len(kept), len(table) - len(kept)


def read_item_ids(store: TableStore, parts: int) -> pa.ChunkedArray:
    """Return the ids of all items in ascending order, as large strings; the position of one is its number."""
    columns = [store.read(_items_name(part), [KEY])[KEY].cast(pa.large_string()) for part in range(parts)]
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.large_string())


def find_text_columns(text_fields: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Find the columns of text fields, which are named as in the raw files.

    Raises:
        DataError: there is no such field.
    """
    found = [next((each for each in (field_name(name), name) if each in columns), None) for name in text_fields]
    missing = [name for name, column in zip(text_fields, found, strict=True) if column is None]
    if missing:
        raise DataError(f"catalog.text_fields contains {listed(missing)}; the items have {listed(columns)}")
    return [column for column in found if column is not None]


def finish_items(
    store: TableStore, part: int, kept: npt.NDArray[np.bool_], first_item: int, text_columns: Sequence[str]
) -> tuple[ColumnCounts, Quantiles]:
    """Write the rows of items.parquet of one range; return the counts of their columns, and the lengths of the texts.

    Args:
        store: holds the items of the range.
        part: number of the range.
        kept: the items of the range that are part of the catalog, bool [n].
        first_item: item id of the first of them.
        text_columns: columns of the text, in order.
    """
    items = take_rows(store.read(_items_name(part)), np.flatnonzero(kept))
    table = add_texts(items, text_columns, first_item)
    store.write(f"catalog-{part:05d}", table)
    characters = Quantiles.of(np.asarray(pc.utf8_length(table["text"]), np.int64))
    return count_columns(table), characters


def finished_items(store: TableStore, parts: int) -> Iterator[pa.Table]:
    """Yield the rows of items.parquet, range by range."""
    for part in range(parts):
        yield store.read(f"catalog-{part:05d}")


def _items_name(part: int) -> str:
    return f"unique-{part:05d}"


# --- texts --------------------------------------------------------------------------------------------------------


def add_texts(items: pa.Table, text_columns: Sequence[str], first_item: int = 0) -> pa.Table:
    """Add item_id, text, and category_leaf (the last name of an item's first category path)."""
    has_leaf = "categories" in items.column_names and "category_leaf" not in items.column_names
    texts: list[pa.Array] = []
    leaves: list[pa.Array] = []
    for begin in range(0, items.num_rows, PIECE):
        piece = items.slice(begin, PIECE)
        fields = [piece[name].to_pylist() for name in text_columns]
        joined = [
            ". ".join(filter(None, map(field_text, text_columns, values))) for values in zip(*fields, strict=True)
        ]
        texts += texts_array(joined)
        if has_leaf:
            leaves += texts_array([_leaf_category(value) for value in piece["categories"].to_pylist()])
    numbers = np.arange(first_item, first_item + len(items), dtype=np.int32)
    table = items.add_column(0, "item_id", pa.array(numbers))
    table = table.add_column(2, "text", pa.chunked_array(texts, pa.string()))
    return table.append_column("category_leaf", pa.chunked_array(leaves, pa.string())) if has_leaf else table


def _leaf_category(value: Any) -> str | None:
    while isinstance(value, list) and value:
        value = value[0] if isinstance(value[0], list) else value[-1]
    return value if isinstance(value, str) else None
