"""Conversion of items in long format (one property per row) to one row per item."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiger.core.errors import DataError
from tiger.data.readers.raw_files import RawFile
from tiger.data.readers.row_counts import RowCounts, listed
from tiger.data.readers.table import Block
from tiger.data.readers.times import TimeRule, column_micros, explain, why_not
from tiger.data.readers.values import as_field, id_texts, plain
from tiger.data.sources.base import field_name

MOST_PROPERTIES = 256
BATCH_ROWS = 8192


def pivot(
    source: Iterator[tuple[RawFile, Block]],
    item_id: str,
    name: str,
    value: str,
    properties: list[str],
    rule: TimeRule,
    ledger: RowCounts,
) -> Iterator[pa.RecordBatch]:
    """Yield one row per item and one column per property, both in order of first appearance.

    Of several values of one property, the latest is kept if the table has the column of times, else the last one. A
    missing time is older than any other; a row whose time cannot be read is skipped.

    Args:
        source: blocks of rows with their files.
        item_id: name of the column of item ids.
        name: name of the column of property names.
        value: name of the column of property values.
        properties: properties to keep; all, if empty.
        rule: name of the column of times, and how to parse it.
        ledger: counts of kept and skipped rows.

    Raises:
        DataError: there are more than `MOST_PROPERTIES` properties, or one of `properties` does not occur.
    """
    wanted = set(properties)
    found: dict[str, None] = {}
    items: dict[str, dict[str, tuple[int, str]]] = {}
    for file, block in source:
        ids = id_texts(block.rows.column(item_id)).to_pylist()
        names = id_texts(block.rows.column(name)).to_pylist()
        values = as_field(block.rows.column(value), pa.string()).to_pylist()
        times, invalid = _times(block, rule)
        for index, (number, item, key, text, time) in enumerate(
            zip(block.numbers.tolist(), ids, names, values, times.tolist(), strict=True)
        ):
            if index in invalid:
                reason = why_not(invalid[index], rule)
                ledger.skip(file, number, reason, "" if ledger.skipped[reason] else explain(invalid[index], rule))
                continue
            if item is None or key is None:
                ledger.skip(file, number, f"no {item_id if item is None else name}")
                continue
            ledger.keep()
            row = items.setdefault(item, {})
            if wanted and key not in wanted:
                continue
            if key not in found:
                found[key] = None
                if len(found) > MOST_PROPERTIES:
                    raise DataError(
                        f"{file}: column {name} has more than {MOST_PROPERTIES} properties, such as {listed(found)}; "
                        "list those to keep in data.properties"
                    )
            if text is not None and (key not in row or time >= row[key][0]):
                row[key] = (time, text)
    missing = [each for each in properties if each not in found]
    if missing:
        raise DataError(f"data.properties contains {listed(missing)}; column {name} has no such value")
    yield from _batches(items, list(found))


def _times(block: Block, rule: TimeRule) -> tuple[npt.NDArray[np.int64], dict[int, Any]]:
    """Return the time of every row (0 without a column of times, a missing one is the oldest), and invalid values."""
    if rule.name not in block.rows.schema.names:
        return np.zeros(block.rows.num_rows, np.int64), {}
    column = plain(block.rows.column(rule.name))
    micros, good = column_micros(column, rule)
    missing = np.asarray(column.is_null())
    invalid = {row: column[row].as_py() for row in np.flatnonzero(~good & ~missing).tolist()}
    return np.where(good, micros, -(1 << 62)), invalid


def _batches(items: dict[str, dict[str, tuple[int, str]]], found: list[str]) -> Iterator[pa.RecordBatch]:
    schema = pa.schema([("source_id", pa.string()), *((field_name(each), pa.string()) for each in found)])
    names = list(items)
    for begin in range(0, len(names), BATCH_ROWS):
        part = names[begin : begin + BATCH_ROWS]
        texts = ([items[item].get(each, (0, None))[1] for item in part] for each in found)
        columns = [pa.array(part, pa.string()), *(pa.array(each, pa.string()) for each in texts)]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
