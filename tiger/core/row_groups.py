"""Parquet files written row group by row group, so that a table need not be in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tiger.core.storage import Folder, in_one_line

_GROUPS_AT_ONCE = 1024


def write_row_groups(folder: Folder, name: str, groups: Iterable[pa.Table]) -> None:
    """Write a Parquet file, compressed with zstd, with one row group per table; there must be at least one."""
    with folder.create(name) as stream:
        writer: pq.ParquetWriter | None = None
        for group in groups:
            writer = writer or pq.ParquetWriter(stream, group.schema, compression="zstd")
            writer.write_table(group, row_group_size=max(1, len(group)))
        assert writer is not None, f"{name}: no row group"
        writer.close()


def read_row_groups(folder: Folder, name: str, columns: list[str]) -> Iterator[pa.Table]:
    """Yield columns of a Parquet file, the rows of 1,024 row groups at a time, in their order.

    Raises:
        StorageError: the file does not exist, or cannot be read.
    """
    with folder.open_input(name) as stream, in_one_line(f"{folder.uri}/{name}"):
        file = pq.ParquetFile(stream, pre_buffer=True)  # few reads of a remote store, whatever the size of the groups
        groups = range(file.num_row_groups)
        for first in groups[::_GROUPS_AT_ONCE]:
            yield file.read_row_groups(groups[first : first + _GROUPS_AT_ONCE], columns=columns)


def regroup(
    tables: Iterable[pa.Table], end_of_group: Callable[[pa.Table], npt.NDArray[np.int64]]
) -> Iterator[pa.Table]:
    """Yield the rows of tables in groups whose borders do not depend on those of the tables.

    Args:
        tables: tables of one schema.
        end_of_group: a table that begins with a group -> the ends of the groups that certainly end in it, ascending.
    """
    rest: pa.Table | None = None
    for table in tables:
        held = table if rest is None else pa.concat_tables([rest, table])
        begin = 0
        for end in end_of_group(held).tolist():
            yield held.slice(begin, end - begin).combine_chunks()
            begin = end
        rest = held.slice(begin)
    if rest is not None:
        yield rest.combine_chunks()


def groups_of(rows: int) -> Callable[[pa.Table], npt.NDArray[np.int64]]:
    """Return the ends of groups of equal numbers of rows, for `regroup`."""
    return lambda table: np.arange(rows, len(table), rows)
