"""Interactions: raw rows -> histories in time order, a range of users at a time.

An interaction takes 16 bytes from here on (user and item as numbers, time), whatever the lengths of its ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tiger.core.external_sort import KeyRange, Run, TableStore, read_range, write_run
from tiger.data.histories import Histories, history_table
from tiger.data.prepare.raw import RawData
from tiger.data.prepare.rules import count_times, dense, in_core, in_order, split_points, unrepeated
from tiger.data.profile import Quantiles
from tiger.data.readers.row_counts import RowCounts
from tiger.data.texts import TextColumn

KEY = "user"

_GROUP_ROWS = 1 << 15
_LOOKED_UP = 1 << 24  # ids of items that are looked up at a time
_RUN_BYTES = 256 << 20  # ids of a run, before they become numbers


@dataclass(frozen=True)
class InteractionRuns:
    """Runs of one part of the raw interactions.

    Attributes:
        runs: columns user, item (its number among all items) and time, sorted by user, else in file order.
        counts: of the rows.
        rows: number of rows, with those of unknown items.
        unknown: number of rows of unknown items.
        unknown_example: id of the first of these.
    """

    runs: list[Run]
    counts: RowCounts
    rows: int
    unknown: int
    unknown_example: str


def read_interaction_runs(
    raw: RawData, part: int, item_ids: pa.ChunkedArray, store: TableStore, run_rows: int
) -> InteractionRuns:
    """Read a part of the interactions, and write those with known items as runs of about `run_rows` rows."""
    batches, counts = raw.read("interactions", part, None)
    runs: list[Run] = []
    read, unknown, example = 0, 0, ""
    for number, rows in enumerate(_chunked(batches, run_rows)):
        read += len(rows)
        items = rows["item"].combine_chunks().dictionary_encode()
        item = np.append(_numbers_of(items.dictionary, item_ids), -1)[np.asarray(items.indices)]
        known = item >= 0
        if not known.all():
            example = example or rows["item"][int(np.flatnonzero(~known)[0])].as_py()
            unknown += int((~known).sum())
            rows, item = rows.filter(pa.array(known)), item[known]
        if not len(rows):
            continue
        name = f"interactions-{part:05d}-{number:04d}"
        table = _sorted_by_user(rows[KEY], item, np.asarray(rows["time"]))
        runs.append(write_run(store, name, table, KEY, _GROUP_ROWS))
    return InteractionRuns(runs, counts, read, unknown, example)


def _chunked(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    pending: list[pa.RecordBatch] = []
    count = size = 0
    for batch in batches:
        pending.append(batch)
        count += batch.num_rows
        size += batch.nbytes
        if count >= rows or size >= _RUN_BYTES:
            yield pa.Table.from_batches(pending)
            pending, count, size = [], 0, 0
    if count:
        yield pa.Table.from_batches(pending)


def _numbers_of(ids: pa.Array, item_ids: pa.ChunkedArray) -> npt.NDArray[np.int32]:
    """Return the position in `item_ids` of each id, int32 [n]; -1 if it is not among them.

    The few ids are hashed, and the many are looked up among them: no index of all items has to be held or made again.
    """
    numbers = np.full(len(ids), -1, np.int32)
    ids = ids.cast(pa.large_string())
    for begin in range(0, len(item_ids), _LOOKED_UP):
        found = pc.index_in(item_ids.slice(begin, _LOOKED_UP), value_set=ids)
        place = np.asarray(found.fill_null(-1))
        occurs = np.flatnonzero(place >= 0)
        numbers[place[occurs]] = begin + occurs
    return numbers


def _sorted_by_user(users: pa.ChunkedArray, item: npt.NDArray[np.int32], time: npt.NDArray[np.int64]) -> pa.Table:
    """Return the columns of a run.

    Every row group has a dictionary of its own users: Parquet would write that of the whole run into each of them, and
    a task that merges ranges would read all of these copies.
    """
    coded = users.combine_chunks().dictionary_encode()
    by_name = pc.sort_indices(coded.dictionary)
    user = _ranks(by_name)[np.asarray(coded.indices)]
    order = np.argsort(user, kind="stable")
    user, names = user[order], coded.dictionary.take(by_name)
    groups = []
    for begin in range(0, len(user), _GROUP_ROWS):
        own = user[begin : begin + _GROUP_ROWS]
        first, last = own[0], own[-1]
        groups.append(pa.DictionaryArray.from_arrays(pa.array(own - first), names.slice(first, last - first + 1)))
    return pa.table({KEY: pa.chunked_array(groups), "item": item[order], "time": time[order]})


def _ranks(order: pa.Array) -> npt.NDArray[np.int32]:
    ranks = np.empty(len(order), np.int32)
    ranks[np.asarray(order)] = np.arange(len(order), dtype=np.int32)
    return ranks


@dataclass(frozen=True)
class MergedInteractions:
    """Counts of one range of users.

    Attributes:
        equal: interactions that are equal to an earlier one.
        repeated: other repeated interactions that were dropped.
        times: the first and the last time; None without interactions.
    """

    equal: int
    repeated: int
    times: tuple[int, int] | None


def merge_interaction_range(
    store: TableStore,
    runs: Sequence[Run],
    shifts: Sequence[int],
    keys: KeyRange,
    part: int,
    duplicates: Literal["first", "all"],
) -> MergedInteractions:
    """Write the interactions of one range of users without duplicates, in the order of the files, and the users' ids.

    Args:
        store: holds the runs.
        runs: of all parts, in order.
        shifts: added to the times of each run.
        keys: the range of user ids.
        part: its number.
        duplicates: which of a user's interactions with an item to keep.
    """
    names: list[pa.Array] = []
    named = 0
    users, items, times = [np.empty(0, np.int32)], [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    for index, table in read_range(store, runs, keys, KEY):
        for chunk in table[KEY].chunks:
            names.append(chunk.dictionary.cast(pa.large_string()))
            users.append(np.asarray(chunk.indices) + np.int32(named))
            named += len(names[-1])
        items.append(np.asarray(table["item"]))
        times.append(np.asarray(table["time"]) + shifts[index])
    ids, user = _number_users(names, np.concatenate(users))
    item, time = np.concatenate(items), np.concatenate(times)
    kept, equal, repeated = unrepeated(user, item, time, duplicates)
    user, item, time = user[kept], item[kept], time[kept]
    store.write(_users_name(part), pa.table({"source_id": ids}))
    store.write(_name(part), pa.table({"user": user, "item": item, "time": time}))
    return MergedInteractions(equal, repeated, (int(time.min()), int(time.max())) if len(time) else None)


def _number_users(names: list[pa.Array], user: npt.NDArray[np.int32]) -> tuple[pa.Array, npt.NDArray[np.int32]]:
    """Return the ids that occur, in ascending order, and the position of each interaction's user among them.

    Args:
        names: dictionaries of ids, in which the same id may occur more than once.
        user: positions in all of these together.
    """
    coded = pa.chunked_array(names, pa.large_string()).combine_chunks().dictionary_encode()
    user = np.asarray(coded.indices)[user]
    occurring, user = dense(user, len(coded.dictionary))
    ids = coded.dictionary.take(pa.array(occurring))
    by_name = pc.sort_indices(ids)
    return ids.take(by_name), _ranks(by_name)[user]


def _name(part: int) -> str:
    return f"range-{part:05d}"


def _users_name(part: int) -> str:
    return f"users-{part:05d}"


# --- k-core -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemCounts:
    """How many interactions of one range of users are with each item, for items with any.

    Attributes:
        items: int32 [n].
        counts: int64 [n].
        users: number of users with interactions.
    """

    items: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]
    users: int


def count_items(
    store: TableStore,
    part: int,
    k: int,
    num_items: int,
    alive: npt.NDArray[np.bool_] | None = None,
    before: npt.NDArray[np.bool_] | None = None,
) -> ItemCounts:
    """Count the interactions of one range of users that `in_core` leaves.

    Args:
        store: holds the range.
        part: its number.
        k: minimum number of interactions per user.
        num_items: number of all items.
        alive: see `in_core`.
        before: if it is given, return by how much the counts are lower than with these items alive.
    """
    table = store.read(_name(part), ["user", "item"])
    user, item = np.asarray(table["user"]), np.asarray(table["item"])
    users = int(user.max(initial=-1)) + 1
    kept = in_core(user, item, users, alive, k)
    num_kept = int(np.count_nonzero(np.bincount(user[kept])))
    counted = item[kept] if before is None else item[in_core(user, item, users, before, k) & ~kept]
    if len(counted) * 8 < num_items:
        items, counts = np.unique(counted, return_counts=True)
    else:
        of_all = np.bincount(counted, minlength=num_items)
        items = np.flatnonzero(of_all).astype(np.int32)
        counts = of_all[items]
    return ItemCounts(items, counts, num_kept)


def count_range_times(
    store: TableStore, part: int, k: int, alive: npt.NDArray[np.bool_], first: int, last: int, width: int
) -> npt.NDArray[np.int64]:
    """Return the histogram of the times of the catalog's interactions of one range of users; see `rules.Histogram`."""
    _, _, time = _in_catalog(store, part, k, alive)
    return count_times(time, first, last, width)


