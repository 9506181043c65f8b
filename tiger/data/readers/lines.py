"""Text files as lines or blocks of whole lines: gzip by content, encodings, byte order marks, line ends."""

from __future__ import annotations

import ast
import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tiger.core.errors import DataError
from tiger.data.readers.meter import report
from tiger.data.readers.raw_files import RawFile, raw_file
from tiger.data.readers.row_counts import InvalidRow

MAX_LINE_BYTES = 256 * 1024  # ast.literal_eval takes 134 MB and 0.3 s for a line of this size, 1 GB for 8 MB
BLOCK = 1 << 20
_EXPANDED_RATIO, _EXPANDED_FLOOR = 900, 1 << 24  # constant JSON fields compress to 1/250; a file of zeros to 1/1030
_UNDECODABLE = "\udcff"  # becomes the byte 0xff, which is invalid in UTF-8, so that the line is a bad row
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or an Excel file",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstd",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF\r\n": "an HDF5 file",
    b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file",
}
"""Formats that are not read, by their first bytes."""

codecs.register_error("tiger-undecodable", lambda error: (_UNDECODABLE, error.end))  # type: ignore[attr-defined]


def text_blocks(file: Path | RawFile, encoding: str = "utf-8") -> Iterator[bytes]:
    """Yield the text of a plain or gzip file as UTF-8, with line feeds as line ends, in chunks of about 1 MiB.

    A byte order mark determines the encoding and is removed. Members of a gzip file are concatenated. Bytes that
    `encoding` cannot decode become bytes that are invalid in UTF-8; if `encoding` is UTF-8, all bytes are unchanged.

    Raises:
        DataError: not a readable text file, or a gzip file that is truncated, damaged, or a decompression bomb.
    """
    file = raw_file(file)
    try:
        with file.open() as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0 if file.span is None else file.span.begin)
            stream: Any = gzip.GzipFile(fileobj=raw) if compressed else raw
            yield from _blocks(file, raw, stream if file.span is None else _Section(raw, file.span.end), encoding)
    except EOFError:
        raise DataError(f"{file}: the gzip file is truncated; download or copy it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: the gzip file is damaged ({error}); download or copy it again") from None
    except OSError as error:
        raise file.unreadable(error) from None


class _Section:
    """A stream that ends before the end of its file."""

    def __init__(self, raw: BinaryIO, end: int) -> None:
        self.raw, self.end = raw, end

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes."""
        return self.raw.read(max(0, min(size, self.end - self.raw.tell())))


def foreign_format(begin: bytes) -> str | None:
    """Return the name of a format that is not read, given the first bytes of a file; None for all others."""
    return next((what for magic, what in _FOREIGN.items() if begin.startswith(magic)), None)


def _blocks(file: RawFile, raw: BinaryIO, stream: Any, encoding: str) -> Iterator[bytes]:
    block = stream.read(BLOCK)
    at_begin = file.span is None or not file.span.begin
    if at_begin and (what := foreign_format(block)):
        raise DataError(f"{file}: {what}, not a text table; unpack or export it as CSV, JSON lines or Parquet")
    for bom, name in _BOMS if at_begin else ():
        if block.startswith(bom):
            block, encoding = block[len(bom) :], name
            break
    utf8 = codecs.lookup(encoding).name == "utf-8"
    decoder = None if utf8 else codecs.getincrementaldecoder(encoding)("tiger-undecodable")
    carry = b""  # a carriage return at the end of a block may be half of a line end
    while True:  # once more after the last block: half a character at the end is an undecodable byte
        report(file, raw.tell())
        final = not block
        if decoder is not None:
            block = decoder.decode(block, final).encode("utf-8", "surrogateescape")
        block, carry = carry + block, b""
        if b"\r" in block:
            if block.endswith(b"\r") and not final:
                block, carry = block[:-1], b"\r"
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if block:
            yield block
        if final:
            return
        block = stream.read(BLOCK)
        expanded = stream.tell() if isinstance(stream, gzip.GzipFile) else 0
        if expanded > _EXPANDED_FLOOR and expanded > _EXPANDED_RATIO * raw.tell():
            raise DataError(
                f"{file}: the gzip file expands to more than {_EXPANDED_RATIO} times its size; it may be a "
                "decompression bomb"
            )


def lines(
    file: Path | RawFile, cap: int = MAX_LINE_BYTES, encoding: str = "utf-8"
) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number from 1, line without surrounding white space); None instead of a line longer than `cap` bytes.

    Over-long lines are skipped without buffering them. Blank lines are left out, but counted.

    Args:
        file: a plain or gzip text file.
        cap: maximum bytes per line.
        encoding: encoding of text without a byte order mark.

    Raises:
        DataError: see `text_blocks`.
    """
    number, rest, overlong = raw_file(file).first_number - 1, b"", False
    for block in text_blocks(file, encoding):
        first, *others = block.split(b"\n")
        rest += b"" if overlong else first
        overlong = overlong or len(rest) > cap
        if not others:
            rest = b"" if overlong else rest
            continue
        number += 1
        if overlong:
            yield number, None
        elif stripped := rest.strip():
            yield number, stripped
        for line in others[:-1]:
            number += 1
            if len(line) > cap:
                yield number, None
            elif stripped := line.strip():
                yield number, stripped
        rest = others[-1]
        overlong = len(rest) > cap
        rest = b"" if overlong else rest
    if overlong:
        yield number + 1, None
    elif stripped := rest.strip():
        yield number + 1, stripped


def parse_record(line: bytes | None) -> dict[str, Any]:
    """Parse one line as a JSON object or a Python dict literal.

    Args:
        line: text in UTF-8; None for a line that was too long.

    Raises:
        InvalidRow: with the reason.
    """
    if line is None:
        raise InvalidRow(f"line longer than {MAX_LINE_BYTES:,} bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRow("not UTF-8", f"byte 0x{line[error.start]:02x}") from None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        if len(line) > MAX_LINE_BYTES:
            raise InvalidRow(f"line longer than {MAX_LINE_BYTES:,} bytes and not JSON") from None
        try:
            record = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise InvalidRow("neither JSON nor a Python literal") from None
        check = "\\" in text or "0" in text  # an escape may be a surrogate, a hexadecimal number may be huge
    else:
        check = "\\ud" in text or "\\uD" in text
    if not isinstance(record, dict):
        raise InvalidRow(f"a {type(record).__name__}, not an object")
    if check:
        check_text(record)
    return record


def check_text(value: Any) -> None:
    """Reject values that cannot be written: lone surrogates, and integers with more digits than Python converts.

    Raises:
        InvalidRow: with the reason.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidRow("lone surrogate in a string") from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_text(key)
            check_text(inner)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for inner in value:
            check_text(inner)
    elif isinstance(value, int) and value.bit_length() > 8_192:
        raise InvalidRow("a number of thousands of digits")
