"""Users' histories block after block, for work that must not hold all of them at once.

Memory is that of one block: the histories of at most `BLOCK_USERS` users, as arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tiger.core.storage import Folder, in_one_line
from tiger.data.histories import Histories, Split, add_counts

HISTORIES = "histories.parquet"

BLOCK_USERS = 8192

SPLITS: tuple[Split, ...] = ("valid", "test")


@dataclass(frozen=True)
class Block:
    """Consecutive users.

    Attributes:
        first_user: user id of the first of them.
        histories: their histories; `source_ids` is empty, see `source_ids` here.
        source_ids: original ids of the users, text; empty if they were not asked for.
    """

    first_user: int
    histories: Histories
    source_ids: pa.Array


def read_blocks(folder: Folder, with_ids: bool = False, block_users: int = BLOCK_USERS) -> Iterator[Block]:
    """Yield the histories of a catalog's folder block by block, in the order of the users."""
    columns = ["items", "train_end", "valid_end", *(["source_id"] if with_ids else [])]
    first_user = 0
    with folder.open_input(HISTORIES) as file, in_one_line(f"{folder.uri}/{HISTORIES}"):
        for batch in pq.ParquetFile(file).iter_batches(block_users, columns=columns):
            offsets, items = list_slices(batch["items"])
            begin = offsets[:-1]
            ends = (begin + np.asarray(batch[name]) for name in ("train_end", "valid_end"))
            ids = batch["source_id"] if with_ids else pa.array([], pa.string())
            yield Block(first_user, Histories([], offsets, items, *ends), ids)
            first_user += batch.num_rows


def list_slices(lists: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return lists of integers as offsets int64 [rows + 1] and values int32: row r ends where row r + 1 begins."""
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0))
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), np.asarray(lists.flatten())


def slices(lists: pa.ChunkedArray) -> list[npt.NDArray[np.int32]]:
    """Return the lists of a column as views of its values, int32."""
    offsets, values = list_slices(lists.combine_chunks())
    return [values[begin:end] for begin, end in pairwise(offsets.tolist())]


def training_counts(blocks: Iterable[Histories], num_items: int) -> npt.NDArray[np.int64]:
    """Return how often the training parts hold each item, int64 [num_items]."""
    counts = np.zeros(num_items, np.int64)
    for block in blocks:
        counts = add_counts(counts, block.training_items())
    return counts


def history_lists(
    begin: npt.NDArray[np.int64], end: npt.NDArray[np.int64], items: npt.NDArray[np.int32]
) -> pa.ListArray:
    """Return items[begin[r] : end[r]] of every row r as a column of lists."""
    lengths = end - begin
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(items[positions]))
