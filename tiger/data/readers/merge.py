"""Cleaning and deduplication of raw item rows: HTML entities are resolved, and one row per item is kept."""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tiger.core.errors import DataError
from tiger.data.readers.row_counts import listed
from tiger.data.sources.base import field_name

PIECE = 1 << 13
"""Rows that are converted to Python objects at a time."""

ONE_CHUNK = 1 << 30
"""Bytes of a table up to which Arrow may put a column into one chunk; a chunk of text is limited to 2 GiB."""


def clean_batches(
    batches: Iterable[pa.RecordBatch], fields: Collection[str], columns: dict[str, None] | None = None
) -> Iterator[pa.Table]:
    """Keep the ids and some fields, and clean the values of these.

    Args:
        batches: raw rows.
        fields: names of the fields to keep, in the raw files or as columns.
        columns: filled with the names of all columns, in the order in which they appear; but columns of numeric lists
            or binary data are only listed if they are kept.

    Raises:
        DataError: there is no column `source_id`.
    """
    columns = {} if columns is None else columns
    for batch in batches:
        kept: dict[str, pa.Array] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            safe = name if name == "source_id" or name.startswith("field_") else field_name(name)
            if name == "source_id":
                kept[name] = column
            elif is_field(name, safe, fields):
                kept[safe] = pa.array([_clean(value) for value in column.to_pylist()], column.type)
            elif _is_bulk(column.type):
                continue
            columns[safe] = None
        if "source_id" not in kept:
            raise DataError(f"the items have no source_id, only {listed(batch.schema.names)}")
        yield pa.table(kept)


def is_field(name: str, column: str, fields: Collection[str]) -> bool:
    """Return whether `fields` contains a field by its name in the raw files or by its column."""
    return name in fields or column in fields or column in map(field_name, fields)


def _is_bulk(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return bool(pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _clean(value: Any) -> Any:
    """Unescape HTML entities (twice: some shops escape twice), normalize to NFC, collapse white space."""
    if isinstance(value, str):
        text = html.unescape(html.unescape(value)) if "&" in value else value
        return " ".join(unicodedata.normalize("NFC", text).split()) or None
    if isinstance(value, list):
        return [cleaned for cleaned in map(_clean, value) if cleaned not in (None, [])]
    return value


def fullest_rows(table: pa.Table) -> pa.Table:
    """Keep one row per item (rule 1 of the catalog), in the order of the source ids."""
    coded = pc.cast(table["source_id"], pa.large_string()).combine_chunks().dictionary_encode()
    codes, names = np.asarray(coded.indices), coded.dictionary
    first = np.full(len(names), -1, np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    chosen = first
    if len(codes) > len(names):
        is_duplicate = np.bincount(codes, minlength=len(names))[codes] > 1
        rows = np.flatnonzero(is_duplicate)
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
    return take_rows(table, chosen[np.asarray(pc.sort_indices(names))])


def take_rows(table: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
    """Select rows; in a large table column by column and in pieces, because a chunk of text is limited to 2 GiB."""
    if table.nbytes <= ONE_CHUNK:
        return table.take(pa.array(rows))
    columns = []
    for name in table.column_names:
        kind = table[name].type
        column = pc.cast(table[name], _large(kind)).combine_chunks()  # `take` joins the chunks for every piece
        step = max(1, min(PIECE, ONE_CHUNK * len(column) // max(2 * column.nbytes, 1)))
        chunks: list[pa.Array] = []
        for begin in range(0, len(rows), step):
            chunks += _take(column, rows[begin : begin + step], kind)
        columns.append(pa.chunked_array(chunks, kind))
        del column
    return pa.table(columns, names=table.column_names)


def _take(column: pa.Array, rows: npt.NDArray[np.int64], kind: pa.DataType) -> list[pa.Array]:
    """Select rows of a column with 64-bit offsets as a type with 32-bit offsets, in as many chunks as needed."""
    taken = column.take(pa.array(rows))
    if taken.nbytes <= ONE_CHUNK or len(rows) < 2:
        return [pc.cast(taken, kind)]
    del taken  # not sliced, because a slice keeps its 64-bit offsets into the whole
    half = len(rows) // 2
    return _take(column, rows[:half], kind) + _take(column, rows[half:], kind)


def _large(kind: pa.DataType) -> pa.DataType:
    """Return the type with 64-bit offsets that holds the same values."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_binary(kind):
        return pa.large_binary()
    return pa.large_list(_large(kind.value_type)) if pa.types.is_list(kind) else kind


def texts_array(values: Sequence[str | None]) -> list[pa.Array]:
    """Return texts as a column of strings, in more than one chunk if they have more than 2 GiB."""
    made = pa.array(values, pa.string())
    return made.chunks if isinstance(made, pa.ChunkedArray) else [made]


def _completeness(row: dict[str, Any]) -> tuple[int, str]:
    filled = sum(value not in (None, "", []) for value in row.values())
    return -filled, json.dumps(row, sort_keys=True, default=str)
