"""Sorted runs: tables that are larger than memory, sorted by a column of texts or integers and cut into ranges of it.

Every task that reads raw rows writes them as *runs*, tables sorted by the key, whose row groups are small. The driver
knows the first key of every row group, and chooses the ranges so that they are of similar size; a task then merges the
rows of one range out of all runs. The sort is stable and runs are merged in their order, so that rows of equal keys
stay in the order in which they were read, and the result does not depend on the ranges.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tiger.core.storage import Folder


class TableStore(Protocol):
    """Where tasks leave tables for other tasks."""

    def write(self, name: str, table: pa.Table, group_rows: int | None = None) -> None:
        """Write a table in row groups of `group_rows` rows; None: in one."""

    def read(self, name: str, columns: list[str] | None = None, groups: list[int] | None = None) -> pa.Table:
        """Read columns (None: all) of row groups (None: all)."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete tables that no task will read again."""


class MemoryStore:
    """Tables in the memory of this process."""

    def __init__(self) -> None:
        self.tables: dict[str, tuple[pa.Table, int]] = {}

    def write(self, name: str, table: pa.Table, group_rows: int | None = None) -> None:
        """Keep a table; see `TableStore.write`."""
        self.tables[name] = table, group_rows or max(1, len(table))

    def read(self, name: str, columns: list[str] | None = None, groups: list[int] | None = None) -> pa.Table:
        """Return a table; see `TableStore.read`."""
        table, size = self.tables[name]
        if columns is not None:
            table = table.select(columns)
        if groups is None:
            return table
        begins = [group for group in groups if group - 1 not in groups]
        ends = [group + 1 for group in groups if group + 1 not in groups]
        slices = [table.slice(begin * size, (end - begin) * size) for begin, end in zip(begins, ends, strict=True)]
        return pa.concat_tables([table.slice(0, 0), *slices])

    def delete(self, names: Iterable[str]) -> None:
        """Forget tables; see `TableStore.delete`."""
        for name in names:
            del self.tables[name]


@dataclass(frozen=True)
class FolderStore:
    """Tables as Parquet files of a folder that all nodes can read and write."""

    folder: Folder

    def write(self, name: str, table: pa.Table, group_rows: int | None = None) -> None:
        """Write a file; see `TableStore.write`."""
        kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary)
        texts = [each.name for each in table.schema if any(is_kind(each.type) for is_kind in kinds)]
        with self.folder.create(f"{name}.parquet", durable=False) as stream:
            pq.write_table(
                table, stream, compression="lz4", use_dictionary=texts or False, write_statistics=False,
                row_group_size=max(1, group_rows or len(table)),
                use_compliant_nested_type=False,  # it would rename the fields of lists
            )  # fmt: skip

    def read(self, name: str, columns: list[str] | None = None, groups: list[int] | None = None) -> pa.Table:
        """Read a file; see `TableStore.read`."""
        with self.folder.open_input(f"{name}.parquet") as stream, pq.ParquetFile(stream) as file:
            if groups is None:
                return file.read(columns)
            return file.read_row_groups(groups, columns)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; see `TableStore.delete`."""
        for name in names:
            self.folder.delete_file(f"{name}.parquet")


@dataclass(frozen=True)
class Run:
    """A table of the store that is sorted by its key.

    Attributes:
        name: name in the store.
        first: key of the first row of every row group.
        weights: size of every row group, in rows or bytes.
    """

    name: str
    first: tuple[Any, ...]
    weights: tuple[int, ...]


def write_run(store: TableStore, name: str, table: pa.Table, key: str, group_rows: int, weight: float = 1.0) -> Run:
    """Write a table that is sorted by its column `key`; `weight` is the size of a row."""
    store.write(name, table, group_rows)
    begins = np.arange(0, len(table), group_rows)
    sizes = np.minimum(group_rows, len(table) - begins)
    first = table[key].take(pa.array(begins)).to_pylist()
    return Run(name, tuple(first), tuple(int(size * weight) for size in sizes))


@dataclass(frozen=True)
class KeyRange:
    """Keys from `begin` (None: from the first one) until before `end` (None: to the last one)."""

    begin: Any = None
    end: Any = None

    def filter(self, table: pa.Table, key: str) -> pa.Table:
        """Return the rows whose key is in this range."""
        if self.begin is None and self.end is None:
            return table
        keys = table[key]
        kept = None
        if self.begin is not None:
            kept = pc.greater_equal(keys, self.begin)
        if self.end is not None:
            below = pc.less(keys, self.end)
            kept = below if kept is None else pc.and_(kept, below)
        return table.filter(kept)


def choose_ranges(runs: Sequence[Run], size: int) -> list[KeyRange]:
    """Cut all keys into ranges of similar size, about `size` in the unit of the runs' weights; at least one range."""
    groups = sorted(pair for run in runs for pair in zip(run.first, run.weights, strict=True))
    total = sum(weight for _, weight in groups)
    count = max(1, round(total / size))
    cuts: list[Any] = []
    before = 0
    for key, weight in groups:
        is_new = key > (cuts[-1] if cuts else groups[0][0])
        if is_new and before * count >= (len(cuts) + 1) * total and len(cuts) < count - 1:
            cuts.append(key)
        before += weight
    return [KeyRange(begin, end) for begin, end in itertools.pairwise([None, *cuts, None])]


def read_range(
    store: TableStore, runs: Sequence[Run], keys: KeyRange, key: str, columns: list[str] | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """Yield (index of the run, its rows with a key in the range) of every run that has such rows, in order."""
    for index, run in enumerate(runs):
        groups = [
            group
            for group, first in enumerate(run.first)
            if (keys.end is None or first < keys.end)
            and (keys.begin is None or group + 1 == len(run.first) or run.first[group + 1] >= keys.begin)
        ]
        if groups and len(table := keys.filter(store.read(run.name, columns, groups), key)):
            yield index, table
