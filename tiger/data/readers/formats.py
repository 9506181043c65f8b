"""Detection of a file's format: by its content, then by its name."""

from __future__ import annotations

from tiger.core.errors import DataError
from tiger.data.readers.lines import text_blocks
from tiger.data.readers.raw_files import RawFile

_JSON = (".jsonl", ".json", ".ndjson", ".jl")
_TEXT = (".csv", ".tsv", ".txt", ".dat", ".data", ".inter", ".item", ".tab", ".psv")


def find_format(file: RawFile, encoding: str) -> str:
    """Return "parquet", "csv" or "json".

    Args:
        file: the file.
        encoding: encoding of text without a byte order mark.

    Raises:
        DataError: the file cannot be read, or is neither Parquet nor text.
    """
    try:
        with file.open() as stream:
            begin = stream.read(4)
    except OSError as error:
        raise file.unreadable(error) from None
    if begin == b"PAR1":
        return "parquet"
    name = file.name.lower().removesuffix(".gz")
    if name.endswith(".parquet") and begin:
        raise DataError(f"{file}: not a readable Parquet file (it does not begin with PAR1); copy or export it again")
    if name.endswith(_JSON):
        return "json"
    if name.endswith(_TEXT):
        return "csv"
    for block in text_blocks(file.whole, encoding):
        if stripped := block.lstrip():
            if b"\0" in stripped[:4096]:
                raise DataError(
                    f"{file}: neither Parquet nor text; if it is a table, set data.format and data.encoding"
                )
            return "json" if stripped[:1] in (b"{", b"[") else "csv"
    return "csv"
