"""User-provided files: Parquet, CSV and other text tables, JSON lines or JSON documents, with configurable columns.

`catalog.text_fields` can list any column of the item files by its name in the file. Files of one table are concatenated
by column name: order may differ, missing columns are null, types are widened. Ids and times are read by the same
rules in all formats (`values.py`, `times.py` in `tiger/data/readers`). Text tables contain text: only an empty field is
missing. Lists become lists of text, nested objects lists of `key: value`.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator, Field, field_validator, model_validator

from tiger.core.errors import DataError
from tiger.data.readers.delimited import DelimitedTable
from tiger.data.readers.filters import Filter
from tiger.data.readers.formats import find_format
from tiger.data.readers.interactions import EventReader, ids_of, one_line, skip_rows
from tiger.data.readers.json_table import JsonTable
from tiger.data.readers.merge import is_field
from tiger.data.readers.meter import paused_meter
from tiger.data.readers.parquet import ParquetTable
from tiger.data.readers.pivot import pivot
from tiger.data.readers.sections import Scan, parquet_sections, text_sections
from tiger.data.readers.table import Block, Wanted
from tiger.data.readers.times import TimeRule
from tiger.data.readers.values import as_field, widen
from tiger.data.sources.base import (
    DatasetConfig,
    Files,
    RawFile,
    Role,
    RowCounts,
    expand,
    field_name,
    log_files,
    raw_file,
)

log = logging.getLogger(__name__)

Types = Mapping[str, pa.DataType]
FileTypes = Mapping[str, Types]
_FORMATS = Literal["parquet", "csv", "json"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Config(DatasetConfig):
    """Files and the names of their columns.

    `separator`, `quote`, `encoding`, `format` and `columns` are one value for both tables, or one value per table:
    `separator = {items = ",", interactions = "::"}`.
    """

    kind: str = Field("tables", description="source of raw data: synthetic, amazon, tables, or a dotted module name")
    items: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        min_length=1, description="item files: paths, folders, globs, URLs, s3:// or gs:// URIs; plain or gzip"
    )
    interactions: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        min_length=1, description="interaction files, as for items"
    )
    item_id: str = Field("item_id", description="column of the item's id, in both tables")
    items_id: str | None = Field(None, description="column of the item's id among the items, if it has another name")
    user_id: str = Field("user_id", description="column of the user's id, in the interaction table")
    time: str = Field("timestamp", description="column of the time: a number, a timestamp, or text; '': file order")
    time_unit: Literal["s", "ms", "us", "ns", "order"] = Field(
        "s", description="unit of a numeric time since 1970; order: a number without a unit, only for sorting"
    )
    time_format: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        [], description="strptime formats of a time as text; none: ISO 8601"
    )
    years: tuple[int, int] = Field((1990, 2100), description="valid years: the first one, and the one after the last")
    history: str | list[str] | None = Field(
        None,
        description="column with a user's items in time order: a list, or ids separated by white space; several "
        "columns are concatenated",
    )
    history_separator: str | None = Field(None, description="separator of the ids in a history; none: white space")
    history_pattern: str | None = Field(
        None,
        description="regular expression for the entries of a history, whose first group is the id: '(.+)-1'; other "
        "entries are left out; none: each entry is an id",
    )
    filters: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        [],
        description='conditions on interactions, all of which must hold: rating >= 4, event = "buy", event in ["buy"]',
    )
    property: str | None = Field(None, description="items in long format: column of the property's name")
    value: str | None = Field(None, description="items in long format: column of the property's value")
    properties: list[str] = Field([], description="items in long format: properties to keep; none: all")
    format: _FORMATS | dict[Role, _FORMATS] | None = Field(
        None, description="parquet, csv (any text table) or json (lines or a document); none: detected from the file"
    )
    separator: str | dict[Role, str] | None = Field(
        None, description="column separator of text tables; none: detected from the header"
    )
    quote: str | dict[Role, str] = Field('"', description="quote character of text tables; '': none")
    encoding: str | dict[Role, str] = Field("utf-8", description="encoding of text files without a byte order mark")
    columns: list[str] | dict[Role, list[str]] = Field(
        [], description="column names of text tables without a header line"
    )

    # file contents are fingerprinted, not their location
    unfingerprinted = DatasetConfig.unfingerprinted | {"items", "interactions"}

    @field_validator("filters")
    @classmethod
    def _filters(cls, value: list[str]) -> list[str]:
        for text in value:
            Filter.parse(text)
        return value

    @field_validator("history_pattern")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        try:
            groups = re.compile(value).groups if value is not None else 1
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from None
        if not groups:
            raise ValueError(f"{value!r} has no group in parentheses, which is the item's id")
        return value

    @field_validator("encoding", "separator", "quote")
    @classmethod
    def _text_options(cls, value: Any, info: Any) -> Any:
        for each in value.values() if isinstance(value, dict) else [value]:
            if info.field_name == "encoding":
                try:
                    "".encode(each)
                except (LookupError, UnicodeError):
                    raise ValueError(
                        f"{each!r} is not a known encoding, such as utf-8, latin-1, cp1252 or utf-16"
                    ) from None
            elif info.field_name == "separator" and each is not None and (not each or "\n" in each or "\r" in each):
                raise ValueError("a separator must be one or more characters without line breaks")
            elif info.field_name == "quote" and (len(each.encode()) > 1 or each in ("\n", "\r")):
                raise ValueError("a quote must be one ASCII character, or '' for none")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if (self.property is None) != (self.value is None):
            raise ValueError("property and value must both be set: columns of a property's name and of its value")
        if self.properties and self.property is None:
            raise ValueError("properties requires property and value: columns of a property's name and of its value")
        if self.history_pattern is not None and not self.history:
            raise ValueError("history_pattern requires history: the column whose entries it matches")
        if self.years[0] >= self.years[1] or self.years[0] < 1 or self.years[1] > 9999:
            raise ValueError("years must be two ascending years between 1 and 9999")
        return self

    def of(self, role: Role, name: str, default: Any) -> Any:
        """Return the value of option `name` for one table; `default` if it is set for the other table only."""
        value = getattr(self, name)
        return value.get(role, default) if isinstance(value, dict) else value

    def histories(self) -> tuple[str, ...]:
        """Return the columns with lists of items."""
        return (self.history,) if isinstance(self.history, str) else tuple(self.history or ())

    def wanted(self, role: Role) -> Wanted:
        """Return the columns and options with which the files of one table are read."""
        if role == "items":
            needed = {
                self.items_id or self.item_id: "data.items_id" if self.items_id else "data.item_id (data.items_id)"
            }
            if self.property is not None and self.value is not None:
                needed |= {self.property: "data.property", self.value: "data.value"}
            optional: tuple[str, ...] = (self.time,) if self.property is not None and self.time else ()
        else:
            needed = {self.user_id: "data.user_id"}
            needed |= dict.fromkeys(self.histories(), "data.history") or {self.item_id: "data.item_id"}
            timed = self.time and (not self.history or "time" in self.model_fields_set)
            needed |= {self.time: "data.time"} if timed else {}
            optional = tuple(Filter.parse(text).column for text in self.filters)
            needed |= {name: "data.filters" for name in optional if name not in needed}
        other: Role = "interactions" if role == "items" else "items"
        return Wanted(
            needed=needed,
            keys=tuple(name for name in needed if name not in (*self.histories(), self.value)),
            history=self.histories() if role == "interactions" else (),
            history_separator=self.history_separator,
            history_pattern=re.compile(self.history_pattern) if self.history_pattern is not None else None,
            separator=self.of(role, "separator", None),
            quote=self.of(role, "quote", '"'),
            encoding=self.of(role, "encoding", "utf-8"),
            columns=tuple(self.of(role, "columns", [])),
            role=role,
            other_separator=self.of(other, "separator", None),
            shared=frozenset(name for name in ("separator", "columns") if not isinstance(getattr(self, name), dict)),
            everything=role == "items" and self.property is None,
            optional=optional,
        )


class Table(Protocol):
    """A reader of one file: its columns, and its rows in blocks."""

    columns: dict[str, pa.DataType]

    def select(self, fields: Collection[str]) -> None:
        """Read only these and the needed columns from now on."""

    def blocks(self, ledger: RowCounts) -> Iterator[Block]:
        """Yield the rows in file order; count unreadable ones in `ledger`."""


def locate(config: Config, cache: Path) -> Files:
    """Find or download the files.

    Raises:
        DataError: a file does not exist.
    """
    return log_files(Files(expand(config.items, "data.items"), expand(config.interactions, "data.interactions")))


def _open(config: Config, role: Role, file: RawFile, types: FileTypes | None = None) -> tuple[Table, Wanted]:
    with paused_meter():  # detection reads the beginning of a file, and a JSON document as a whole
        return _opened(config, role, file, types)


def _opened(config: Config, role: Role, file: RawFile, types: FileTypes | None) -> tuple[Table, Wanted]:
    wanted = config.wanted(role)
    form = config.of(role, "format", None) or find_format(file, wanted.encoding)
    if form == "parquet":
        return ParquetTable(file, wanted), wanted
    if form == "csv":
        return DelimitedTable(file, wanted), wanted
    key = next(iter(wanted.needed))
    if role == "items":
        return JsonTable(file, wanted, (key, "value"), None if types is None else types.get(str(file), {})), wanted
    table = JsonTable(file, wanted, (key, (*config.histories(), "history")[0]))
    if not config.history and table.holds_histories():
        log.info("%s: a document with a list of items per user", file)
        wanted = config.model_copy(update={"history": "history", "time": ""}).wanted(role)
        table = JsonTable(file, wanted, (key, "history"))
    return table, wanted


# --- parts ------------------------------------------------------------------------------------------------------


def parts(config: Config, role: Role, files: list[RawFile], scans: list[Scan]) -> list[RawFile] | None:
    """Return sections of the files that can be read independently, in order; None: they are read as a whole."""
    if role == "items" and config.property is not None:
        return None
    return [
        section for file, scanned in zip(files, scans, strict=True) for section in _cut(config, role, file, scanned)
    ]


def _cut(config: Config, role: Role, file: RawFile, scanned: Scan) -> list[RawFile]:
    wanted = config.wanted(role)
    form = config.of(role, "format", None) or find_format(file, wanted.encoding)
    if form == "parquet":
        return parquet_sections(file)
    if codecs.lookup(wanted.encoding).name != "utf-8" or len(scanned.begins) < 2:
        return [file]
    table, _ = _open(config, role, file, {})
    if isinstance(table, DelimitedTable):  # only reading from the beginning tells which line breaks are in fields
        separator, quotes = table.separator.encode(), scanned.quotes
        is_cut = quotes is None or (len(separator) == 1 and quotes.is_regular(separator))
        return text_sections(file, scanned) if is_cut else [file]
    cannot = not isinstance(table, JsonTable) or table.document or not table.has_needed()
    return [file] if cannot else text_sections(file, scanned)


def quote(config: Config, role: Role) -> bytes:
    """Return the quote character, whose use in a file decides whether it is cut."""
    return config.wanted(role).quote.encode()


# --- items ------------------------------------------------------------------------------------------------------


def item_types(config: Config, files: Files) -> FileTypes:
    """Return the fields of the items and their types, by the name of the file."""
    if config.property is not None:
        return {}
    return {str(file): _open(config, "items", raw_file(file))[0].columns for file in files.items}


def join_types(types: Iterable[Types]) -> dict[str, pa.DataType]:
    """Return the common types of fields, in the order in which they appear."""
    joined: dict[str, pa.DataType] = {}
    for own in types:
        for name, kind in own.items():
            joined[name] = widen(joined.get(name, pa.null()), kind)
    return joined


def read_items(
    config: Config,
    files: Files,
    ledger: RowCounts,
    fields: Collection[str] | None = None,
    types: FileTypes | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield item rows in file order, `source_id` and the other columns of the files; all of one schema.

    Args:
        config: the options.
        files: the files to read.
        ledger: counts of rows.
        fields: the fields to read; an empty batch with all fields comes first then. None: all.
        types: what `item_types` returns of all files, if these are only some of them.
    """
    opened = [(raw_file(file), *_open(config, "items", raw_file(file), types)) for file in files.items]
    name = config.items_id or config.item_id
    if config.property is not None and config.value is not None:
        rule = TimeRule(config.time, config.time_unit, tuple(config.time_format), config.years)
        source = ((file, block) for file, table, _ in opened for block in table.blocks(ledger))
        with one_line(", ".join(str(file) for file, *_ in opened[:3])):
            yield from pivot(source, name, config.property, config.value, config.properties, rule, ledger)
        return
    kinds = join_types((table.columns for _, table, _ in opened) if types is None else types.values())
    kinds.pop(name, None)
    kinds = {column: pa.string() if pa.types.is_null(kind) else kind for column, kind in kinds.items()}
    if fields is not None:
        yield pa.RecordBatch.from_pylist([], schema=_schema(kinds))
        kinds = {column: kind for column, kind in kinds.items() if is_field(column, field_name(column), fields)}
        for _, table, _ in opened:
            table.select(kinds)
    schema = _schema(kinds)
    for file, table, _ in opened:
        with one_line(file):
            for block in table.blocks(ledger):
                ids = ids_of(file, block.rows, name, "data.items_id" if config.items_id else "data.item_id")
                good = np.asarray(ids.is_valid())
                skip_rows(ledger, file, block.numbers, ~good, f"no {name}")
                ledger.keep(int(good.sum()))
                columns = [ids, *(_field(file, block.rows, column, kind) for column, kind in kinds.items())]
                yield pa.RecordBatch.from_arrays(columns, schema=schema).filter(pa.array(good))


