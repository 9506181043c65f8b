"""Rows of raw files with a progress line, and an error if too many of them cannot be read."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from tiger.core.progress import Progress
from tiger.data.readers.meter import Meter, metered
from tiger.data.readers.raw_files import RawFile
from tiger.data.readers.row_counts import RowCounts


def read_rows(
    batches: Iterator[pa.RecordBatch], files: list[tuple[RawFile, int]], ledger: RowCounts, max_bad_row_fraction: float
) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a reader, log its progress in its files, and close its ledger.

    Args:
        batches: what the reader yields.
        files: the files and their bytes.
        ledger: the reader's counts of rows.
        max_bad_row_fraction: maximum fraction of unreadable rows.

    Raises:
        DataError: more rows cannot be read.
    """
    progress = Progress(f"read {ledger.table}", None, "rows")
    for batch in metered(batches, Meter(files, progress)):
        progress.add(batch.num_rows)
        yield batch
    progress.close()
    ledger.close(max_bad_row_fraction)
