"""Random tables as CSV, JSON lines and Parquet, read by the product and by a slow reader in plain Python.

The plain reader works on the values that were written, not on the files, for Parquet and JSON; for CSV, into which
stray quotes, odd rows, undecodable bytes and blank lines are mixed, it reads the bytes of the file one field at a time.
`TIGER_FUZZ` sets the number of tables of the slow test.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fuzz.plain_reader import HIGH, LOW, UNITS, plain_csv, plain_id, plain_time
from tests.section_reading import read_parts
from tiger.core.config import load_plugin
from tiger.core.runner import InProcess
from tiger.data.prepare import sources
from tiger.data.readers import sections
from tiger.data.sources.base import DatasetConfig, Files, RowCounts

Event = tuple[str, str, int]


class Tables:
    """Random values and files; a function of the seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.unit = self.random.choice(list(UNITS))

    def text_id(self) -> str:
        kind = self.random.randrange(9)
        number = self.random.randrange(12)
        return [
            f"u{number}", f"{number:05d}", str(number), f"{number}.0", f"{number}.50", f"1e{number}", f"é{number}…",
            self.random.choice(["NA", "null", "nan", "None", "N/A", "NaN", "-", "0x1F", "true", "1_000", "+7", "-0.0"]),
            self.random.choice(["", " ", f" {number} ", "\u00a0", f"{number}.", f".{number}", "a b", "😀"]),
        ][kind]  # fmt: skip

    def time(self) -> Any:
        kind = self.random.randrange(12)
        whole = self.random.randrange(1_000_000_000, 1_000_000_009) * UNITS[self.unit] + self.random.randrange(
            UNITS[self.unit]
        )
        if kind < 7:
            return whole
        return [
            str(whole), f"{whole}.25", float(whole) if whole < 2**53 else whole, whole + 10**16,
            self.random.choice([None, "", "soon", -5, "1e9", 10**30, "2014-05-13T16:53:21.123456", "2014-05-13",
                                "2014-05-13 16:53:21Z", " 1400000000 ", "0x10", "1_400_000_000", "NaN", float("nan")]),
        ][kind - 7]  # fmt: skip

    def rows(self, count: int) -> list[list[Any]]:
        return [[self.text_id(), self.text_id(), self.time()] for _ in range(count)]

    def ending(self) -> str:
        return self.random.choice(["\n", "\r\n", "\r"])

    def store(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.write_bytes(gzip.compress(data) if self.random.random() < 0.2 else data)
        return str(path)

    def csv_file(self, name: str) -> tuple[str, list[Event], int]:
        end = self.ending()
        extra = self.random.randrange(4) if self.random.random() < 0.9 else 300
        names = ["user_id", "item_id", "timestamp"] + [f"note{n}" for n in range(extra)]
        lines = [",".join(names).encode()]
        for row in self.rows(self.random.randrange(60)):
            notes = [self.note() for _ in range(extra)]
            line = ",".join([self.field(value) for value in row] + notes).encode()
            lines.append(self.spoil(line))
        data = end.encode().join(lines) + (end.encode() if self.random.random() < 0.8 else b"")
        if self.random.random() < 0.3:
            data = b"\xef\xbb\xbf" + data
        rows, bad = plain_csv(data, len(names))
        events = [self.event(*row[:3]) for row in rows[1:]]
        kept = [event for event in events if event is not None]
        return self.store(name, data), kept, bad + len(events) - len(kept)

    def field(self, value: Any) -> str:
        text = "" if value is None else repr(value) if isinstance(value, float) else str(value)
        return '"' + text.replace('"', '""') + '"' if self.random.random() < 0.2 else text

    def note(self) -> str:
        return self.random.choice(
            [
                "",
                "plain",
                '"a, b"',
                '"say ""hi"""',
                '"two\nlines"',
                '5" pipe',
                "x" * 50,
                '"\n\n"',
                '""',
                "é",
                '"a\n,b\n"',
            ]
        )

    def spoil(self, line: bytes) -> bytes:
        kind = self.random.randrange(40)
        if kind == 0:
            return b'"' + line
        if kind == 1:
            return line.replace(b",", b',"', 1)
        if kind == 2:
            return line + b",more"
        if kind == 3:
            return line if b"\n" in line or b'"a, b' in line else line.rpartition(b",")[0]
        if kind == 4:
            return line[:1] + b"\xff" + line[1:]
        return b"" if kind == 5 else line

    def json_file(self, name: str) -> tuple[str, list[Event], int]:
        lines, events, bad = [], [], 0
        for _ in range(self.random.randrange(60)):
            row = [self.json_id(), self.json_id(), self.time()]
            record: dict[str, Any] = dict(zip(["user_id", "item_id", "timestamp"], row, strict=True))
            for n in range(self.random.randrange(3)):
                record[f"extra{n}"] = self.random.choice([1, None, "x", [1, "y"], {"a": None}, 1.5, True])
            items = list(record.items())
            self.random.shuffle(items)
            if self.random.random() < 0.05:
                items = [pair for pair in items if pair[0] != "timestamp"]
                row[2] = None
            line = json.dumps(dict(items), ensure_ascii=self.random.random() < 0.5)
            damage = self.random.randrange(30)
            line = {0: line[:-1], 1: f"[{line}]", 2: line.replace('"', '"\\ud800', 1), 3: "", 4: "\\"}.get(damage, line)
            lines.append(line)
            if damage == 3:
                continue
            event = None if damage in (0, 1, 2, 4) else self.event(*row)
            if event is None:
                bad += 1
            else:
                events.append(event)
        for _ in range(2):  # with less, it may be a document, or lack a column
            lines.append(json.dumps({"user_id": "u", "item_id": "i", "timestamp": 10**9 * UNITS[self.unit]}))
            events.append(("u", "i", 10**15))
        text = self.ending().join([*lines, ""])
        data = text.encode("utf-8", "surrogatepass")
        return self.store(name, (b"\xef\xbb\xbf" if self.random.random() < 0.3 else b"") + data), events, bad

    def json_id(self) -> Any:
        kind = self.random.randrange(14)
        number = self.random.randrange(12)
        if kind < 6:
            return self.text_id()
        return [
            number, float(number), number + 0.5, 10**self.random.randrange(25), -number, 1e10 * number,
            self.random.choice([None, float("nan"), float("inf"), True, [], ["a"], {"a": 1}, 1e300, "\u0000x", "🎉"]),
            {"$oid": f"{number:024x}"},
        ][kind - 6]  # fmt: skip

    def parquet_file(self, name: str) -> tuple[str, list[Event], int]:
        count = self.random.randrange(60)
        columns, values = {}, []
        for column in ("user_id", "item_id"):
            kind, found = self.id_column(count)
            columns[column] = pa.array(found, kind)
            values.append(found)
        kind, times = self.time_column(count)
        columns["timestamp"] = pa.array(times, kind)
        values.append(times)
        shuffled = list(columns)
        self.random.shuffle(shuffled)
        table = pa.table({column: columns[column] for column in shuffled})
        for column in ("user_id", "item_id"):
            if self.random.random() < 0.2 and table.schema.field(column).type in (pa.string(), pa.int64()):
                at = table.schema.get_field_index(column)
                table = table.set_column(at, column, table[column].dictionary_encode())
        path = self.folder / name
        pq.write_table(table, path, row_group_size=self.random.randrange(1, 40))
        found_events = [self.parquet_event(kind, *row) for row in zip(*values, strict=True)]
        events = [event for event in found_events if event is not None]
        return str(path), events, len(found_events) - len(events)

    def parquet_event(self, kind: pa.DataType, user: Any, item: Any, time: Any) -> Event | None:
        if time is not None and pa.types.is_timestamp(kind):
            micros = time * 10**6 // UNITS[kind.unit]
            names = plain_id(user), plain_id(item)
            return (*names, micros) if None not in names and LOW <= micros < HIGH else None  # type: ignore[return-value]
        return self.event(user, item, time)

    def id_column(self, count: int) -> tuple[pa.DataType, list[Any]]:
        kind = self.random.choice([pa.string(), pa.large_string(), pa.string_view(), pa.int32(), pa.int64(),
                                   pa.float64(), pa.decimal128(20, 3), pa.uint64(), pa.float32()])  # fmt: skip
        high = kind == pa.int64() and self.random.random() < 0.5
        values: list[Any] = []
        for _ in range(count):
            number = self.random.randrange(12)
            if self.random.random() < 0.1:
                values.append(None)
            elif pa.types.is_integer(kind):
                values.append(number + 2**62 if high else number)
            elif pa.types.is_floating(kind):
                values.append(self.random.choice([float(number), number + 0.5, float("nan"), 1e15, -0.0, 1e10]))
            elif pa.types.is_decimal(kind):
                values.append(Decimal(number) / (self.random.choice([1, 2, 4])))
            else:
                values.append(self.text_id())
        if kind == pa.float32():  # 1e10 has no exact value there
            values = [7.0 if value in (1e10, 1e15) else value for value in values]
        return kind, values

    def time_column(self, count: int) -> tuple[pa.DataType, list[Any]]:
        base = 1_000_000_000 * UNITS[self.unit]
        kind = self.random.choice(["int", "float", "text", "decimal", "ns", "us", "s", "tz"])
        if kind in ("ns", "us", "s", "tz"):
            unit = "us" if kind == "tz" else kind
            low, high = 10**9 * UNITS[unit], (10**9 + 9) * UNITS[unit]
            values = [None if self.random.random() < 0.1 else self.random.randrange(low, high) for _ in range(count)]
            return pa.timestamp(unit, "Europe/Berlin" if kind == "tz" else None), values
        if kind == "text":
            return pa.string(), [None if (t := self.time()) is None else str(t) for _ in range(count)]
        numbers: list[Any] = [base + self.random.randrange(9 * UNITS[self.unit]) for _ in range(count)]
        numbers = [None if self.random.random() < 0.1 else number for number in numbers]
        if kind == "float":
            halves = [None if n is None else self.random.choice([float(n), n + 0.5, math.nan]) for n in numbers]
            return pa.float64(), halves
        if kind == "decimal":
            return pa.decimal128(30, 2), [None if n is None else Decimal(n) + Decimal("0.25") for n in numbers]
        return pa.int64(), numbers

    def event(self, user: Any, item: Any, time: Any) -> Event | None:
        names = plain_id(unwrapped(user)), plain_id(unwrapped(item))
        micros = plain_time(time, self.unit)
        return None if None in names or micros is None else (*names, micros)  # type: ignore[return-value]


def unwrapped(value: Any) -> Any:
    return value["$oid"] if isinstance(value, dict) and list(value) == ["$oid"] else value


def check(seed: int, folder: Path) -> int:
    """Writes one to three files of mixed formats, reads them, compares; returns the number of rows."""
    folder.mkdir(exist_ok=True)
    tables = Tables(seed, folder)
    files, events, bad = [], [], 0
    for n in range(tables.random.randrange(1, 4)):
        writer, suffix = tables.random.choice(
            [(tables.csv_file, "csv"), (tables.json_file, "jsonl"), (tables.parquet_file, "parquet")]
        )
        path, found, skipped = writer(f"{n}.{suffix}")
        files.append(path)
        events += found
        bad += skipped
    values = {"kind": "tables", "items": files, "interactions": files, "time_unit": tables.unit}
    config, source = DatasetConfig.resolve(values), load_plugin("tiger.data.sources", "tables")
    ledger = RowCounts("interactions")
    batches = source.read_interactions(config, source.locate(config, folder), ledger)
    read = [tuple(row.values()) for batch in batches for row in batch.to_pylist()]
    assert read == events, f"seed {seed}: {files}"
    assert (ledger.kept, ledger.skipped.total()) == (len(events), bad), f"seed {seed}: {ledger}"
    if not any(file.endswith(".csv") for file in files):  # in CSV, a line break in a user's id is none of the items'
        batches = source.read_items(config, source.locate(config, folder), RowCounts("items"))
        items = {name for batch in batches for name in batch["source_id"].to_pylist()}
        assert {event[1] for event in events} <= items, f"seed {seed}"
    if seed % 8 == 0:
        check_sections(seed, config, source.locate(config, folder), tables.random)
    return len(events) + bad


def check_sections(seed: int, config: Any, files: Files, random: random.Random) -> None:
    """Compare reading in sections of a few bytes with reading at once: rows, counts, and lines of bad rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "SECTION_BYTES", random.choice([1, 100, 1_000]))
        patch.setattr(sections, "_CHUNK", random.choice([7, 64, 500]))
        scans = sources.scan_files(config, files)
        data = sources.cut(config, files, scans, InProcess())
    assert [scan.sha256 for scan in scans] == [file.digest() for _, file in files.roles()]
    whole = sources.whole(config, files)
    for role in ("items", "interactions"):
        of_whole = read_parts(whole, role)
        assert read_parts(data, role) == of_whole, f"seed {seed}: {role}, {[str(file) for _, file in files.roles()]}"


def test_random_tables_read_like_plain_python(tmp_path: Path) -> None:
    assert sum(check(seed, tmp_path / str(seed % 10)) for seed in range(400)) > 10_000


@pytest.mark.nightly
def test_twenty_thousand_random_tables_read_like_plain_python(tmp_path: Path) -> None:
    rows, tables = 0, int(os.environ.get("TIGER_FUZZ", "20000"))
    for seed in range(1_000, 1_000 + tables):
        rows += check(seed, tmp_path / str(seed % 10))
    print(f"{tables:,} tables, {rows:,} rows, 0 differences")
