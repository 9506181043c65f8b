"""Write small raw data of every kind, and read them back."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tiger.core.config import load_plugin
from tiger.data.sources.base import (
    DatasetConfig,
    RowCounts,
)

ITEMS = [
    {
        "asin": "B1",
        "title": "Tea &amp; Mint",
        "brand": "Fern",
        "categories": [["Beauty", "Bath"], ["Home"]],
        "price": 9.99,
    },
    {"asin": "B2", "title": "Soap", "description": "Plain 'soap'."},
]
REVIEWS = [
    {"reviewerID": "U1", "asin": "B1", "unixReviewTime": 1_400_000_000},
    {"reviewerID": "U1", "asin": "B2", "unixReviewTime": 1_400_086_400},
]


def write(path: Path, rows: list[Any], form: str = "json", compress: bool = True) -> Path:
    text = "".join(
        (row if isinstance(row, str) else json.dumps(row) if form == "json" else repr(row)) + "\n" for row in rows
    )
    path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())
    return path


def amazon_folder(folder: Path, form: str = "literal", compress: bool = True) -> dict[str, Any]:
    suffix = ".json.gz" if compress else ".json"
    write(folder / f"meta_X{suffix}", ITEMS, form, compress)
    write(folder / f"reviews_X_5{suffix}", REVIEWS, "json", compress)
    return {"kind": "amazon", "path": str(folder)}


def tables(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.table({"item_id": ["a", "b"], "name": ["x", "y"]}), folder / "items.parquet")
    events = pa.table({"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": [1_400_000_000, 1_400_000_001]})
    pq.write_table(events, folder / "events.parquet")
    return {
        "kind": "tables",
        "items": [str(folder / "items.parquet")],
        "interactions": [str(folder / "events.parquet")],
    }


EXAMPLES = {
    "amazon": amazon_folder,
    "tables": tables,
    "synthetic": lambda folder: {"kind": "synthetic", "items": 200, "users": 50},
}


def read(values: dict[str, Any], cache: Path) -> tuple[pa.Table, pa.Table, RowCounts, RowCounts]:
    config = DatasetConfig.resolve(values)
    module = load_plugin("tiger.data.sources", values["kind"])
    files = module.locate(config, cache)
    items, events = RowCounts("items"), RowCounts("interactions")
    return (
        pa.Table.from_batches(list(module.read_items(config, files, items))),
        pa.Table.from_batches(list(module.read_interactions(config, files, events))),
        items,
        events,
    )


def playlists(folder: Path, users: int = 200) -> Path:
    """Write songs.txt and plays.txt of `tests.plugins.toy_dataset`: 60 songs in six genres, played round and round."""
    genres = ("jazz", "rock", "folk", "soul", "techno", "opera")
    times = ("Morning", "Evening", "Winter", "Summer", "Sunday", "Midnight", "Harvest", "Holiday", "Autumn", "Spring")
    songs = [
        f"s{number:02d}\t{times[number % 10]} {genres[number // 10]}\t{genres[number // 10]}" for number in range(60)
    ]
    plays = []
    for user in range(users):
        genre, start, length = user % 6, user // 6 % 10, 6 + user % 3
        for step in range(length):
            song = genre * 10 + (start + step) % 10
            plays.append(f"u{user:03d}\ts{song:02d}\t{1_400_000_000 + 60 * step}")
    (folder / "songs.txt").write_text("\n".join(songs) + "\n")
    (folder / "plays.txt").write_text("\n".join(plays) + "\n")
    return folder
