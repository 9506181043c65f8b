"""Blocks of rows to events: filters, ids, times, and one row per user with a list of items."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tiger.core.errors import DataError
from tiger.data.readers.filters import Filter
from tiger.data.readers.raw_files import RawFile
from tiger.data.readers.row_counts import InvalidRow, RowCounts
from tiger.data.readers.table import Block, Wanted
from tiger.data.readers.times import TimeRule, column_micros, explain, why_not
from tiger.data.readers.values import has_id_type, id_text, id_texts, plain, split_history
from tiger.data.sources.base import INTERACTIONS


@contextlib.contextmanager
def one_line(file: object) -> Iterator[None]:
    """Convert exceptions of Arrow about a file into a one-line `DataError`.

    Raises:
        DataError: instead of any exception of Arrow.
    """
    try:
        yield
    except pa.ArrowException as error:
        reason = str(error).partition("\n")[0][:300]
        raise DataError(f"{file}: cannot be read as a table: {reason}") from None


def ids_of(file: RawFile, rows: pa.RecordBatch, name: str, key: str) -> pa.Array:
    """Return the column `name` as ids in text, null if missing.

    Args:
        file: the file, for messages.
        rows: rows of the file.
        name: the column.
        key: the configuration key that names the column, for messages.

    Raises:
        DataError: the column's type cannot be read as ids.
    """
    column = rows.column(name)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not has_id_type(kind):
        raise DataError(
            f"{file}: column {name} has type {column.type}; an id must be text or a number. Set {key} to its column"
            + ("; for lists of items set data.history" if pa.types.is_nested(column.type) else "")
        )
    try:
        return id_texts(column)
    except (pa.ArrowException, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise DataError(f"{file}: column {name} of type {column.type} cannot be read as ids: {reason}") from None


def skip_rows(
    ledger: RowCounts, file: RawFile, numbers: npt.NDArray[np.int64], bad: npt.NDArray[Any], reason: str
) -> None:
    """Count the rows of the mask `bad` as skipped, with their line numbers."""
    for number in numbers[bad].tolist():
        ledger.skip(file, number, reason)


@dataclass
class EventReader:
    """Convert blocks of rows into events; count events, for tables without times.

    Attributes:
        user_id, item_id: names of the columns of ids.
        rule: how to parse times; if its name is empty, the position in the files is the time.
        filters: conditions that an event must satisfy.
        ledger: counts of kept, skipped and left-out rows, and of the events so far without a time.
    """

    user_id: str
    item_id: str
    rule: TimeRule
    filters: list[Filter]
    ledger: RowCounts

    def events(self, file: RawFile, block: Block, wanted: Wanted) -> pa.RecordBatch:
        """Return the events of a block with schema INTERACTIONS; count the rows that are not used.

        Raises:
            DataError: a column's type cannot be read as ids or times, or cannot be filtered.
        """
        block = self._filtered(file, block)
        users = ids_of(file, block.rows, self.user_id, "data.user_id")
        if wanted.history:
            return self._from_histories(file, block, users, wanted)
        items = ids_of(file, block.rows, self.item_id, "data.item_id")
        named = np.asarray(pc.and_(users.is_valid(), items.is_valid()))
        skip_rows(self.ledger, file, block.numbers, ~named, f"no {self.user_id} or {self.item_id}")
        if self.rule.name:
            times, good = self._times(file, block, named)
        else:
            times, good = self._in_order(len(named)), named
        self.ledger.keep(int(good.sum()))
        return pa.RecordBatch.from_arrays([users, items, pa.array(times)], schema=INTERACTIONS).filter(pa.array(good))

    def _filtered(self, file: RawFile, block: Block) -> Block:
        passed = np.ones(block.rows.num_rows, bool)
        kept = passed.copy()
        for each in self.filters:
            column = block.rows.column(each.column)
            if pa.types.is_nested(column.type):
                raise DataError(
                    f"{file}: column {each.column} has type {column.type}; data.filters compares single values"
                )
            passes, bad = each.mask(column)
            for index in np.flatnonzero(kept & bad).tolist():
                reason = f"{each.column} is not a number, required by {each.text}"
                self.ledger.skip(file, int(block.numbers[index]), reason, repr(column[index].as_py()))
            out = kept & ~bad & ~passes
            self.ledger.leave_out(int(out.sum()), f"not {each.text}")
            kept &= passes
        if kept.all():
            return block
        return Block(block.numbers[kept], block.rows.filter(pa.array(kept)))

    def _times(
        self, file: RawFile, block: Block, wanted: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return (times, mask of the valid ones among `wanted`); count the others."""
        column = block.rows.column(self.rule.name)
        if pa.types.is_nested(column.type) or pa.types.is_boolean(column.type):
            raise DataError(
                f"{file}: column {self.rule.name} has type {column.type}, not times; set data.time to another column"
            )
        try:
            times, usable = column_micros(column, self.rule)
        except (pa.ArrowException, ValueError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise DataError(
                f"{file}: column {self.rule.name} of type {column.type} cannot be read as times: {reason}"
            ) from None
        for index in np.flatnonzero(wanted & ~usable).tolist():
            value = plain(column[index : index + 1])[0].as_py()
            reason = why_not(value, self.rule)
            detail = "" if self.ledger.skipped[reason] else explain(value, self.rule)
            self.ledger.skip(file, int(block.numbers[index]), reason, detail)
        return times, wanted & usable

    def _in_order(self, events: int) -> npt.NDArray[np.int64]:
        self.ledger.in_order += events
        return np.arange(self.ledger.in_order - events, self.ledger.in_order, dtype=np.int64)

    def _from_histories(self, file: RawFile, block: Block, users: pa.Array, wanted: Wanted) -> pa.RecordBatch:
        """Return one event per item of each row's list, ordered by the position in the list."""
        named = np.array(users.is_valid())
        skip_rows(self.ledger, file, block.numbers, ~named, f"no {self.user_id}")
        columns = [_lists(file, block.rows.column(name), name, wanted) for name in wanted.history]
        for row, reason in sorted({row: reason for _, bad in columns for row, reason in bad.items()}.items()):
            if named[row]:
                self.ledger.skip(file, int(block.numbers[row]), str(reason), reason.detail)
                named[row] = False
        mask = pa.array(named)
        block, users, named = Block(block.numbers[named], block.rows.filter(mask)), users.filter(mask), named[named]
        entries = [(lists.filter(mask), name) for (lists, _), name in zip(columns, wanted.history, strict=True)]
        lists = _joined([self._ids_in(lists, name, wanted) for lists, name in entries])
        lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0)).astype(np.int64)
        good = named & (lengths > 0)
        self.ledger.leave_out(int((named & ~good).sum()), f"empty {' and '.join(wanted.history)}")
        starts: npt.NDArray[np.int64] | None = None
        if self.rule.name in wanted.needed:
            starts, good = self._times(file, block, good)
        self.ledger.keep(int(good.sum()))
        mask = pa.array(good)
        items = lists.filter(mask).flatten()
        rows = np.repeat(np.arange(int(good.sum())), lengths[good])
        if starts is None:
            times = self._in_order(len(items))
        else:
            first = np.cumsum(lengths[good]) - lengths[good]
            times = starts[good][rows] + np.arange(len(items)) - first[rows]
        columns = [users.filter(mask).take(pa.array(rows)), items, pa.array(times)]
        return pa.RecordBatch.from_arrays(columns, schema=INTERACTIONS)

    def _ids_in(self, lists: pa.ListArray, name: str, wanted: Wanted) -> pa.ListArray:
        """Return lists of ids; count entries without an id, and those that do not match the pattern."""
        ids, pattern = lists.flatten(), wanted.history_pattern
        empty = ids.null_count
        if pattern is not None:
            coded = ids.dictionary_encode()
            matches = (pattern.fullmatch(text) for text in coded.dictionary.to_pylist())
            found = [id_text(match[1], name) if match else None for match in matches]
            ids = pa.array(found, pa.string()).take(coded.indices)
            self.ledger.leave_out_entries(ids.null_count - empty, f"entries of {name} that are not {pattern.pattern}")
        self.ledger.leave_out_entries(empty, f"entries of {name} without an id")
        if not ids.null_count:
            return lists
        kept = np.asarray(ids.is_valid())
        before = np.concatenate([[0], np.cumsum(kept)])
        offsets = before[np.asarray(lists.offsets)].astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), ids.drop_null())


