"""Code shared by the readers of all formats: the required columns of a file, and blocks of rows with line numbers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiger.core.errors import DataError
from tiger.data.readers.raw_files import RawFile
from tiger.data.readers.row_counts import listed


@dataclass(frozen=True)
class Block:
    """Rows of a file and the line number (in a Parquet file, the row number) of each, from 1."""

    numbers: npt.NDArray[np.int64]
    rows: pa.RecordBatch


@dataclass(frozen=True)
class Wanted:
    """The columns that a table must have, and the layout of its files.

    Attributes:
        needed: {column name: the configuration key that names it}.
        keys: columns whose values have no line breaks (ids and times).
        history: the columns with lists of items, if any.
        history_separator: separator of the items in a list as text; None: white space.
        history_pattern: pattern of an entry of a list; its first group is the item's id.
        separator, quote, encoding, columns: layout of text tables; None and () mean: detected from the first line.
        role: the table, "items" or "interactions"; "" if there is only one.
        other_separator: separator of the other table; None: detected.
        shared: the options of `separator` and `columns` that are one value for both tables.
        everything: whether to read all columns, not only the needed ones.
        optional: columns that are read if they exist.
    """

    needed: dict[str, str]
    keys: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
    history_separator: str | None = None
    history_pattern: re.Pattern[str] | None = None
    separator: str | None = None
    quote: str = '"'
    encoding: str = "utf-8"
    columns: tuple[str, ...] = ()
    role: str = ""
    other_separator: str | None = None
    shared: frozenset[str] = frozenset()
    everything: bool = False
    optional: tuple[str, ...] = field(default=())

    def check(self, file: RawFile, found: list[str], more: str = "") -> None:
        """Check that each needed column exists and that no column name is repeated.

        Args:
            file: the file, for messages.
            found: names of its columns.
            more: further advice for the message.

        Raises:
            DataError: lists the missing columns, those that were found, and the keys; or the repeated columns.
        """
        missing = [name for name in self.needed if name not in found]
        if missing:
            keys = list(dict.fromkeys(self.needed[name] for name in missing))
            named = f"{', '.join(keys[:-1])} and {keys[-1]}" if len(keys) > 1 else keys[0]
            if "data.item_id" in keys:
                more = f"; for a list of items per user set data.history{more}"
            columns = f"columns found: {listed(found) or 'none'}"
            raise DataError(f"{file}: no column {listed(missing)}; {columns}. Set {named} to the right column{more}")
        twice = sorted({name for name in found if found.count(name) > 1})
        if twice:
            raise DataError(f"{file}: the header contains {listed(twice)} more than once; rename one of them")

    def set_separator(self, found: str | None) -> str:
        """Return the setting for a table that `separator` does not fit; it leaves the other table's separator as it is.

        Args:
            found: a separator that the first line contains, if any.
        """
        if self.separator is None or not self.role:
            return f"data.separator = {json.dumps(found)}" if found else "data.separator"
        other = "items" if self.role == "interactions" else "interactions"
        if "separator" in self.shared:  # this table's separator is detected then
            return f"data.separator={{{other}={json.dumps(self.separator)}}}"
        values = {self.role: found} if found else {}
        values |= {other: self.other_separator} if self.other_separator else {}
        return "data.separator={" + ", ".join(f"{role}={json.dumps(value)}" for role, value in values.items()) + "}"

    def set_columns(self) -> str:
        """Return the setting that lists the column names of this table, but not of the other one."""
        return f"data.columns={{{self.role}=[...]}}" if self.role and "columns" in self.shared else "data.columns"

    def selected(self, found: list[str]) -> list[str]:
        """Return the columns to read, out of those that were found."""
        return [name for name in found if self.everything or name in self.needed or name in self.optional]
