"""Users' histories, and the users and targets of a split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tiger.core import node_cache
from tiger.core.row_groups import regroup, write_row_groups
from tiger.core.storage import Folder
from tiger.data.texts import TextColumn

FILE = "histories.parquet"

GROUP_USERS, GROUP_EVENTS = 1 << 16, 1 << 22
"""Users and events per row group of histories.parquet, the unit in which it is written and read."""

CHUNK_EVENTS = 1 << 30
"""Events per chunk of the lists in histories.parquet; a chunk is limited to 2^31 events."""

_COLUMNS = ["source_id", "items", "train_end", "valid_end"]
_USER_BYTES = 64  # per user, of the arrays and of an id

_IDS = pa.schema([("source_id", pa.string())])

Split = Literal["valid", "test"]


@dataclass(frozen=True)
class Histories:
    """All users' items in time order, in CSR layout: user u's items are items[offsets[u] : offsets[u + 1]].

    Attributes:
        source_ids: original ids of the users in the raw data, [U].
        offsets: int64 [U + 1].
        items: int32 [E], item ids.
        train_end, valid_end: int64 [U], absolute positions: training items are items[offsets[u] : train_end[u]],
            validation items[train_end[u] : valid_end[u]], test items[valid_end[u] : offsets[u + 1]].
    """

    source_ids: Sequence[str]
    offsets: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    train_end: npt.NDArray[np.int64]
    valid_end: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, user: int) -> npt.NDArray[np.int32]:
        """Return all items of a user, int32."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def training_examples(self) -> int:
        """Return the number of (prefix, next item) pairs in the training splits."""
        return int(np.maximum(self.train_end - self.offsets[:-1] - 1, 0).sum())

    def training_targets(self) -> npt.NDArray[np.int32]:
        """Return the targets of training: all items of the training parts except the first of each."""
        return self.items[self.training_target_positions()]

    def training_target_positions(self) -> npt.NDArray[np.int64]:
        """Return where in `items` the targets of training are; the item before a target is its user's too."""
        begin, end = int(self.offsets[0]), int(self.offsets[-1])
        is_first = np.zeros(end - begin + 1, bool)
        is_first[self.offsets[:-1] - begin] = True
        return begin + np.flatnonzero(self._in_training() & ~is_first[:-1])

    def training_counts(self, num_items: int) -> npt.NDArray[np.int64]:
        """Return how often the training parts hold each item, int64 [num_items]."""
        counts = np.zeros(num_items, np.int64)
        for block in self.blocks():
            counts = add_counts(counts, block.training_items())
        return counts

    def training_items(self) -> npt.NDArray[np.int32]:
        """Return the items of the training parts, int32."""
        return self.items[self.offsets[0] : self.offsets[-1]][self._in_training()]

    def training_target_counts(self, num_items: int) -> npt.NDArray[np.int64]:
        """Return how often each item is a target of training, int64 [num_items]."""
        counts = np.zeros(num_items, np.int64)
        for block in self.blocks():
            counts = add_counts(counts, block.training_targets())
        return counts

    def blocks(self, events: int = 1 << 22) -> Iterator[Histories]:
        """Yield all users in blocks of about so many events, so that arrays of a block take little memory."""
        first = 0
        while first < len(self):
            last = int(np.searchsorted(self.offsets, self.offsets[first] + events, "right")) - 1
            last = min(max(last, first + 1), len(self))
            yield self.users(first, last)
            first = last

    def users(self, first: int, last: int) -> Histories:
        """Return the histories of the users first .. last - 1; positions are those in the same `items`."""
        return Histories(
            self.source_ids[first:last],
            self.offsets[first : last + 1],
            self.items,
            self.train_end[first:last],
            self.valid_end[first:last],
        )

    def _in_training(self) -> npt.NDArray[np.bool_]:
        """Return which of the items of these users are in the training parts."""
        return np.arange(self.offsets[0], self.offsets[-1]) < np.repeat(self.train_end, np.diff(self.offsets))

    def evaluation(self, split: Split) -> EvalSplit:
        """Return the users with a target in `split`: its first item; the history is all items before it."""
        begin = self.train_end if split == "valid" else self.valid_end
        end = self.valid_end if split == "valid" else self.offsets[1:]
        users = np.flatnonzero((end > begin) & (begin > self.offsets[:-1]))
        return EvalSplit(users, self.offsets[users], begin[users], self.items[begin[users]], self.items)