def _in_catalog(
    store: TableStore, part: int, k: int, alive: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    table = store.read(_name(part))
    user, item, time = (np.asarray(table[name]) for name in ("user", "item", "time"))
    kept = in_core(user, item, int(user.max(initial=-1)) + 1, alive, k)
    return user[kept], item[kept], time[kept]


# --- histories ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HistoryCounts:
    """Counts of the histories of one range of users."""

    users: int
    interactions: int
    training_examples: int
    validation_users: int
    test_users: int
    lengths: Quantiles


@dataclass(frozen=True)
class HistoryRule:
    """How the histories of the catalog are made; see `rules.in_order` and `rules.split_points`."""

    k: int
    tie_break: Literal["file", "shuffle", "id"]
    seed: int
    cuts: tuple[int, int] | None


def finish_histories(
    store: TableStore,
    part: int,
    rule: HistoryRule,
    alive: npt.NDArray[np.bool_],
    item_of: npt.NDArray[np.int32],
    first_user: int,
) -> HistoryCounts:
    """Write the rows of histories.parquet of one range of users.

    Args:
        store: holds the range.
        part: its number.
        rule: how histories are made.
        alive: the items of the catalog, bool [all items].
        item_of: item ids in the catalog, int32 [all items].
        first_user: user id of the first user of the range.
    """
    user, item, time = _in_catalog(store, part, rule.k, alive)
    ids = store.read(_users_name(part))["source_id"]
    occurring, user = dense(user, len(ids))
    item = item_of[item]
    order = in_order(user + np.int64(first_user), item, time, rule.tie_break, rule.seed)
    user, item, time = user[order], item[order], time[order]
    offsets = np.concatenate([[0], np.bincount(user, minlength=len(occurring)).cumsum()])
    histories = Histories(
        TextColumn(ids.take(pa.array(occurring))), offsets, item, *split_points(offsets, time, rule.cuts)
    )
    store.write(_histories_name(part), history_table(histories, time, first_user), _GROUP_ROWS)
    return HistoryCounts(
        users=len(histories),
        interactions=len(item),
        training_examples=histories.training_examples(),
        validation_users=len(histories.evaluation("valid")),
        test_users=len(histories.evaluation("test")),
        lengths=Quantiles.of(np.diff(offsets)),
    )


def finished_histories(store: TableStore, parts: int) -> Iterator[pa.Table]:
    """Yield the rows of histories.parquet, range by range."""
    for part in range(parts):
        yield store.read(_histories_name(part))


def _histories_name(part: int) -> str:
    return f"histories-{part:05d}"
