"""Reader of text tables (CSV, TSV and similar). One bad line is one bad row, regardless of its position and content.

The text is split into records first; well-formed ones are parsed by Arrow, one block at a time. A field that begins
with the quote ends with it and may contain line breaks. A quote that is never closed, or whose field would span lines
that are rows themselves, invalidates its own line only: parsing continues with the next line. Lines are reconciled with
rows.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

from tiger.core.errors import DataError
from tiger.data.readers.grammar import Grammar
from tiger.data.readers.lines import text_blocks
from tiger.data.readers.raw_files import RawFile
from tiger.data.readers.row_counts import RowCounts, listed
from tiger.data.readers.table import Block, Wanted
from tiger.data.readers.values import short

log = logging.getLogger(__name__)

RECORD_CAP = 8 << 20
_SEPARATORS = (",", "\t", ";", "|", "::")
_INNER = "\x1f"  # replaces a separator of several bytes
_TYPED = re.compile(r"(.+):(token|token_seq|float|float_seq)")  # RecBole's atomic files
_NUMERIC = re.compile(rb"[+-]?[0-9][0-9.:/ T-]*")
_OPEN, _ADJACENT = "a quote opens here and is not closed", "text next to a quoted field"
_SWALLOWED = "a quote opens here and closes in a later row"
_QUOTE_HINT = 'data.quote = "" reads quotes as text'


class DelimitedTable:
    """One text table: its column names, and its rows as text."""

    def __init__(self, file: RawFile, wanted: Wanted) -> None:
        """Detect separator, header and columns from the first lines.

        Raises:
            DataError: required columns are missing; shows the first line.
        """
        self.file, self.wanted = file, wanted
        self.lines = self.rows = self.bad = self.extra = 0
        self.numeric: list[bool] = []  # which fields of the first row are numeric
        head = self._head()
        self.names: list[str] = []
        self.header, self.separator = False, wanted.separator or ","
        self.first_line = 1 + len(head) - len(head.lstrip(b"\n"))
        if head.strip():
            self._find_layout(head)
        self.grammar, text = self._in_grammar(self.separator, head)
        self._find_numeric_fields(text)
        self.columns = {name: pa.string() for name in self.names}
        self.selected = wanted.selected(self.names)
        self.keys = [self.names.index(name) for name in wanted.keys if name in self.names]

    # --- the first line -----------------------------------------------------------------------------------------

    def _head(self) -> bytes:
        head = b""
        for block in text_blocks(self.file.whole, self.wanted.encoding):
            head += block
            if len(head.lstrip(b"\n")) >= 1 << 16 or len(head) > RECORD_CAP:
                break
        if b"\0" in head[:4096]:
            raise DataError(f"{self.file}: a binary file, or text in another encoding; set data.encoding")
        return head

    def _in_grammar(self, separator: str, text: bytes) -> tuple[Grammar, bytes]:
        """Return the grammar of a separator, and the text in which that separator is one byte."""
        if len(separator.encode()) == 1:
            return Grammar.of(separator, self.wanted.quote), text
        return Grammar.of(_INNER, self.wanted.quote), text.replace(separator.encode(), _INNER.encode())

    def _find_numeric_fields(self, text: bytes) -> None:
        """Record which fields of the first row are numeric."""
        for number in range(10):
            record = self.grammar.first_record(text) or b""
            text = text.lstrip(b"\n")[len(record) + 1 :]
            fields = self.grammar.split(record)
            if len(fields) == len(self.names) and not (self.header and number == 0):
                self.numeric = [_NUMERIC.fullmatch(field) is not None for field in fields]
                return

    def _find_layout(self, head: bytes) -> None:
        wanted = self.wanted
        found: dict[str, list[str]] = {}
        for separator in (wanted.separator,) if wanted.separator else _SEPARATORS:
            grammar, text = self._in_grammar(separator, head)
            record = grammar.first_record(text)
            names = [field.decode("utf-8", "replace").strip() for field in grammar.split(record or b"")]
            found[separator] = names
            typed = [match[1] if (match := _TYPED.fullmatch(name)) else "" for name in names]
            for candidate in (names, typed if all(typed) else []):
                if candidate and all(name in candidate for name in wanted.needed):
                    self.header = True
                    self._settle(separator, [name or f"column_{n}" for n, name in enumerate(candidate, 1)])
                    return
        best = max(found, key=lambda each: len(found[each]))
        if not wanted.columns:
            raise self._no_columns(head, found, best)
        fits = [s for s in found if len(found[s]) == len(wanted.columns)]
        if wanted.columns[-1] in wanted.history and not fits:
            fits = [s for s in found if len(found[s]) > 1] or [wanted.separator or " "]
        if not fits:
            raise DataError(
                f"{self.file}: the first line has {len(found[best])} fields separated by {best!r}, data.columns has "
                f"{len(wanted.columns)}: {listed(wanted.columns)}; correct {self._fixes(head)}"
            )
        wanted.check(self.file, list(wanted.columns), " in data.columns")
        self._settle(fits[0], list(wanted.columns))

    def _settle(self, separator: str, names: list[str]) -> None:
        self.wanted.check(self.file, names)
        if separator != (self.wanted.separator or ","):
            log.info("%s: the separator is %r", self.file, separator)
        self.separator, self.names = separator, names

    def _no_columns(self, head: bytes, found: dict[str, list[str]], best: str) -> DataError:
        used = self.wanted.separator or ","
        first, other = self._first_line(head)
        hidden = self.wanted.separator is None and self.wanted.other_separator is not None
        more = ""
        if used not in first and (other or self.wanted.separator) and not hidden:
            contains = f"contains {other!r} and no {used!r}" if other else f"does not contain {used!r}"
            more = f"; the first line {contains}: set {self.wanted.set_separator(other)}"
        more += f"; if the first line ({short(first)}) is not a header, list the names in {self.wanted.set_columns()}"
        try:
            self.wanted.check(self.file, found[best], more)
        except DataError as error:
            return error
        return DataError(f"{self.file}: the columns cannot be found{more}")

    def _fixes(self, head: bytes) -> str:
        """Return the settings to correct if the first line does not have the number of fields of `data.columns`."""
        first, other = self._first_line(head)
        if self.wanted.separator is not None and self.wanted.separator not in first:
            return f"{self.wanted.set_columns()} or set {self.wanted.set_separator(other)}"
        return f"{self.wanted.set_columns()} or data.separator"

    def _first_line(self, head: bytes) -> tuple[str, str | None]:
        """Return the first line, and a usual separator in it, other than the one of the configuration."""
        first = head.lstrip(b"\n").partition(b"\n")[0].decode("utf-8", "replace")
        used = self.wanted.separator or ","
        return first, next((each for each in _SEPARATORS if each != used and each in first), None)

    # --- rows ---------------------------------------------------------------------------------------------------

    def select(self, fields: Collection[str]) -> None:
        """Read only these and the needed columns from now on."""
        self.selected = [name for name in self.selected if name in fields or name in self.wanted.needed]

    def blocks(self, ledger: RowCounts) -> Iterator[Block]:
        """Yield the rows as text; empty fields are null.

        Raises:
            DataError: the numbers of lines and rows do not match.
        """
        for text, numbers in self._chunks(ledger):
            if self.header and numbers[0] == self.first_line:
                first = self.grammar.first_record(text)
                text, numbers = text[len(first or b"") + 1 :], numbers[1:]
                self.extra += 1
            if len(numbers):
                yield from self._parse(text, numbers, ledger)
        if self.lines != self.rows + self.bad + self.extra:
            raise DataError(
                f"{self.file}: {self.lines:,} lines, but {self.rows + self.bad:,} rows and {self.extra:,} other lines: "
                "this is a bug in the reader; please report it"
            )
        ledger.lines += self.lines
        ledger.extra_lines += self.extra

    def _skip(self, ledger: RowCounts, number: int, reason: str, detail: str = "") -> None:
        self.bad += 1
        ledger.skip(self.file, number, reason, detail)

    def _chunks(self, ledger: RowCounts) -> Iterator[tuple[bytes, npt.NDArray[np.int64]]]:
        """Yield (well-formed records, line number of each)."""
        pending, line, overlong = b"", self.file.first_number, False
        separator = self.separator.encode()
        for block in self._with_end():
            final = block == b""
            if overlong:
                _, newline, block = block.partition(b"\n")
                if not newline and not final:
                    continue
                line, overlong = line + 1, False
            data = pending + block
            if final and data and not data.endswith(b"\n"):
                data += b"\n"
            end = data.rfind(b"\n") + 1
            pending = data[end:]
            if end:
                whole = data[:end]
                if len(separator) > 1:
                    whole = whole.replace(separator, _INNER.encode())
                parts, used, line = self._scan(whole, line, final, ledger)
                if used < len(whole):
                    rest = whole[used:]
                    pending = (rest.replace(_INNER.encode(), separator) if len(separator) > 1 else rest) + pending
                if parts:
                    yield b"".join(text for text, _ in parts), np.concatenate([numbers for _, numbers in parts])
            elif len(pending) > RECORD_CAP:
                self.lines += 1
                self._skip(ledger, line, f"line longer than {RECORD_CAP:,} bytes")
                pending, overlong = b"", True

    def _with_end(self) -> Iterator[bytes]:
        yield from text_blocks(self.file, self.wanted.encoding)
        yield b""

    def _scan(
        self, data: bytes, line: int, final: bool, ledger: RowCounts
    ) -> tuple[list[tuple[bytes, npt.NDArray[np.int64]]], int, int]:
        """Split whole lines into records: ([(records, line number of each)], bytes used, number of the next line)."""
        parts: list[tuple[bytes, npt.NDArray[np.int64]]] = []
        grammar, at = self.grammar, 0
        while at < len(data):
            if match := grammar.run.match(data, at):
                text = match.group()
                count = text.count(b"\n")
                self.lines += count
                parts.append(self._clean(text, np.arange(line, line + count), ledger))
                line, at = line + count, match.end()
                continue
            match = grammar.record.match(data, at)
            if match and not self._swallows(match.group(), line):
                text = match.group()
                count = text.count(b"\n")
                self.lines, self.extra = self.lines + count, self.extra + count - 1
                parts.append(self._clean(text, np.array([line]), ledger, one=True))
                line, at = line + count, match.end()
                continue
            is_open = match is None and grammar.open.match(data, at) is not None
            if is_open and not final and len(data) - at < RECORD_CAP:
                break
            end = data.index(b"\n", at) + 1
            reason = _SWALLOWED if match else _OPEN if is_open or data.count(grammar.quote, at, end) % 2 else _ADJACENT
            shown = short(
                data[at : end - 1].replace(_INNER.encode(), self.separator.encode()).decode("utf-8", "replace")
            )
            self.lines += 1
            self._skip(ledger, line, reason, f"{shown}; {_QUOTE_HINT}")
            line, at = line + 1, end
        return [part for part in parts if len(part[1])], at, line

    def _swallows(self, record: bytes, line: int) -> bool:
        """Return whether the lines of a record with line breaks are rows that a stray quote has joined.

        They are if an id or a time contains a line break, or if every line is like the first row of the file: the same
        number of fields, and numbers in the same columns.
        """
        if self.header and line == self.first_line:
            return False
        fields = self.grammar.split(record[:-1])
        if any(b"\n" in fields[key] for key in self.keys if key < len(fields)):
            return True
        if not any(self.numeric):
            return False
        for each in record[:-1].split(b"\n"):
            raw = [field.strip(b' "') for field in each.split(self.grammar.separator)]
            if len(raw) != len(self.numeric):
                return False
            if any(number and not _NUMERIC.fullmatch(value) for number, value in zip(self.numeric, raw, strict=True)):
                return False
        return True

    def _clean(
        self, text: bytes, numbers: npt.NDArray[np.int64], ledger: RowCounts, one: bool = False
    ) -> tuple[bytes, npt.NDArray[np.int64]]:
        """Drop blank lines and records that are not UTF-8; count them."""
        try:
            text.decode()
            if not (text.startswith(b"\n") or b"\n\n" in text) or one:
                return text, numbers
        except UnicodeDecodeError:
            pass
        kept, kept_numbers = [], []
        for record, number in zip([text] if one else text.splitlines(keepends=True), numbers.tolist(), strict=True):
            try:
                record.decode()
            except UnicodeDecodeError as error:
                shown = short(record.strip().replace(_INNER.encode(), self.separator.encode()).decode("latin-1"))
                detail = f"byte 0x{record[error.start]:02x} in {shown}; set data.encoding, for example to latin-1"
                self._skip(ledger, number, f"not {self.wanted.encoding.upper()}", detail)
                continue
            if record == b"\n":
                self.extra += 1
                continue
            kept.append(record)
            kept_numbers.append(number)
        return b"".join(kept), np.array(kept_numbers, np.int64)

    def _parse(self, text: bytes, numbers: npt.NDArray[np.int64], ledger: RowCounts) -> Iterator[Block]:
        if self.names[-1] in self.wanted.history:
            yield self._open_ended(text, numbers, ledger)
            return
        width, bad = len(self.names), []

        def invalid(row: pcsv.InvalidRow) -> str:
            bad.append((row.number - 1, row.actual_columns))
            return "skip"

        options = pcsv.ParseOptions(
            delimiter=self.grammar.separator.decode(),
            quote_char=self.wanted.quote or False,
            newlines_in_values=bool(self.wanted.quote),
            invalid_row_handler=invalid,
            ignore_empty_lines=False,
        )
        table = pcsv.read_csv(
            pa.BufferReader(text),
            pcsv.ReadOptions(column_names=self.names, use_threads=False, block_size=len(text) + 1),
            options,
            pcsv.ConvertOptions(
                column_types=self.columns,
                include_columns=self.selected,
                null_values=[""],
                strings_can_be_null=True,
                check_utf8=False,
            ),
        ).combine_chunks()
        for row, found in bad:
            self._skip(ledger, int(numbers[row]), f"{found} columns instead of {width}")
        if bad:
            numbers = np.delete(numbers, [row for row, _ in bad])
        self.rows += table.num_rows
        if table.num_rows != len(numbers):
            raise DataError(
                f"{self.file}: lines {numbers[0]:,} to {numbers[-1]:,} contain {len(numbers):,} rows, but "
                f"{table.num_rows:,} were parsed: this is a bug in the reader; please report it"
            )
        if len(self.separator.encode()) > 1:  # in a quoted field
            columns = [pc.replace_substring(column, _INNER, self.separator) for column in table.columns]
            table = pa.table(columns, schema=table.schema)
        for batch in table.to_batches():
            yield Block(numbers, batch)

    def _open_ended(self, text: bytes, numbers: npt.NDArray[np.int64], ledger: RowCounts) -> Block:
        """Parse lines whose last column is the remainder of the line: `user item item ...`."""
        width = len(self.names)
        rows, kept = [], []
        is_blank = self.grammar.separator == b" "
        for record, number in zip(self.grammar.records(text), numbers.tolist(), strict=True):
            fields = [
                field.decode() for field in self.grammar.split_open(record.strip() if is_blank else record, width)
            ]
            if len(fields) < width - 1:
                self._skip(ledger, number, f"{len(fields)} columns instead of {width}")
                continue
            if len(self.separator.encode()) > 1:  # white space between items, unless they have a separator
                whole = width if self.wanted.history_separator else width - 1
                fields = [each.replace(_INNER, self.separator) for each in fields[:whole]] + fields[whole:]
            rows.append([field or None for field in fields] + [None] * (width - len(fields)))
            kept.append(number)
        self.rows += len(rows)
        columns = [pa.array([row[self.names.index(name)] for row in rows], pa.string()) for name in self.selected]
        return Block(np.array(kept, np.int64), pa.RecordBatch.from_arrays(columns, self.selected))