def _schema(kinds: Types) -> pa.Schema:
    return pa.schema([("source_id", pa.string()), *((field_name(name), kind) for name, kind in kinds.items())])


def _field(file: RawFile, rows: pa.RecordBatch, name: str, kind: pa.DataType) -> pa.Array:
    """Return a column in its common type; null if the file does not have it."""
    if name not in rows.schema.names:
        return pa.nulls(rows.num_rows, kind)
    column = rows.column(name)
    try:
        return as_field(column, kind)
    except (pa.ArrowException, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise DataError(f"{file}: column {name} of type {column.type} cannot be read as {kind}: {reason}") from None


# --- interactions -----------------------------------------------------------------------------------------------


def read_interactions(config: Config, files: Files, ledger: RowCounts) -> Iterator[pa.RecordBatch]:
    """Yield interactions with schema INTERACTIONS, in file order."""
    rule = TimeRule(config.time, config.time_unit, tuple(config.time_format), config.years)
    filters = [Filter.parse(text) for text in config.filters]
    reader = EventReader(config.user_id, config.item_id, rule, filters, ledger)
    for each in files.interactions:
        file = raw_file(each)
        with one_line(file):
            table, wanted = _open(config, "interactions", file)
            for block in table.blocks(ledger):
                yield reader.events(file, block, wanted)
