"""Your own Parquet, CSV or JSON lines: one or more item files and interaction files, columns named in the config.

All columns of the item files are kept as text fields under their own names, so that `catalog.text_fields` can list any
of them. Files of one table must have the same columns. CSV columns are read as text; JSON lines' lists become lists of
text and their nested objects lists of "key: value".
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
from pydantic import Field

from tiger.datasets import (
    BATCH_ROWS,
    INTERACTIONS,
    BadRow,
    DatasetConfig,
    Files,
    Ledger,
    batches,
    existing,
    lines,
    parse_record,
    seconds,
)
from tiger.download import download
from tiger.errors import DataError

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


class Config(DatasetConfig):
    """Files and the names of their columns."""

    kind: str = Field("tables", description="source of raw data: synthetic, amazon, tables, or a dotted module name")
    items: list[str] = Field(min_length=1, description="item files or URLs: .parquet, .csv, .jsonl (also .gz)")
    interactions: list[str] = Field(min_length=1, description="interaction files or URLs, same formats")
    item_id: str = Field("item_id", description="column of the item's name, in both tables")
    user_id: str = Field("user_id", description="column of the user's name, in the interaction table")
    time: str = Field("timestamp", description="column of the time: a number, a Parquet timestamp, or ISO 8601 text")
    time_unit: Literal["s", "ms", "us", "ns"] = Field("s", description="unit of a numeric time, counted from 1970")

    unfingerprinted = frozenset({"items", "interactions"})  # their contents count, not where they lie


def locate(config: Config, cache: Path) -> Files:
    """Finds or downloads the files.

    Raises:
        DataError: a file does not exist, or its suffix is not one of the formats.
    """
    return Files(
        [_local(name, "data.items") for name in config.items],
        [_local(name, "data.interactions") for name in config.interactions],
    )


def _local(name: str, key: str) -> Path:
    path = download(name) if name.startswith(("http://", "https://")) else Path(name).expanduser()
    existing(path, f"correct {key}")
    _format(path)
    return path


def _format(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    formats = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl"}
    if not suffixes or suffixes[-1] not in formats:
        raise DataError(f"{path}: the name must end in .parquet, .csv, .jsonl or .json, the last three also with .gz")
    return formats[suffixes[-1]]


def read_items(config: Config, files: Files, ledger: Ledger) -> Iterator[pa.RecordBatch]:
    """Item rows: `source_id` and every other column of the files, in file order."""
    for path in files.items:
        for first_row, raw in _read(path, [config.item_id], ledger):
            names = pc.utf8_trim_whitespace(_as_text(raw.column(config.item_id)))
            good = _usable(names)
            _skip(ledger, path, first_row, good, f"no {config.item_id}")
            columns = {"source_id": names} | {
                name: raw.column(name) for name in raw.schema.names if name != config.item_id
            }
            yield pa.RecordBatch.from_pydict(columns).filter(good)


def read_interactions(config: Config, files: Files, ledger: Ledger) -> Iterator[pa.RecordBatch]:
    """Interactions with schema INTERACTIONS, in file order."""
    for path in files.interactions:
        for first_row, raw in _read(path, [config.user_id, config.item_id, config.time], ledger):
            user = pc.utf8_trim_whitespace(_as_text(raw.column(config.user_id)))
            item = pc.utf8_trim_whitespace(_as_text(raw.column(config.item_id)))
            time = _time(raw.column(config.time), _PER_SECOND[config.time_unit])
            named = pc.and_(_usable(user), _usable(item))
            good = pc.and_(named, time.is_valid())
            _skip(ledger, path, first_row, named, f"no {config.user_id} or {config.item_id}", count_good=False)
            reason = f"{config.time} is missing, not a time, or outside the years 1990 to 2100"
            _skip(ledger, path, first_row, pc.or_(good, pc.invert(named)), reason, count_good=False)
            ledger.keep(pc.sum(good).as_py() or 0)
            yield pa.RecordBatch.from_arrays([user, item, time], schema=INTERACTIONS).filter(good)


def _usable(names: pa.Array) -> pa.Array:
    return pc.fill_null(pc.greater(pc.utf8_length(names), 0), False)


def _skip(ledger: Ledger, path: Path, first_row: int, good: pa.Array, reason: str, count_good: bool = True) -> None:
    mask = np.asarray(good)
    for index in np.flatnonzero(~mask):
        ledger.skip(path, first_row + int(index), reason)
    if count_good:
        ledger.keep(int(mask.sum()))


def _as_text(column: pa.Array) -> pa.Array:
    if pa.types.is_floating(column.type):  # an integer column with gaps, as pandas writes it: 17.0 is item "17"
        whole = pc.fill_null(pc.all(pc.equal(column, pc.floor(column))), True).as_py()
        column = pc.cast(column, pa.int64()) if whole else column
    return pc.cast(column, pa.string())


def _time(column: pa.Array, per_second: int) -> pa.Array:
    """Seconds since 1970; null where a value is no time within the years 1990 to 2100."""
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        column, per_second = pc.cast(pc.cast(column, pa.timestamp("us")), pa.int64()), 1_000_000
    values: list[int | None] = []
    for value in column.to_pylist():
        try:
            values.append(seconds(value, per_second))
        except BadRow:
            values.append(_iso_seconds(value))
    return pa.array(values, pa.int64())


def _iso_seconds(value: Any) -> int | None:
    try:
        moment = datetime.datetime.fromisoformat(value)
        return seconds(moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp(), per_second=1)
    except (TypeError, ValueError, BadRow):
        return None


def _read(path: Path, needed: list[str], ledger: Ledger) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields (number of the first row, rows); checks that the needed columns are there."""
    reader = {"parquet": _read_parquet, "csv": _read_csv, "jsonl": _read_jsonl}[_format(path)]
    number = 1
    for raw in reader(path, ledger):
        missing = [name for name in needed if name not in raw.schema.names]
        if missing:
            raise DataError(
                f"{path}: no column {', '.join(missing)}; columns found: {', '.join(raw.schema.names)}. "
                "Name yours with data.item_id, data.user_id and data.time"
            )
        yield number, raw
        number += raw.num_rows


