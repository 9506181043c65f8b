"""The contract of a data source, and what all sources share: a ledger of lines, and careful readers of lines.

A source is a module in this folder (or anywhere, by its dotted name) with

    class Config(DatasetConfig)                         its knobs
    locate(config, cache) -> Files                      local raw files; downloads or generates them where needed
    read_items(config, files, ledger)                   -> record batches with `source_id` and any text fields
    read_interactions(config, files, ledger)            -> record batches of schema INTERACTIONS

Readers count every row in the ledger, kept or skipped, and stream: no reader holds more than a batch of rows.
`source_id` and all fields are raw here; `catalog.py` cleans, filters and numbers them.
"""

from __future__ import annotations

import ast
import gzip
import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import pyarrow as pa
from pydantic import Field

from tiger.config import PluginConfig
from tiger.errors import DataError

log = logging.getLogger(__name__)

INTERACTIONS = pa.schema([("user", pa.string()), ("item", pa.string()), ("time", pa.int64())])
"""One event a row: user and item by their names in the raw data, time in seconds since 1970."""

BATCH_ROWS = 8192
_EXPANDED_RATIO, _EXPANDED_FLOOR = 200, 1 << 24  # text shrinks to a tenth; a file of zeros to a thousandth
LINE_CAP = 256 * 1024  # ast.literal_eval takes 134 MB and 0.3 s for a line of this size, 1 GB for 8 MB


class DatasetConfig(PluginConfig):
    """Knobs that every source has."""

    plugin_package: ClassVar[str] = "tiger.datasets"
    default_kind: ClassVar[str] = "synthetic"

    kind: str = Field("synthetic", description="source of raw data: synthetic, amazon, tables, or a dotted module name")
    max_bad_rows: float = Field(0.01, ge=0, le=1, description="stop above this share of rows that cannot be read")


@dataclass(frozen=True)
class Files:
    """Local raw files of a source, in reading order."""

    items: list[Path]
    interactions: list[Path]


@dataclass
class Ledger:
    """What became of the rows of one raw table: read = kept + skipped."""

    table: str
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def keep(self, rows: int = 1) -> None:
        self.kept += rows

    def skip(self, path: Path, number: int, reason: str) -> None:
        """Counts row `number` (from 1) of `path` as unreadable; the first ones are kept as examples."""
        self.skipped[reason] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{path}:{number}: {reason}")

    @property
    def read(self) -> int:
        return self.kept + self.skipped.total()

    def close(self, max_bad_rows: float) -> None:
        """Says what was skipped.

        Raises:
            DataError: nothing was kept, or more than `max_bad_rows` of the rows were skipped.
        """
        bad = self.skipped.total()
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in self.skipped.most_common(5))
        shown = "; first: " + " | ".join(self.examples) if self.examples else ""
        if not self.kept:
            raise DataError(f"{self.table}: no row could be used of {self.read:,} read ({reasons or 'empty'}){shown}")
        if bad > max_bad_rows * self.read:
            raise DataError(
                f"{self.table}: {bad:,} of {self.read:,} rows cannot be read ({bad / self.read:.2%}, allowed are "
                f"{max_bad_rows:.2%}: data.max_bad_rows): {reasons}{shown}"
            )
        log.info("%s: %s rows read, %s kept, %s skipped", self.table, f"{self.read:,}", f"{self.kept:,}", f"{bad:,}")
        if bad:
            log.warning("%s: skipped %s%s", self.table, reasons, shown)

    def record(self) -> dict[str, Any]:
        return {"read": self.read, "kept": self.kept, "skipped": dict(self.skipped), "examples": self.examples}


class BadRow(Exception):
    """A row that cannot be used; its message is the reason in the ledger."""


def lines(path: Path, cap: int = LINE_CAP) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number from 1, line without its end) of a plain or gzip text file; None for a line above `cap` bytes.

    An overlong line is passed over without holding it in memory. Blank lines are left out. Members of a multi-member
    gzip file follow each other.

    Raises:
        DataError: not a readable file, or a gzip file that is truncated, damaged, or made to fill a disk.
    """
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream: Any = gzip.GzipFile(fileobj=raw) if compressed else raw

            def check() -> None:
                expanded = stream.tell() if compressed else 0
                if expanded > _EXPANDED_FLOOR and expanded > _EXPANDED_RATIO * raw.tell():
                    raise DataError(
                        f"{path}: the gzip file expands to more than {_EXPANDED_RATIO} times its size, which text does "
                        "not; look at what it holds"
                    )

            yield from _lines(stream, cap, check)
    except EOFError:
        raise DataError(f"{path}: the gzip file is cut off; download or copy it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged ({error}); download or copy it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _lines(stream: BinaryIO, cap: int, check: Callable[[], None]) -> Iterator[tuple[int, bytes | None]]:
    number = 0
    while line := stream.readline(cap + 1):
        number += 1
        if number % 4_096 == 0:
            check()
        if len(line) > cap and not line.endswith(b"\n"):
            while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
                check()
            yield number, None
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if stripped := line.strip():
            yield number, stripped


def parse_record(line: bytes | None) -> dict[str, Any]:
    """Reads one line as a JSON object or a Python dict literal.

    Raises:
        BadRow: with the reason.
    """
    if line is None:
        raise BadRow(f"line longer than {LINE_CAP:,} bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRow("not UTF-8") from None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        try:
            record = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise BadRow("neither JSON nor a Python literal") from None
    if not isinstance(record, dict):
        raise BadRow(f"a {type(record).__name__}, not an object")
    if "\\ud" in text.lower():
        try:
            json.dumps(record, ensure_ascii=False, default=str).encode()
        except (UnicodeEncodeError, TypeError):
            raise BadRow("lone surrogate in a string") from None
    return record


def identifier(value: Any, name: str) -> str:
    """A user's or item's name as text.

    Raises:
        BadRow: missing, empty, longer than 256 characters, or with control characters.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRow(f"no {name}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"no {name}")
    text = str(value).strip()
    if not text:
        raise BadRow(f"no {name}")
    if len(text) > 256 or not text.isprintable():
        raise BadRow(f"{name} is overlong or unprintable")
    return text


_YEAR_1990, _YEAR_2100 = 631_152_000, 4_102_444_800


def seconds(value: Any, per_second: int) -> int:
    """A time stamp in seconds since 1970, from a number of `per_second` units.

    Raises:
        BadRow: not a number, or outside the years 1990 to 2100 (the unit is wrong then).
    """
    if not isinstance(value, (str, int, float)):
        raise BadRow("time is missing or not a number")
    try:
        time = int(float(value) // per_second) if isinstance(value, (str, float)) else int(value) // per_second
    except (TypeError, ValueError, OverflowError):
        raise BadRow("time is missing or not a number") from None
    if not _YEAR_1990 <= time < _YEAR_2100:
        raise BadRow("time is outside the years 1990 to 2100")
    return time


def batches(rows: Iterator[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Packs rows of plain Python values into record batches of `schema`."""
    buffer: list[dict[str, Any]] = []
    for row in rows:
        buffer.append(row)
        if len(buffer) == BATCH_ROWS:
            yield pa.RecordBatch.from_pylist(buffer, schema=schema)
            buffer = []
    if buffer:
        yield pa.RecordBatch.from_pylist(buffer, schema=schema)


def existing(path: Path, hint: str) -> Path:
    """Passes a path on.

    Raises:
        DataError: it does not exist; `hint` says which key to set.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; {hint}")
    return path
