"""Reader of JSON lines and of whole JSON documents: `[{...}, {...}]`, `{id: {...}}`, `{user: [items]}`."""

from __future__ import annotations

import collections
import functools
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from tiger.core.errors import DataError
from tiger.data.readers.lines import MAX_LINE_BYTES, check_text, lines, parse_record, text_blocks
from tiger.data.readers.meter import paused_meter
from tiger.data.readers.raw_files import RawFile
from tiger.data.readers.row_counts import InvalidRow, RowCounts
from tiger.data.readers.table import Block, Wanted
from tiger.data.readers.values import depth, field_value, id_text, list_levels, readable, split_history, unwrap

DOCUMENT_CAP = 1 << 30
"""Maximum bytes of a JSON document, which is read as a whole; JSON lines have no limit."""

BATCH_ROWS = 8192
RECORD_CAP = 8 << 20
_UNDECODABLE = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, decoded by surrogateescape
_SPACE = re.compile(r"[\s,]*")
_ID_KEYS = ("data.item", "data.user", "data.property")
_LEVELS = (pa.string(), pa.list_(pa.string()), pa.list_(pa.list_(pa.string())))


class JsonTable:
    """One JSON file: its fields, and its rows with ids, times and fields as text."""

    def __init__(
        self,
        file: RawFile,
        wanted: Wanted,
        keyed: tuple[str, str],
        fields: Mapping[str, pa.DataType] | None = None,
    ) -> None:
        """Detect the layout; if all columns are wanted and not known, read the file once to find the fields.

        Args:
            file: the file.
            wanted: the required columns.
            keyed: names of the key and of a value that is not an object, in a document `{key: value}`.
            fields: the fields and their types, if they are known.

        Raises:
            DataError: the file cannot be read.
        """
        self.file, self.wanted, self.keyed = file, wanted, keyed
        self.document = file.span is None and self._is_document() and not self._is_broken_lines()
        self.levels: dict[str, int] = {name: list_levels(kind) for name, kind in (fields or {}).items()}
        if wanted.everything and fields is None:  # finds the fields of items, and which of them contain lists
            with paused_meter(file):
                self._find_levels()
        self.columns = {name: _LEVELS[level] for name, level in self.levels.items()}

    def _find_levels(self) -> None:
        for _, record in self._records():
            if not isinstance(record, InvalidRow):
                for name, value in record.items():
                    self.levels[str(name)] = max(self.levels.get(str(name), 0), depth(value))

    # --- records ------------------------------------------------------------------------------------------------

    def _is_document(self) -> bool:
        """Return whether the first two lines are the beginning of a document, not JSON lines (one a whole value)."""
        begin = []
        for _, line in lines(self.file, RECORD_CAP, self.wanted.encoding):
            begin.append(line)
            if len(begin) == 2:
                break
        if not begin:
            return False
        if begin[0] is None:
            return self._first_character() in "[{"
        if begin[0][:1] == b"[":
            return len(begin) == 1 or not _is_whole(begin[0])
        if begin[0][:1] != b"{":
            return False
        records = [_record_or_none(line) for line in begin]
        if len(begin) == 1:
            return records[0] is not None and self._is_keyed(records[0])
        return records == [None, None]

    def _is_broken_lines(self) -> bool:
        """Return whether the file is not a valid document but JSON lines of which the first ones are invalid."""
        try:
            collections.deque(self._document_records(), 0)
        except DataError:
            some = itertools.islice(lines(self.file, RECORD_CAP, self.wanted.encoding), 1_000)
            return any(_record_or_none(line) is not None for _, line in some)
        return False

    def _is_keyed(self, record: dict[str, Any]) -> bool:
        known = [*self.wanted.needed, *self.wanted.optional]
        return bool(record) and not any(name in record for name in known) and all(map(depth, record.values()))

    def holds_histories(self) -> bool:
        """Return whether this is a document `{user: [items]}`."""
        if not self.document:
            return False
        first = next((record for _, record in self._records() if not isinstance(record, InvalidRow)), {})
        return list(first) == list(self.keyed) and isinstance(first[self.keyed[1]], list)

    def _first_character(self) -> str:
        for block in text_blocks(self.file, self.wanted.encoding):
            if stripped := block.removeprefix(b"\xef\xbb\xbf").lstrip():
                return stripped[:1].decode("latin-1")
        return ""

    def _records(self) -> Iterator[tuple[int, dict[str, Any] | InvalidRow]]:
        if self.document:
            yield from self._document_records()
            return
        for number, line in lines(self.file, RECORD_CAP, self.wanted.encoding):
            try:
                yield number, parse_record(line)
            except InvalidRow as reason:
                yield number, reason

    def _document_records(self) -> Iterator[tuple[int, dict[str, Any] | InvalidRow]]:
        pieces, size = [], 0
        for block in text_blocks(self.file, self.wanted.encoding):
            pieces.append(block)
            size += len(block)
            if size > DOCUMENT_CAP:
                raise DataError(
                    f"{self.file}: one JSON document of more than {DOCUMENT_CAP:,} bytes; write one object per line, "
                    "which has no limit"
                )
        text = b"".join(pieces).decode("utf-8", "surrogateescape")
        del pieces
        yield from _Document(self.file, text, self.keyed).records()

    def has_needed(self) -> bool:
        """Return whether every needed column occurs in the first thousand lines of the file."""
        missing = set(self.wanted.needed)
        for _, line in itertools.islice(lines(self.file.whole, RECORD_CAP, self.wanted.encoding), 1_000):
            missing -= (_record_or_none(line) or {}).keys()
        return not missing

    def select(self, fields: Collection[str]) -> None:
        """Read only these and the needed fields from now on."""
        self.levels = {name: level for name, level in self.levels.items() if name in fields}

    # --- rows ---------------------------------------------------------------------------------------------------

    def blocks(self, ledger: RowCounts) -> Iterator[Block]:
        """Yield the rows; count a row with an id or time of the wrong type as skipped.

        Raises:
            DataError: a required column is in no row.
        """
        wanted = self.wanted
        seen: dict[str, None] = {}
        columns = self._converters()
        schema = pa.schema([(name, kind) for name, (kind, _) in columns.items()])
        missing, numbers, rows, read = set(wanted.needed), [], [], 0
        for number, record in self._records():
            read += 1
            if isinstance(record, InvalidRow):
                ledger.skip(self.file, number, str(record), record.detail)
                continue
            if missing:
                seen |= dict.fromkeys(record)
                missing -= record.keys()
                if (
                    read > 10_000
                    and self.file.span is None
                    and any(wanted.needed[name].startswith(_ID_KEYS) for name in missing)
                ):
                    break
            try:
                rows.append({name: convert(record.get(name)) for name, (_, convert) in columns.items()})
            except InvalidRow as reason:
                ledger.skip(self.file, number, str(reason), reason.detail)
                continue
            numbers.append(number)
            if len(rows) == BATCH_ROWS:
                yield Block(np.array(numbers), pa.RecordBatch.from_pylist(rows, schema=schema))
                numbers, rows = [], []
        if missing and seen and self.file.span is None:  # of sections, the first lines of the file were checked
            wanted.check(self.file, list(seen))
        if rows:
            yield Block(np.array(numbers), pa.RecordBatch.from_pylist(rows, schema=schema))

    def _converters(self) -> dict[str, tuple[pa.DataType, Callable[[Any], Any]]]:
        wanted = self.wanted
        converters: dict[str, tuple[pa.DataType, Callable[[Any], Any]]] = {}
        for name, level in self.levels.items():
            converters[name] = (_LEVELS[level], functools.partial(field_value, level=level))
        for name in [*wanted.needed, *wanted.optional]:
            key = wanted.needed.get(name, "data.time")
            if name in wanted.history:
                convert = functools.partial(_ids, name=name, separator=wanted.history_separator)
                converters[name] = (pa.list_(pa.string()), convert)
            elif key.startswith(_ID_KEYS):
                converters[name] = (pa.string(), functools.partial(id_text, name=name))
            elif key == "data.value":
                converters[name] = (pa.string(), readable)
            else:
                converters[name] = (pa.string(), functools.partial(_single, name=name))
        return converters


