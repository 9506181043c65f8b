"""Sections of raw files that can be read independently: lines of a text file, row groups of a Parquet file."""

from __future__ import annotations

import codecs
import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tiger.data.readers.raw_files import RawFile, Span

SECTION_BYTES = 64 << 20
"""Bytes of a section, at least; of Parquet, uncompressed."""

_CHUNK = 4 << 20


@dataclass(frozen=True)
class QuoteUse:
    """How a file uses its quote character, if the first quote opens a field, the second closes it, and so on.

    Attributes:
        neighbors: the bytes before opening and after closing quotes, without line ends and quotes.
        has_line_breaks: whether there is a line break between an opening and a closing quote, or one is not closed.
    """

    neighbors: bytes
    has_line_breaks: bool

    def is_regular(self, separator: bytes) -> bool:
        """Return whether each quote encloses a field, or is doubled in one, and each line is a record."""
        return not self.has_line_breaks and set(self.neighbors) <= {*separator}


@dataclass(frozen=True)
class Scan:
    """What one pass over the bytes of a file finds.

    Attributes:
        sha256: checksum in hexadecimal.
        size: bytes.
        begins: (offset, number) of the lines at which sections may begin, about `SECTION_BYTES` apart; the first is
            (0, 1). Only of a plain text file whose encoding is a superset of ASCII.
        quotes: how the file uses the quote character; None: it does not occur, or the file is none of these.
    """

    sha256: str
    size: int
    begins: tuple[tuple[int, int], ...]
    quotes: QuoteUse | None = None


def scan(file: RawFile, quote: bytes = b"") -> Scan:
    """Read a file once, in chunks.

    Args:
        file: the file.
        quote: the quote character, one byte; empty: none.

    Raises:
        DataError: the file cannot be read.
    """
    sha, begins, quotes = hashlib.sha256(), [(0, 1)], _QuoteScan(quote)
    offset, number, after_return, splittable = 0, 1, False, True
    try:
        with file.open() as stream:
            while chunk := stream.read(_CHUNK):
                sha.update(chunk)
                if not offset:
                    splittable = not chunk.startswith((b"\x1f\x8b", b"PAR1", b"\xff\xfe", b"\xfe\xff"))
                if splittable:
                    quotes.add(chunk if offset else chunk.removeprefix(codecs.BOM_UTF8))
                    number -= after_return and chunk.startswith(b"\n")  # half of a line end
                    after_return = chunk.endswith(b"\r")
                    if offset + len(chunk) >= begins[-1][0] + SECTION_BYTES and (at := chunk.find(b"\n")) >= 0:
                        begins.append((offset + at + 1, number + _line_ends(chunk[: at + 1])))
                    number += _line_ends(chunk)
                offset += len(chunk)
    except OSError as error:
        raise file.unreadable(error) from None
    if begins[-1][0] == offset:
        begins.pop()
    return Scan(sha.hexdigest(), offset, tuple(begins) if splittable else (), quotes.result())


class _QuoteScan:
    """Finds the `QuoteUse` of a text that comes in chunks; the rest of an irregular one is passed over."""

    def __init__(self, quote: bytes) -> None:
        self.quote = quote
        self.count = 0
        self.neighbors = np.zeros(256, bool)
        self.has_line_breaks = False
        self.before = b"\n"

    @property
    def other_neighbors(self) -> bytes:
        """The neighbors that are neither line ends nor quotes: a regular text has one at most, its separator."""
        found = np.flatnonzero(self.neighbors).astype(np.uint8).tobytes()
        return bytes(byte for byte in found if byte not in b"\r\n" + self.quote)

    def add(self, chunk: bytes) -> None:
        """Add the next bytes."""
        is_irregular = self.has_line_breaks or len(self.other_neighbors) > 1
        if not self.quote or not chunk or is_irregular or (not self.count and self.quote not in chunk):
            self.before = chunk[-1:] or self.before
            return
        if self.count % 2 == 0 and self.before == self.quote:  # closed by the last byte of the chunk before
            self.neighbors[chunk[0]] = True
        text = np.frombuffer(self.before + chunk, np.uint8)
        own = text[1:]
        at = np.flatnonzero(own == self.quote[0])
        opening, closing = at[self.count % 2 :: 2], at[1 - self.count % 2 :: 2]
        self.neighbors[text[opening]] = True
        self.neighbors[own[closing[closing < len(own) - 1] + 1]] = True
        breaks = np.flatnonzero((own == ord("\n")) | (own == ord("\r")))
        self.has_line_breaks = bool(((self.count + np.searchsorted(at, breaks)) % 2).any())
        self.count += len(at)
        self.before = chunk[-1:]

    def result(self) -> QuoteUse | None:
        """Return what was found; None without a quote."""
        return QuoteUse(self.other_neighbors, self.has_line_breaks or self.count % 2 == 1) if self.count else None


def _line_ends(text: bytes) -> int:
    count = text.count(b"\n")
    return count + text.count(b"\r") - text.count(b"\r\n") if b"\r" in text else count


def text_sections(file: RawFile, scanned: Scan) -> list[RawFile]:
    """Return sections of whole lines of a plain text file; the file itself if it has one only."""
    if len(scanned.begins) < 2:
        return [file]
    ends = [begin for begin, _ in scanned.begins[1:]] + [scanned.size]
    return [file.section(Span(begin, end, number)) for (begin, number), end in zip(scanned.begins, ends, strict=True)]


def parquet_sections(file: RawFile) -> list[RawFile]:
    """Return sections of whole row groups of a Parquet file; the file itself if it has one only, or is damaged."""
    try:
        with file.open() as stream, pq.ParquetFile(stream) as parquet:
            groups = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
            sizes = [(group.total_byte_size, group.num_rows) for group in groups]
    except (pa.ArrowException, OSError):
        return [file]  # its reader reports what is wrong with it
    cuts, held = [0], 0
    for group, (size, _) in enumerate(sizes):
        held += size
        if held >= SECTION_BYTES and group + 1 < len(sizes):
            cuts.append(group + 1)
            held = 0
    if len(cuts) == 1:
        return [file]
    rows = [0, *itertools.accumulate(rows for _, rows in sizes)]
    return [file.section(Span(begin, end, rows[begin] + 1)) for begin, end in itertools.pairwise([*cuts, len(sizes)])]
