"""What the readers of all formats share: what to look for in a file, and blocks of rows with their line numbers."""

from __future__ import annotations

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
    """Rows of a file and the line (of a Parquet file: the row) of each, from 1."""

    numbers: npt.NDArray[np.int64]
    rows: pa.RecordBatch


@dataclass(frozen=True)
class Wanted:
    """What a table must hold and how its files are written.

    Attributes:
        needed: column name -> the configuration key that names it.
        keys: columns whose values have no line breaks (ids and times).
        history: the columns with lists of items, if any, and what separates the items in text; None: white space.
        history_pattern: of an entry of a list; its first group is the item's id.
        separator, quote, encoding, columns: of text tables; None and () mean: found out from the first line.
        everything: all columns are read, not only the needed ones.
        optional: columns that are read where they exist.
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
    everything: bool = False
    optional: tuple[str, ...] = field(default=())

    def check(self, file: RawFile, found: list[str], more: str = "") -> None:
        """Check that the needed columns are there, once each.

        Raises:
            DataError: names the missing columns, those that were found, and the keys.
        """
        missing = [name for name in self.needed if name not in found]
        if missing:
            keys = list(dict.fromkeys(self.needed[name] for name in missing))
            named = f"{', '.join(keys[:-1])} and {keys[-1]}" if len(keys) > 1 else keys[0]
            if "data.item_id" in keys:
                more = f"; data.history names a list of items per user{more}"
            columns = f"columns found: {listed(found) or 'none'}"
            raise DataError(f"{file}: no column {listed(missing)}; {columns}. Name yours with {named}{more}")
        twice = sorted({name for name in found if found.count(name) > 1})
        if twice:
            raise DataError(f"{file}: the header names {listed(twice)} more than once; rename one of them")

    def selected(self, found: list[str]) -> list[str]:
        return [name for name in found if self.everything or name in self.needed or name in self.optional]