def _record_or_none(line: bytes | None) -> dict[str, Any] | None:
    try:
        return parse_record(line)
    except InvalidRow:
        return None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_whole(line: bytes) -> bool:
    """Return whether a line is a whole value, valid or not, rather than the beginning of one."""
    return (line.endswith(b"]") and line != b"[]") or _is_json(line)


def _single(value: Any, name: str) -> str | None:
    value = unwrap(value)
    if isinstance(value, (list, tuple, dict)):
        raise InvalidRow(f"{name} is {'an object' if isinstance(value, dict) else 'a list'}", readable(value) or "")
    return None if value is None else readable(value)


def _ids(value: Any, name: str, separator: str | None) -> list[str | None] | None:
    if isinstance(value, str):
        return split_history(value, separator)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise InvalidRow(f"{name} is not a list", readable(value) or "")
    found = [id_text(each, name) for each in value]
    if None in found:
        raise InvalidRow(f"{name} contains an empty id")
    return found


class _Document:
    """Parser of a JSON document that yields one record at a time, with the line number of its beginning."""

    def __init__(self, file: RawFile, text: str, keyed: tuple[str, str]) -> None:
        self.file, self.text, self.keyed = file, text, keyed
        self.at, self.line, self.counted = 0, 1, 0
        self.undecodable = _UNDECODABLE.search(text) is not None
        self.decoder = json.JSONDecoder()

    def records(self) -> Iterator[tuple[int, dict[str, Any] | InvalidRow]]:
        """Yield (line number from 1, record); an `InvalidRow` instead of a record that is not an object.

        Raises:
            DataError: the document is not valid JSON.
        """
        self._space()
        opening = self.text[self.at : self.at + 1]
        if opening == "[" or self._is_object_of_records():
            self.at += 1
            yield from self._elements("]") if opening == "[" else self._members()
            self.at += 1
            self._space()
            if self.at < len(self.text):
                raise self._invalid("text after its end")
        else:  # objects one after another, each over several lines
            yield from self._elements("")

    def _is_object_of_records(self) -> bool:
        """Return whether the object is `{id: {...}}`, `{user: [...]}` or `{id: text}`, not a record itself."""
        match = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*([\[{"0-9nNtf-])').match(self.text, self.at)
        if match is None:
            return False
        if match[1] in "[{":
            return True
        end = self._end_of_value()
        return end is None or not self.text[end:].strip()  # one object of plain values: {id: text}

    def _end_of_value(self) -> int | None:
        try:
            return self.decoder.raw_decode(self.text, self.at)[1]
        except (ValueError, RecursionError):
            return None

    def _elements(self, closing: str) -> Iterator[tuple[int, dict[str, Any] | InvalidRow]]:
        while not self._ends(closing):
            number, begin = self._number(), self.at
            yield number, self._checked(self._value(), begin)

    def _members(self) -> Iterator[tuple[int, dict[str, Any] | InvalidRow]]:
        key_name, value_name = self.keyed
        while not self._ends("}"):
            number, begin = self._number(), self.at
            key = self._value()
            self._space()
            if not isinstance(key, str) or self.text[self.at : self.at + 1] != ":":
                raise self._invalid("a key and a colon are expected")
            self.at += 1
            self._space()
            value = self._value()
            record = {key_name: key, **value} if isinstance(value, dict) else {key_name: key, value_name: value}
            yield number, self._checked(record, begin)

    def _ends(self, closing: str) -> bool:
        self._space()
        if self.at >= len(self.text):
            if closing:
                raise self._invalid(f"it ends without {closing}")
            return True
        return bool(closing) and self.text[self.at] == closing

    def _space(self) -> None:
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]

    def _number(self) -> int:
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.line

    def _value(self) -> Any:
        try:
            value, self.at = self.decoder.raw_decode(self.text, self.at)
        except (ValueError, RecursionError) as error:
            self.at = getattr(error, "pos", self.at)
            raise self._invalid(getattr(error, "msg", "nested too deeply")) from None
        return value

    def _invalid(self, reason: str) -> DataError:
        return DataError(
            f"{self.file}:{self._number()}: not a valid JSON document ({reason}); JSON lines have one whole object on "
            f"each line of at most {MAX_LINE_BYTES:,} bytes"
        )

    def _checked(self, value: Any, begin: int) -> dict[str, Any] | InvalidRow:
        """Return the record that was parsed from the text since `begin`, or the reason why it is none."""
        if self.undecodable and (found := _UNDECODABLE.search(self.text, begin, self.at)):
            return InvalidRow("not UTF-8", f"byte 0x{ord(found[0]) - 0xDC00:02x}; set data.encoding")
        if not isinstance(value, dict):
            return InvalidRow(f"a {type(value).__name__}, not an object")
        try:
            check_text(value)
        except InvalidRow as reason:
            return reason
        return value