def _joined(columns: list[pa.ListArray]) -> pa.ListArray:
    """Return the lists of several columns, one after another in each row."""
    if len(columns) == 1:
        return columns[0]
    lengths = np.stack([np.asarray(column.value_lengths()) for column in columns])
    rows = np.concatenate([np.repeat(np.arange(lengths.shape[1]), each) for each in lengths])
    items = pa.concat_arrays([column.flatten() for column in columns])
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(0))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), items.take(pa.array(np.argsort(rows, kind="stable"))))


def _lists(file: RawFile, column: pa.Array, name: str, wanted: Wanted) -> tuple[pa.ListArray, dict[int, InvalidRow]]:
    """Return a column of histories as lists of ids, and the rows whose text cannot be read, with the reasons."""
    column = plain(column)
    bad: dict[int, InvalidRow] = {}
    if pa.types.is_string(column.type):
        rows: list[list[str | None] | None] = []
        for row, text in enumerate(column.to_pylist()):
            try:
                rows.append(None if text is None else split_history(text, wanted.history_separator))
            except InvalidRow as reason:
                bad[row] = InvalidRow(f"{name}: {reason}", reason.detail)
                rows.append(None)
        column = pa.array(rows, pa.list_(pa.string()))
    elif pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column = pc.cast(column, pa.list_(column.type.value_type))
    if not pa.types.is_list(column.type) or not has_id_type(column.type.value_type):
        raise DataError(f"{file}: column {name} has type {column.type}; data.history must be lists of ids, or text")
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), id_texts(column.flatten())), bad
