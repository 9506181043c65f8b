"""Ids and titles of items as Arrow columns, for work on many items: no Python string is made per item."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tiger.core.storage import Folder
from tiger.data.texts import field_text

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
        """Display titles, see `display_titles`, text [items]; texts are read only where a title is missing."""
        with self.folder.open_input(ITEMS) as source:
            file = pq.ParquetFile(source)
            columns = [name for name in ("source_id", "title", "text") if name in file.schema_arrow.names]
            chunks = []
            for group in range(file.num_row_groups):
                titles = _titles(file.read_row_group(group, columns=[name for name in columns if name == "title"]))
                if titles is None or titles.null_count:
                    titles = display_titles(file.read_row_group(group, columns=columns))
                chunks += titles.chunks
        return pa.chunked_array(chunks, pa.string())

    def indices(self, ids: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Return the index of each id, int32, null for those that are not items; the work grows with all items."""
        return pc.index_in(ids, value_set=self.ids)


def display_titles(items: pa.Table) -> pa.ChunkedArray:
    """Return the title of each item, else the beginning of its text, else its original id, text [items].

    Args:
        items: columns `source_id`, and of `title` and `text` those that exist. A title that is a list reads as it does
            in the item's text.
    """
    found = [titles] if (titles := _titles(items)) is not None else []
    if "text" in items.column_names:
        found.append(pc.utf8_slice_codeunits(_present(items["text"]), 0, _TITLE_CHARACTERS))
    return pc.coalesce(*found, items["source_id"])


def _titles(items: pa.Table) -> pa.ChunkedArray | None:
    """Return the titles as text, null where they are empty; None without that column."""
    if "title" not in items.column_names:
        return None
    titles = items["title"]
    if pa.types.is_nested(titles.type):
        titles = pa.chunked_array([[field_text("title", value) for value in titles.to_pylist()]], pa.string())
    return _present(titles)


def _present(column: pa.ChunkedArray) -> pa.ChunkedArray:
    column = pc.cast(column, pa.string())
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def take_lists(column: pa.ChunkedArray, items: npt.NDArray[Any]) -> pa.ListArray:
    """Return the values of items int64 [U, K] as one list per row; shorter where a row is padded with -1."""
    found = items >= 0
    offsets = pa.array([0, *found.sum(axis=1).cumsum().tolist()], pa.int32())
    values = column.take(pa.array(items[found]))
    return pa.ListArray.from_arrays(offsets, values.combine_chunks() if len(values) else pa.array([], column.type))
