"""Sections of raw files that can be read independently: lines of a text file, row groups of a Parquet file."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from tiger.data.readers.raw_files import RawFile, Span

SECTION_BYTES = 64 << 20
"""Bytes of a section, at least; of Parquet, uncompressed."""

_CHUNK = 4 << 20


@dataclass(frozen=True)
class Scan:
    """What one pass over the bytes of a file finds.

    Attributes:
        sha256: checksum in hexadecimal.
        size: bytes.
        begins: (offset, number) of the lines at which sections may begin, about `SECTION_BYTES` apart; the first is
            (0, 1). Only of a plain text file whose encoding is a superset of ASCII.
        marks: those of the bytes asked for that occur.
    """

    sha256: str
    size: int
    begins: tuple[tuple[int, int], ...]
    marks: bytes


def scan(file: RawFile, marks: bytes = b"") -> Scan:
    """Read a file once, in chunks.

    Args:
        file: the file.
        marks: bytes to look for, such as a quote.

    Raises:
        DataError: the file cannot be read.
    """
    sha, begins, found = hashlib.sha256(), [(0, 1)], set[int]()
    offset, number, after_return, splittable = 0, 1, False, True
    try:
        with file.open() as stream:
            while chunk := stream.read(_CHUNK):
                sha.update(chunk)
                if not offset:
                    splittable = not chunk.startswith((b"\x1f\x8b", b"PAR1", b"\xff\xfe", b"\xfe\xff"))
                if splittable:
                    found.update(mark for mark in marks if mark not in found and bytes([mark]) in chunk)
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
    return Scan(sha.hexdigest(), offset, tuple(begins) if splittable else (), bytes(sorted(found)))


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
