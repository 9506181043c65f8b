"""Histories of users from interaction files: one row per user, whatever the order of the events in the files.

Events are spread by user over spill files, of which one at a time is sorted, so that memory is that of one spill file.
The rules are those of the catalog (`tiger.data.catalog`, 3 and 6): equal events count once, of repeated ones the first
is kept if the catalog says so, and events at equal times are in file order.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiger.core.errors import DataError
from tiger.core.storage import Folder
from tiger.data.catalog import CatalogConfig
from tiger.data.item_names import ItemNames
from tiger.data.prepare.rules import in_order, unrepeated

SPILL_BYTES = 64 << 20
"""Bytes of raw files per spill file."""

_MOST_SPILLS = 256  # files that are open at a time
_EVENTS_AT_ONCE = 1 << 18  # whose items are looked up at a time, which takes longer the larger the catalog is
_EXAMPLES = 5

_EVENTS = pa.schema([("user", pa.string()), ("item", pa.int32()), ("time", pa.int64())])


@dataclass
class HistoryCounts:
    """What was found in the files.

    Attributes:
        users: users, each with one row.
        events: interactions that were read.
        unknown: interactions with items that the catalog does not have.
        repeated: interactions that the rules leave out, because the user has an equal or an earlier one.
        users_without_items: users of whose items the catalog has none; they get the most popular items.
        unknown_examples: ids of some unknown items.
    """

    users: int = 0
    events: int = 0
    unknown: int = 0
    repeated: int = 0
    users_without_items: int = 0
    unknown_examples: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return asdict(self)


class HistoryFiles:
    """Events in files that become one history per user."""

    def __init__(self, names: ItemNames, catalog: CatalogConfig, spills: Folder, raw_bytes: int) -> None:
        """Choose the number of spill files.

        Args:
            names: the items of the catalog.
            catalog: its rules.
            spills: a folder for the spill files.
            raw_bytes: size of the raw files.
        """
        self.names, self.spills = names, spills
        self.duplicates = catalog.duplicates
        self.tie_break: Literal["file", "id"] = "id" if catalog.tie_break == "id" else "file"
        self.num_spills = min(_MOST_SPILLS, 1 + raw_bytes // SPILL_BYTES)
        self.counts = HistoryCounts()

    def read(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Spread events, of schema `INTERACTIONS`, over the spill files.

        Raises:
            DataError: the catalog has none of their items.
        """
        with ExitStack() as stack:
            writers = []
            for spill in range(self.num_spills):
                file = stack.enter_context(self.spills.create(self._name(spill), durable=False))
                writers.append(stack.enter_context(pa.ipc.new_stream(file, _EVENTS)))
            for events in _gathered(batches):
                self._spread(events, writers)
        if self.counts.events and self.counts.unknown == self.counts.events:
            known = ", ".join(self.names.ids.slice(0, 3).to_pylist())
            raise DataError(
                f"recommend.histories: none of the {self.counts.events:,} interactions is with an item of the catalog: "
                f"they have ids such as {', '.join(self.counts.unknown_examples)}, the catalog's are such as {known}; "
                "set data.item_id to the column of the item's id"
            )
        if not self.counts.events:
            raise DataError("recommend.histories: the files have no interactions")

    def _spread(self, events: pa.Table, writers: list[Any]) -> None:
        items = self.names.indices(events["item"]).combine_chunks()
        unknown = items.is_null()
        self._count_unknown(events["item"].filter(unknown))
        self.counts.events += len(events)
        table = pa.table(
            {"user": events["user"], "item": pc.fill_null(items, -1), "time": events["time"]}, schema=_EVENTS
        )
        coded = events["user"].combine_chunks().dictionary_encode()
        hashes = np.array([zlib.crc32(user.encode()) for user in coded.dictionary.to_pylist()], np.int64)
        spill = (hashes % self.num_spills)[np.asarray(coded.indices)]
        for number in np.unique(spill):
            writers[number].write_table(table.filter(pa.array(spill == number)))

    def _count_unknown(self, ids: pa.ChunkedArray) -> None:
        self.counts.unknown += len(ids)
        if len(ids) and len(self.counts.unknown_examples) < _EXAMPLES:
            found = dict.fromkeys([*self.counts.unknown_examples, *ids.slice(0, 100).to_pylist()])
            self.counts.unknown_examples = list(found)[:_EXAMPLES]

    def users(self) -> Iterator[pa.Table]:
        """Yield the users with their histories, a spill file at a time, in the order of their ids within it."""
        for spill in range(self.num_spills):
            with self.spills.open_input(self._name(spill)) as file:
                events = pa.ipc.open_stream(file).read_all()
            if len(events):
                yield self._histories(events)

    def _histories(self, events: pa.Table) -> pa.Table:
        coded = events["user"].combine_chunks().dictionary_encode()
        by_name = np.asarray(pc.sort_indices(coded.dictionary))
        rank = np.empty(len(by_name), np.int64)
        rank[by_name] = np.arange(len(by_name))
        user = rank[np.asarray(coded.indices)]
        item, time = np.asarray(events["item"]), np.asarray(events["time"])
        order = in_order(user, item, time, self.tie_break, seed=0)
        user, item, time = user[order], item[order], time[order]
        known = item >= 0
        unlike, _, _ = unrepeated(user, item, time, self.duplicates)
        kept, repeated = known & unlike, known & ~unlike
        lengths = np.bincount(user[kept], minlength=len(by_name))
        first = self.counts.users
        self.counts.users += len(by_name)
        self.counts.repeated += int(repeated.sum())
        self.counts.users_without_items += int((lengths == 0).sum())
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.table(
            {
                "user_id": np.arange(first, first + len(by_name), dtype=np.int32),
                "source_id": coded.dictionary.take(pa.array(by_name)),
                "history": pa.ListArray.from_arrays(pa.array(offsets), pa.array(item[kept])),
            }
        )

    def _name(self, spill: int) -> str:
        return f"events-{spill:03d}.arrow"


def _gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yield the rows of batches in tables of at least `_EVENTS_AT_ONCE` rows, except for the last one."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        waiting.append(batch)
        rows += batch.num_rows
        if rows >= _EVENTS_AT_ONCE:
            yield pa.Table.from_batches(waiting)
            waiting, rows = [], 0
    if rows:
        yield pa.Table.from_batches(waiting)
