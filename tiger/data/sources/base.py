"""The contract of a data source, and code shared by all sources: row accounting, robust readers of lines and values.

A source is a module in this folder (or in any installed package, by its dotted name) with

    class Config(DatasetConfig)                         its settings
    locate(config, cache) -> Files                      raw files; downloads or generates them if needed
    read_items(config, files, ledger)                   -> record batches with `source_id` and any text fields
    read_interactions(config, files, ledger)            -> record batches of schema INTERACTIONS

and, so that large files are read by several processes, optionally

    parts(config, role, files, scans) -> [RawFile]      sections of the files of a table; reading them one after another
                                                        must yield the rows of reading all, see `readers/sections.py`
    quote(config, role) -> bytes                        quote character, whose use the scans of the files report
    item_types(config, files) -> {file: {field: type}}  if the fields of items may differ between files or sections
    read_items(config, files, ledger, fields, types)    the fields to read, and what `item_types` returned of all files

Readers count every row in `ledger` as kept, skipped or left out, and stream: no reader buffers more than a batch of
rows (except for JSON documents and properties in long format, which are read as a whole). `source_id` and all fields
are raw here; `catalog.py` cleans, filters and numbers them. Fields whose names are reserved for the catalog are renamed
by `field_name`; `catalog.text_fields` refers to them by their names in the file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from tiger.core.config import PluginConfig
from tiger.data.readers.lines import MAX_LINE_BYTES, lines, parse_record
from tiger.data.readers.meter import Meter, metered
from tiger.data.readers.raw_files import Files, RawFile, Role, expand, raw_file
from tiger.data.readers.row_counts import InvalidRow, RowCounts
from tiger.data.readers.times import unix_micros
from tiger.data.readers.values import identifier

__all__ = [
    "INTERACTIONS",
    "MAX_LINE_BYTES",
    "DatasetConfig",
    "Files",
    "InvalidRow",
    "Meter",
    "RawFile",
    "Role",
    "RowCounts",
    "batches",
    "expand",
    "field_name",
    "identifier",
    "lines",
    "log_files",
    "metered",
    "parse_record",
    "raw_file",
    "unix_micros",
]

log = logging.getLogger(__name__)

INTERACTIONS = pa.schema([("user", pa.string()), ("item", pa.string()), ("time", pa.int64())])
"""One event per row: original ids of user and item, time in microseconds since 1970."""

BATCH_ROWS = 8192
RESERVED = frozenset({"item_id", "source_id", "text"})
"""Columns that the catalog adds."""


class DatasetConfig(PluginConfig):
    """Options of every source."""

    plugin_package: ClassVar[str] = "tiger.data.sources"
    default_kind: ClassVar[str] = "synthetic"

    kind: str = Field("synthetic", description="source of raw data: synthetic, amazon, tables, or a dotted module name")
    max_bad_row_fraction: float = Field(0.01, ge=0, le=1, description="maximum fraction of unreadable rows")

    unfingerprinted = frozenset({"max_bad_row_fraction"})  # a limit that does not affect the stage's output


def field_name(name: str) -> str:
    """Return the column name of a raw field: `field_text` for the reserved `text`, most others unchanged.

    The mapping is injective: `field_text` itself becomes `field_field_text`.
    """
    bare = name
    while bare.startswith("field_"):
        bare = bare.removeprefix("field_")
    return f"field_{name}" if bare in RESERVED else name


def batches(rows: Iterator[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Pack rows of plain Python values into record batches of `schema`."""
    buffer: list[dict[str, Any]] = []
    for row in rows:
        buffer.append(row)
        if len(buffer) == BATCH_ROWS:
            yield pa.RecordBatch.from_pylist(buffer, schema=schema)
            buffer = []
    if buffer:
        yield pa.RecordBatch.from_pylist(buffer, schema=schema)


def log_files(files: Files) -> Files:
    """Log the files to read, with their sizes; return them."""
    for role, file in files.roles():
        log.info("%s: %s (%s bytes)", role, file, f"{file.size():,}")
    return files
