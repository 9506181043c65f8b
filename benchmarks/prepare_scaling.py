"""Raw files to the catalog at scale: seconds, rows per second and peak memory of `jobs.prepare`, as one line of JSON.

    uv run python benchmarks/prepare_scaling.py [events=50000000] [items=1000000] [format=csv] [root=FOLDER]
        [key=value of the configuration ...]

Generates interactions of users with 36-character ids (as of uuid4, by a seed), ten per user on average, and items with
a title of five words and their id, in chunks; `format` is csv, csv.gz or parquet. Popularity is skewed, times rise with
noise. The files are kept in `root`, if it is given, and used again. `peak_gb` is the memory of all processes of the job
together, sampled; `high_water_gb` is the kernel's own mark of the largest process. Progress goes to stderr.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
from whole_path import family

CHUNK = 1 << 20
_SAMPLE_SECONDS = 0.2
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_WORDS = ["amber", "brisk", "calm", "dusty", "early", "faint", "gilded", "hollow", "ivory", "jolly", "kettle", "lamp"]


def uuids(count: int, seed: int) -> pa.LargeStringArray:
    """Return `count` distinct ids that look like those of uuid4."""
    data = np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)
    data[:, 6] = data[:, 6] & 0x0F | 0x40
    data[:, 8] = data[:, 8] & 0x3F | 0x80
    digits = np.stack([_HEX[data >> 4], _HEX[data & 15]], axis=2).reshape(count, 32)
    text = np.full((count, 36), ord("-"), np.uint8)
    for begin, at, length in ((0, 0, 8), (8, 9, 4), (12, 14, 4), (16, 19, 4), (20, 24, 12)):
        text[:, at : at + length] = digits[:, begin : begin + length]
    return strings(text)


def strings(text: npt.NDArray[np.uint8]) -> pa.LargeStringArray:
    """Return rows of equal length as a column of text."""
    offsets = np.arange(len(text) + 1, dtype=np.int64) * text.shape[1]
    return pa.LargeStringArray.from_buffers(len(text), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(text)))


def item_ids(count: int) -> pa.LargeStringArray:
    """Return ids such as B00001234."""
    number = np.arange(count)
    text = np.full((count, 10), ord("B"), np.uint8)
    for at in range(9, 0, -1):
        number, digit = np.divmod(number, 10)
        text[:, at] = digit + ord("0")
    return strings(text)


def item_chunks(count: int) -> Iterator[pa.Table]:
    ids, random, words = item_ids(count), np.random.default_rng(1), pa.array(_WORDS)
    for begin in range(0, count, CHUNK):
        own = ids.slice(begin, CHUNK)
        columns = [words.take(pa.array(random.integers(0, len(_WORDS), len(own)))) for _ in range(5)]
        yield pa.table({"item_id": own, "title": pc.binary_join_element_wise(*columns, own.cast(pa.string()), " ")})


def event_chunks(events: int, items: int) -> Iterator[pa.Table]:
    users, ids, random = uuids(max(events // 10, 1), 0), item_ids(items), np.random.default_rng(2)
    for begin in range(0, events, CHUNK):
        rows = min(CHUNK, events - begin)
        user = random.integers(0, len(users), rows)
        item = (items * random.random(rows) ** 2).astype(np.int64)
        seconds = 1_500_000_000 + begin // 10 + random.integers(0, 86_400, rows)
        columns = [users.take(pa.array(user)), ids.take(pa.array(item)), pa.array(seconds)]
        yield pa.table(columns, names=["user_id", "item_id", "timestamp"])


def write(path: Path, chunks: Iterator[pa.Table], form: str) -> None:
    """Write a table as a whole or not at all, a chunk at a time."""
    if path.exists():
        return
    partial = path.with_name(f".{path.name}")
    first = next(chunks)
    with contextlib.ExitStack() as stack:
        if form == "parquet":
            writer: Any = stack.enter_context(pq.ParquetWriter(partial, first.schema))
        else:
            sink = gzip.open(partial, "wb", compresslevel=1) if form == "csv.gz" else partial.open("wb")  # noqa: SIM115
            writer = stack.enter_context(pcsv.CSVWriter(stack.enter_context(sink), first.schema))
        for chunk in (first, *chunks):
            writer.write_table(chunk)
    partial.rename(path)


def status(pid: int, kind: str) -> float:
    """Return GB of a process's memory of one kind, 0 once it has ended."""
    try:
        found = re.search(rf"{kind}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(found[1]) / 2**20 if found else 0.0


def main() -> None:
    settings: dict[str, str] = {"events": "50_000_000", "items": "1_000_000", "format": "csv", "root": ""}
    overrides = []
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key in settings:
            settings[key] = value
        else:
            overrides.append(argument)
    events, items, form = int(settings["events"]), int(settings["items"]), settings["format"]
    folder = Path(settings["root"] or tempfile.mkdtemp(prefix="prepare-scaling-"))
    folder.mkdir(parents=True, exist_ok=True)
    names = {role: folder / f"{role}-{events}-{items}.{form}" for role in ("items", "interactions")}
    begin = time.monotonic()
    write(names["items"], item_chunks(items), form)
    write(names["interactions"], event_chunks(events, items), form)
    generated = time.monotonic() - begin
    runs = tempfile.mkdtemp(prefix="runs-", dir=folder)
    command = [
        sys.executable, "-m", "jobs.prepare", "data.kind=tables", f"root={runs}", 'catalog.text_fields=["title"]',
        *(f"data.{role}={path}" for role, path in names.items()), *overrides,
    ]  # fmt: skip
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = high = 0.0
    while process.poll() is None:
        own = list(family(process.pid))
        peak = max(peak, sum(status(pid, "VmRSS") for pid in own))
        high = max([high, *(status(pid, "VmHWM") for pid in own)])
        time.sleep(_SAMPLE_SECONDS)
    seconds = time.monotonic() - begin
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with exit code {process.returncode}")
    catalog = json.loads(output.splitlines()[-1])
    result = {
        "events": events, "items": items, "format": form,
        "raw_gb": round(sum(path.stat().st_size for path in names.values()) / 2**30, 3),
        "generated_seconds": round(generated, 1), "seconds": round(seconds, 1),
        "rows_per_second": round((events + items) / seconds), "peak_gb": round(peak, 3),
        "high_water_gb": round(high, 3), "catalog_users": catalog["users"], "catalog_items": catalog["items"],
        "catalog_interactions": catalog["interactions"],
    }  # fmt: skip
    shutil.rmtree(runs)
    if not settings["root"]:
        shutil.rmtree(folder)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
