"""What the preparation reads: the raw rows of items and interactions, in parts that may be read independently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from tiger.data.readers.row_counts import RowCounts
from tiger.data.sources.base import Role


class RawData(Protocol):
    """Raw rows of both tables. It is pickled for tasks, unless they run in this process."""

    @property
    def is_here(self) -> bool:
        """Whether only this machine can read them."""

    def num_parts(self, role: Role) -> int:
        """Return the number of parts of a table."""

    def read(self, role: Role, part: int, fields: tuple[str, ...] | None) -> tuple[Iterator[pa.RecordBatch], RowCounts]:
        """Return the rows of a part, and their counts, which are complete at the end of the rows.

        Args:
            role: the table.
            part: number of the part.
            fields: the fields of items that are needed, by their names in the raw files; others may be left out. None:
                all.
        """


class Reading(Protocol):
    """Follows the reading, in the process that builds the catalog."""

    def part_read(self, role: Role, part: int, rows: int) -> None:
        """Note that the next part of a table has been read."""

    def table_read(self, role: Role, counts: RowCounts) -> None:
        """Check the counts of all rows of a table.

        Raises:
            DataError: too many rows could not be used.
        """


@dataclass(frozen=True)
class Batches:
    """Rows that are batches of this process, in one part."""

    items: Iterable[pa.RecordBatch]
    interactions: Iterable[pa.RecordBatch]
    is_here: bool = True

    def num_parts(self, role: Role) -> int:
        """Return 1."""
        return 1

    def read(self, role: Role, part: int, fields: tuple[str, ...] | None) -> tuple[Iterator[pa.RecordBatch], RowCounts]:
        """Return the batches; their rows have been counted already."""
        return iter(self.items if role == "items" else self.interactions), RowCounts(role)


class Unchecked:
    """Follows nothing."""

    def part_read(self, role: Role, part: int, rows: int) -> None:
        """Do nothing."""

    def table_read(self, role: Role, counts: RowCounts) -> None:
        """Do nothing."""
