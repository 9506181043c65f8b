"""Tables of users for pools of actors, written block after block: whom to evaluate, and whom to recommend to.

A row group is what one actor is given at a time. Nothing here holds all users: memory is that of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tiger.core.row_groups import groups_of, regroup, write_row_groups
from tiger.core.storage import Folder
from tiger.data.histories import Split
from tiger.data.history_blocks import SPLITS, history_lists, read_blocks

SHARD_USERS = 1024
"""Users per row group; more in a table of many users, so that it has at most `_MOST_SHARDS`."""

_MOST_SHARDS = 8192

USERS = pa.schema([("user_id", pa.int32()), ("source_id", pa.string()), ("history", pa.list_(pa.int32()))])
"""A user to recommend to: index, original id, and item indices in time order."""

TARGETS = USERS.append(pa.field("target", pa.int32())).append(pa.field("split", pa.int8()))
"""A user of a split to evaluate: the item to find after the history; the split is an index into `SPLITS`."""


def write_users(folder: Folder, name: str, tables: Iterator[pa.Table], num_users: int, schema: pa.Schema) -> None:
    """Write a table of users, in row groups of equal size."""
    size = max(SHARD_USERS, -(-num_users // _MOST_SHARDS))
    groups = regroup(tables, groups_of(size))
    write_row_groups(folder, name, (group.cast(schema) for group in groups))


def catalog_users(catalog: Folder, at_most: int) -> Iterator[pa.Table]:
    """Yield the first users of a catalog with their whole histories."""
    for block in read_blocks(catalog, with_ids=True):
        count = min(len(block.histories), at_most - block.first_user)
        begin, end = block.histories.offsets[:count], block.histories.offsets[1 : count + 1]
        yield pa.table(
            {
                "user_id": np.arange(block.first_user, block.first_user + count, dtype=np.int32),
                "source_id": block.source_ids[:count],
                "history": history_lists(begin, end, block.histories.items),
            }
        )
        if block.first_user + len(block.histories) >= at_most:
            return


def evaluation_users(catalog: Folder, max_users: int | None, seed: int) -> tuple[dict[Split, int], Iterator[pa.Table]]:
    """Return the number of users of each split, and their rows: those of validation first, each in order of user ids.

    Args:
        catalog: a catalog's folder.
        max_users: users per split, sampled by `seed`; None: all.
        seed: seed of the sample.
    """
    counts = dict.fromkeys(SPLITS, 0)
    for block in read_blocks(catalog):
        for split in SPLITS:
            counts[split] += len(block.histories.evaluation(split))
    chosen = {split: _sampled(counts[split], max_users, seed) for split in SPLITS}
    sizes = {split: counts[split] if rows is None else len(rows) for split, rows in chosen.items()}

    def rows() -> Iterator[pa.Table]:
        for number, split in enumerate(SPLITS):
            yield from _rows_of(catalog, split, number, chosen[split])

    return sizes, rows()


def _sampled(users: int, maximum: int | None, seed: int) -> npt.NDArray[np.int64] | None:
    """Return the positions of a sample among `users`, ascending, as `sample_users` chooses them; None for all."""
    if maximum is None or maximum >= users:
        return None
    return np.sort(np.random.default_rng(seed).permutation(users)[:maximum])


def _rows_of(catalog: Folder, split: Split, number: int, chosen: npt.NDArray[np.int64] | None) -> Iterator[pa.Table]:
    seen = 0
    for block in read_blocks(catalog, with_ids=True):
        users = block.histories.evaluation(split)
        if chosen is not None:
            own = chosen[np.searchsorted(chosen, seen) : np.searchsorted(chosen, seen + len(users))] - seen
            seen += len(users)
            users = users.take(own)
        if len(users):
            yield pa.table(
                {
                    "user_id": (block.first_user + users.users).astype(np.int32),
                    "source_id": block.source_ids.take(pa.array(users.users)),
                    "history": history_lists(users.begin, users.end, users.items),
                    "target": users.targets,
                    "split": np.full(len(users), number, np.int8),
                }
            )


def take_test_users(folder: Folder, name: str, num_test_users: int, count: int, seed: int) -> pa.Table:
    """Return `count` test users of a table of users to evaluate, sampled by `seed`; only their row groups are read."""
    with folder.open_input(name) as stream:
        file = pq.ParquetFile(stream)
        first = file.metadata.num_rows - num_test_users  # those of validation come before
        sample = _sampled(num_test_users, count, seed)
        positions = first + (np.arange(num_test_users) if sample is None else sample)
        taken, begin = [file.schema_arrow.empty_table()], 0
        for group in range(file.metadata.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            own = positions[np.searchsorted(positions, begin) : np.searchsorted(positions, end)]
            if len(own):
                taken.append(file.read_row_group(group).take(pa.array(own - begin)))
            begin = end
        return pa.concat_tables(taken)


def shard_files(folder: Folder) -> list[str]:
    """Return the files of shards in the order of their numbers, which have five digits or more."""
    names = [info.base_name for info in folder.entries(recursive=False)]
    return sorted((name for name in names if name.endswith(".parquet")), key=lambda name: (len(name), name))
