"""Ids and titles of items as Arrow columns, for work on many items: no Python string is made per item."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tiger.core.storage import Folder

ITEMS = "items.parquet"

_TITLE_CHARACTERS = 80  # of a text that stands in for a missing title


def shortened(title: str, width: int = 80) -> str:
    """Return a title for a line of text: at most `width` characters, with an ellipsis if some were cut off."""
    return title if len(title) <= width else f"{title[: width - 1].rstrip()}…"


class ItemNames:
    """What items are called: their original ids, and their titles. Columns are read on first access."""

    def __init__(self, folder: Folder) -> None:
        """Read nothing yet.

        Args:
            folder: a folder with items.parquet, such as a catalog's.
        """
        self.folder = folder

    @cached_property
    def ids(self) -> pa.ChunkedArray:
        """Original id of each item in the raw data, text [items]."""
        return self.folder.read_table(ITEMS, ["source_id"])["source_id"]

    @cached_property
    def titles(self) -> pa.ChunkedArray:
        """Title of each item, else the beginning of its text, else its id, text [items]."""
        titles = self._text("title")
        if titles.null_count:
            beginning = pc.utf8_slice_codeunits(self._text("text"), 0, _TITLE_CHARACTERS)
            titles = pc.coalesce(titles, beginning, self.ids)
        return titles

    def _text(self, name: str) -> pa.ChunkedArray:
        """Return a column of texts, null if it is empty or does not exist."""
        with self.folder.open_input(ITEMS) as file:
            exists = name in pq.read_schema(file).names
        if not exists:
            return pa.chunked_array([pa.nulls(len(self.ids), pa.string())])
        column = pc.cast(self.folder.read_table(ITEMS, [name])[name], pa.string())
        return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)

    def indices(self, ids: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Return the index of each id, int32, null for those that are not items; the work grows with all items."""
        return pc.index_in(ids, value_set=self.ids)


def take_lists(column: pa.ChunkedArray, items: npt.NDArray[Any]) -> pa.ListArray:
    """Return the values of items int64 [U, K] as one list per row; shorter where a row is padded with -1."""
    found = items >= 0
    offsets = pa.array([0, *found.sum(axis=1).cumsum().tolist()], pa.int32())
    values = column.take(pa.array(items[found]))
    return pa.ListArray.from_arrays(offsets, values.combine_chunks() if len(values) else pa.array([], column.type))
