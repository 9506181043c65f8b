"""Texts of fields, and a column of texts as a sequence of Python strings that are made when they are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_AT_ONCE = 1 << 13
_CHUNK_BYTES = 1 << 30


def field_text(name: str, value: Any) -> str:
    """Return the value of an item's field as it reads in the item's text; empty if it is missing."""
    if value is None or value != value:  # NaN never reaches a text
        return ""
    if name == "price" and isinstance(value, (int, float)):
        return f"${value:.2f}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):  # a path reads "Hair Care > Shampoo", several of them are separated by semicolons
        nested = any(isinstance(inner, list) for inner in value)
        return ("; " if nested else " > ").join(filter(None, (field_text(name, inner) for inner in value)))
    return str(value)


class TextColumn(Sequence[str]):
    """An Arrow column of texts: a list of 10 million Python strings takes a gigabyte more than their characters."""

    def __init__(self, column: pa.ChunkedArray | pa.Array) -> None:
        """Keep the column, without nulls."""
        self.column = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> TextColumn: ...

    def __getitem__(self, index: int | slice) -> str | TextColumn:
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            if step == 1:
                return TextColumn(self.column.slice(begin, max(0, end - begin)))
            return TextColumn(self.column.take(pa.array(range(begin, end, step), pa.int64())))
        text: str = self.column[int(index)].as_py()
        return text

    def __iter__(self) -> Iterator[str]:
        for chunk in self.column.chunks:
            for begin in range(0, len(chunk), _AT_ONCE):
                yield from chunk.slice(begin, _AT_ONCE).to_pylist()

    def strings(self) -> pa.ChunkedArray:
        """Return the column as Arrow strings, in chunks that do not pass the 2 GiB that such a chunk has room for."""
        chunks = []
        for chunk in self.column.chunks:
            ends = np.cumsum(np.asarray(pc.binary_length(chunk)), dtype=np.int64)
            begins = np.flatnonzero(np.diff(ends // _CHUNK_BYTES, prepend=-1)).tolist()
            for begin, end in itertools.pairwise([*begins, len(chunk)]):
                own = pa.concat_arrays([chunk.slice(begin, end - begin)])  # a copy, whose offsets begin at 0
                chunks.append(own.cast(pa.string()))
        return pa.chunked_array(chunks, pa.string())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{len(self):,} texts>"