def _read_parquet(path: Path, ledger: Ledger) -> Iterator[pa.RecordBatch]:
    try:
        yield from pq.ParquetFile(path).iter_batches(BATCH_ROWS)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _read_csv(path: Path, ledger: Ledger) -> Iterator[pa.RecordBatch]:
    header = next(lines(path), (0, b""))[1] or b""
    names = pcsv.read_csv(pa.BufferReader(header + b"\n")).schema.names if header else []

    def invalid(row: pcsv.InvalidRow) -> str:
        ledger.skip(path, row.number or 0, f"{row.actual_columns} columns where {row.expected_columns} are named")
        return "skip"

    try:
        with pcsv.open_csv(
            path,
            read_options=pcsv.ReadOptions(use_threads=False),
            parse_options=pcsv.ParseOptions(newlines_in_values=True, invalid_row_handler=invalid),
            convert_options=pcsv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True
            ),
        ) as reader:
            yield from reader
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable CSV file: {error}") from None


def _read_jsonl(path: Path, ledger: Ledger) -> Iterator[pa.RecordBatch]:
    """Two passes: the first finds the columns and which of them hold lists, the second reads."""
    is_list: dict[str, bool] = {}
    for _, line in lines(path):
        try:
            for name, value in parse_record(line).items():
                is_list[str(name)] = is_list.get(str(name), False) or isinstance(value, (list, dict))
        except BadRow:
            continue  # counted in the second pass
    schema = pa.schema([(name, pa.list_(pa.string()) if many else pa.string()) for name, many in is_list.items()])

    def rows() -> Iterator[dict[str, Any]]:
        for number, line in lines(path):
            try:
                record = parse_record(line)
            except BadRow as reason:
                ledger.skip(path, number, str(reason))
                continue
            yield {name: _flatten(record.get(name), many) for name, many in is_list.items()}

    return batches(rows(), schema)


def _flatten(value: Any, as_list: bool) -> Any:
    if value is None:
        return None
    if isinstance(value, dict):
        return [f"{key}: {inner}" for key, inner in value.items() if inner is not None]
    if isinstance(value, list):
        return [str(inner) for inner in value if inner is not None]
    return [str(value)] if as_list else str(value)