@dataclass(frozen=True)
class EvalSplit:
    """Users to evaluate: `users` int64 [E], `targets` int32 [E]; history of row e is items[begin[e] : end[e]]."""

    users: npt.NDArray[np.int64]
    begin: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int32]
    items: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.users)

    def histories(self) -> list[npt.NDArray[np.int32]]:
        """Return the history of each row, int32."""
        return [self.items[b:e] for b, e in zip(self.begin, self.end, strict=True)]

    def take(self, rows: npt.NDArray[np.int64]) -> EvalSplit:
        """Return the given rows."""
        return EvalSplit(self.users[rows], self.begin[rows], self.end[rows], self.targets[rows], self.items)


def sample_users(users: EvalSplit, maximum: int | None, seed: int) -> EvalSplit:
    """Return at most `maximum` users, drawn by the seed, in their order; None: all."""
    if maximum is None or maximum >= len(users):
        return users
    return users.take(np.sort(np.random.default_rng(seed).permutation(len(users))[:maximum]))


def add_counts(counts: npt.NDArray[np.int64], items: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Add how often each of `items` occurs to counts [N], in place; return them, longer if an item is N or more."""
    missing = int(items.max(initial=-1)) + 1 - len(counts)
    if missing > 0:
        counts = np.append(counts, np.zeros(missing, np.int64))
    np.add.at(counts, items, 1)
    return counts


def most_popular(counts: npt.NDArray[np.integer], k: int) -> npt.NDArray[np.int64]:
    """Return the `k` items with the highest counts, int64 [min(k, N)]; of equals the lower index first.

    Memory is 9 bytes per item at most, where sorting takes 20.

    Args:
        counts: [N], not negative.
        k: number of items, 1 or more.
    """
    at_least = np.cumsum(np.bincount(counts, minlength=1)[::-1])[::-1]  # items with a count of 0, 1, ... or more
    edge = int(np.flatnonzero(at_least >= min(k, len(counts)))[-1])
    above, tied = np.flatnonzero(counts > edge), np.flatnonzero(counts == edge)
    found = np.concatenate([above, tied[: k - len(above)]])
    return found[np.argsort(-counts[found], kind="stable")]


def read_histories(folder: Folder) -> Histories:
    """Read histories.parquet from a catalog's folder; arrays of many events are mapped from a file per machine."""
    with folder.open_input(FILE) as stream, pq.ParquetFile(stream) as file:
        metadata = file.metadata
    size = 4 * _num_events(metadata) + _USER_BYTES * metadata.num_rows
    if size >= node_cache.MAPPED_BYTES:
        content = json.dumps([folder.uri, folder.files()[FILE], "histories"])
        path = node_cache.mapped_folder(content, size, lambda path: _write_mapped(folder, path))
        if path is not None:
            return _read_mapped(path)
    table = folder.read_table(FILE, _COLUMNS)
    lists = table["items"]
    lengths = np.concatenate([np.empty(0, np.int64), *(np.asarray(pc.list_value_length(c)) for c in lists.chunks)])
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Histories(
        TextColumn(table["source_id"]),
        offsets,
        np.concatenate([np.empty(0, np.int32), *(np.asarray(chunk.flatten()) for chunk in lists.chunks)]),
        offsets[:-1] + np.asarray(table["train_end"]),
        offsets[:-1] + np.asarray(table["valid_end"]),
    )


def _num_events(metadata: pq.FileMetaData) -> int:
    """Return the number of events, from the footer; every user has at least one."""
    leaf = next(index for index in range(metadata.num_columns) if _path(metadata, index).startswith("items."))
    groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
    return sum(group.column(leaf).num_values for group in groups)


def _path(metadata: pq.FileMetaData, column: int) -> str:
    path: str = metadata.schema.column(column).path
    return path


def _write_mapped(folder: Folder, path: Path) -> None:
    """Write the columns of histories.parquet as arrays, row group by row group."""
    with folder.open_input(FILE) as stream, pq.ParquetFile(stream) as file:
        users = file.metadata.num_rows
        shapes = {"items": _num_events(file.metadata), "offsets": users + 1, "train_end": users, "valid_end": users}
        arrays = {
            name: np.lib.format.open_memmap(
                path / f"{name}.npy", "w+", np.int32 if name == "items" else np.int64, (size,)
            )
            for name, size in shapes.items()
        }
        arrays["offsets"][0] = user = event = 0
        with pa.OSFile(str(path / "ids.arrow"), "wb") as sink, pa.ipc.new_file(sink, _IDS) as ids:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, _COLUMNS).combine_chunks()
                items = table["items"].combine_chunks()
                lengths = np.asarray(pc.list_value_length(items)).astype(np.int64)
                ends = event + np.cumsum(lengths)
                last, until = user + len(table), event + int(lengths.sum())
                arrays["items"][event:until] = np.asarray(items.flatten())
                arrays["offsets"][user + 1 : last + 1] = ends
                for name in ("train_end", "valid_end"):
                    arrays[name][user:last] = ends - lengths + np.asarray(table[name])
                ids.write_table(table.select(["source_id"]).cast(_IDS))
                user, event = last, until
    for array in arrays.values():
        array.flush()


