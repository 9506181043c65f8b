"""Reader of Parquet files: column types are unchanged, and only the required columns are read."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tiger.core.errors import DataError
from tiger.data.readers.meter import report
from tiger.data.readers.raw_files import RawFile
from tiger.data.readers.row_counts import RowCounts
from tiger.data.readers.table import Block, Wanted
from tiger.data.readers.values import item_type

BATCH_ROWS = 1 << 16


class ParquetTable:
    """One Parquet file: the types of its columns, and its rows."""

    def __init__(self, file: RawFile, wanted: Wanted) -> None:
        """Read the schema.

        Raises:
            DataError: not a Parquet file, or required columns are missing.
        """
        self.file, self.wanted = file, wanted
        try:
            with file.open() as stream, pq.ParquetFile(stream) as parquet:
                schema = parquet.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None
        names = [name for name in schema.names if not name.startswith("__index_level_")]
        wanted.check(file, names)
        self.selected = wanted.selected(names)
        self.columns = {name: item_type(schema.field(name).type) for name in self.selected}

    def select(self, fields: Collection[str]) -> None:
        """Read only these and the needed columns from now on."""
        self.selected = [name for name in self.selected if name in fields or name in self.wanted.needed]

    def blocks(self, ledger: RowCounts) -> Iterator[Block]:
        """Yield the rows with the selected columns.

        Raises:
            DataError: the file is damaged.
        """
        number, span = self.file.first_number, self.file.span
        rows = 1 << 10 if self.wanted.everything else BATCH_ROWS
        try:
            with self.file.open() as stream, pq.ParquetFile(stream) as parquet:
                size, total = self.file.size(), max(parquet.metadata.num_rows, 1)
                groups = None if span is None else list(range(span.begin, span.end))
                for batch in parquet.iter_batches(rows, row_groups=groups, columns=self.selected):
                    batch = batch.select(self.selected)
                    yield Block(np.arange(number, number + batch.num_rows), batch)
                    number += batch.num_rows
                    report(self.file, size * (number - 1) // total)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> DataError:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system; those of Parquet have none
            return self.file.unreadable(error)
        reason = str(error).partition("\n")[0].partition(". Detail")[0]
        return DataError(f"{self.file}: not a readable Parquet file ({reason[:200]}); copy or export it again")
