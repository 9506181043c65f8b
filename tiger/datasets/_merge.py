"""Raw item rows of any source -> clean rows, one per item: values without markup, of several rows the fullest one."""

from __future__ import annotations

import html
import json
import logging
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tiger.datasets import field_name
from tiger.datasets._ledger import listed
from tiger.errors import DataError

log = logging.getLogger(__name__)

PIECE = 1 << 16
"""Rows that are Python objects at a time."""


def clean_batches(batches: Iterable[pa.RecordBatch], text_fields: list[str]) -> Iterator[pa.Table]:
    """Clean all values but ids; leave out vectors, images and the like that are not asked for."""
    for batch in batches:
        columns: dict[str, pa.Array] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if name == "source_id":
                columns[name] = column
            elif name in text_fields or not _is_bulk(column.type):
                safe = name if name.startswith("field_") else field_name(name)
                columns[safe] = pa.array([_clean(value) for value in column.to_pylist()], column.type)
        if "source_id" not in columns:
            raise DataError(f"the items have no source_id, only {listed(batch.schema.names)}")
        yield pa.table(columns)


def _is_bulk(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _clean(value: Any) -> Any:
    """Undo HTML entities (twice: some shops escape twice), normalize to NFC, join runs of white space."""
    if isinstance(value, str):
        text = html.unescape(html.unescape(value)) if "&" in value else value
        return " ".join(unicodedata.normalize("NFC", text).split()) or None
    if isinstance(value, list):
        return [cleaned for cleaned in map(_clean, value) if cleaned not in (None, [])]
    return value


def one_row_per_item(tables: Iterable[pa.Table]) -> tuple[pa.Table, int]:
    """Return the rows in the order of their source ids, and how many were dropped (rule 1 of the catalog)."""
    parts = [part for part in tables if part.num_rows]
    if not parts:
        raise DataError("there are no items")
    try:
        table = pa.concat_tables(parts, promote_options="permissive")
    except pa.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"the item files do not fit together: {reason[:300]}") from None
    del parts
    coded = table["source_id"].combine_chunks().dictionary_encode()
    codes, names = np.asarray(coded.indices), coded.dictionary
    first = np.full(len(names), -1, np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    chosen = first
    duplicates = len(codes) - len(names)
    if duplicates:
        again = np.bincount(codes, minlength=len(names))[codes] > 1
        rows = np.flatnonzero(again)
        best: dict[int, tuple[tuple[int, str], int]] = {}
        for begin in range(0, len(rows), PIECE):
            piece = rows[begin : begin + PIECE]
            for row, values in zip(piece.tolist(), take_rows(table, piece).to_pylist(), strict=True):
                rival = best.get(codes[row])
                key = _completeness(values)
                if rival is None or key < rival[0]:
                    best[codes[row]] = key, row
        for code, (_, row) in best.items():
            chosen[code] = row
        if duplicates > len(codes) / 4:
            log.warning(
                "%s of %s item rows are further rows of an item, of which one is kept; if each row is one property of "
                "an item, set data.property and data.value",
                f"{duplicates:,}",
                f"{len(codes):,}",
            )
    return take_rows(table, chosen[np.asarray(pc.sort_indices(names))]), duplicates


def take_rows(table: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
    """Take rows, in pieces: a string column has room for 2 GiB in one piece."""
    if table.nbytes > 1 << 30:
        schema = table.schema
        large = [pa.large_string() if pa.types.is_string(each.type) else each.type for each in schema]
        table = table.cast(pa.schema([pa.field(f.name, kind) for f, kind in zip(schema, large, strict=True)]))
        pieces = [table.take(rows[begin : begin + PIECE]).cast(schema) for begin in range(0, len(rows), PIECE)]
        return pa.concat_tables(pieces)
    return table.take(pa.array(rows))


def _completeness(row: dict[str, Any]) -> tuple[int, str]:
    filled = sum(value not in (None, "", []) for value in row.values())
    return -filled, json.dumps(row, sort_keys=True, default=str)