def _read_mapped(path: Path) -> Histories:
    ids = pa.ipc.open_file(pa.memory_map(str(path / "ids.arrow"))).read_all()["source_id"]
    names = ("offsets", "items", "train_end", "valid_end")
    return Histories(TextColumn(ids), *(node_cache.load_mapped(path / f"{name}.npy") for name in names))


def history_table(histories: Histories, time: npt.NDArray[np.int64], first_user: int = 0) -> pa.Table:
    """Return rows of histories.parquet, one per user.

    Args:
        histories: the users.
        time: of all interactions, in microseconds since 1970, int64 [E].
        first_user: user id of the first of them.
    """
    begin = histories.offsets[:-1]
    names = histories.source_ids
    return pa.table(
        {
            "user_id": np.arange(first_user, first_user + len(histories), dtype=np.int32),
            "source_id": names.strings() if isinstance(names, TextColumn) else pa.array(names, pa.string()),
            "items": _lists(histories.offsets, histories.items),
            "times": _lists(histories.offsets, time),
            "train_end": (histories.train_end - begin).astype(np.int32),
            "valid_end": (histories.valid_end - begin).astype(np.int32),
        }
    )


def write_histories(folder: Folder, tables: Iterable[pa.Table]) -> None:
    """Write the rows of histories.parquet, in row groups of at most `GROUP_USERS` users and about `GROUP_EVENTS`."""
    write_row_groups(folder, FILE, regroup(tables, _ends_of_groups))


def _ends_of_groups(table: pa.Table) -> npt.NDArray[np.int64]:
    lengths = [np.asarray(pc.list_value_length(chunk)) for chunk in table["items"].chunks]
    ends = np.concatenate([np.empty(0, np.int64), *lengths]).cumsum()
    found: list[int] = []
    begin = events = 0
    while begin < len(ends):
        # A group ends with the user who fills it, so that it does not depend on those who follow.
        end = min(begin + GROUP_USERS, int(np.searchsorted(ends, events + GROUP_EVENTS)) + 1)
        if end >= len(ends):
            break
        found.append(end)
        begin, events = end, int(ends[end - 1])
    return np.array(found, np.int64)


def _lists(offsets: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> pa.ChunkedArray:
    """Return values[offsets[u] : offsets[u + 1]] for every user u, in chunks small enough for 32-bit offsets."""
    chunks: list[pa.Array] = []
    first, users = 0, len(offsets) - 1
    while first < users or not chunks:
        last = int(np.searchsorted(offsets, offsets[first] + CHUNK_EVENTS, "right")) - 1
        last = min(max(last, first + 1), users)
        own = offsets[first : last + 1]
        inner = pa.array(values[own[0] : own[-1]])
        chunks.append(pa.ListArray.from_arrays(pa.array((own - own[0]).astype(np.int32)), inner))
        first = last
    return pa.chunked_array(chunks)
