"""An example of a data source: playlists as two text files with tab-separated columns.

songs.txt: id, title, genre.  plays.txt: user, song, seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from tiger.core.errors import DataError
from tiger.data.sources.base import (
    INTERACTIONS,
    DatasetConfig,
    Files,
    InvalidRow,
    RawFile,
    RowCounts,
    batches,
    identifier,
    lines,
    unix_micros,
)

SONGS = pa.schema([("source_id", pa.string()), ("title", pa.string()), ("genre", pa.string())])


class Config(DatasetConfig):
    """Where the playlists are."""

    kind: str = Field("tests.plugins.toy_dataset", description="songs and plays in tab-separated text files")
    path: str = Field(min_length=1, description="folder of songs.txt and plays.txt")


def locate(config: Config, cache: Path) -> Files:
    """Return the two files; a source that downloads its files writes them to `cache`.

    Raises:
        DataError: one of them does not exist.
    """
    songs, plays = Path(config.path) / "songs.txt", Path(config.path) / "plays.txt"
    for file in (songs, plays):
        if not file.is_file():
            raise DataError(f"{file} does not exist; correct data.path")
    return Files([RawFile.local(songs)], [RawFile.local(plays)])


def read_items(config: Config, files: Files, ledger: RowCounts) -> Iterator[pa.RecordBatch]:
    """Yield the songs."""
    return batches(_rows(files.items, _song, ledger), SONGS)


def read_interactions(config: Config, files: Files, ledger: RowCounts) -> Iterator[pa.RecordBatch]:
    """Yield the plays."""
    return batches(_rows(files.interactions, _play, ledger), INTERACTIONS)


def _rows(files: list[RawFile], parse: Any, ledger: RowCounts) -> Iterator[dict[str, Any]]:
    """Yield the parsed lines of all files; count every line as kept or skipped."""
    for file in files:
        for number, line in lines(file):
            try:
                row = parse(_columns(line))
            except InvalidRow as reason:
                ledger.skip(file, number, str(reason), reason.detail)
                continue
            ledger.keep()
            yield row


def _columns(line: bytes | None) -> list[str]:
    if line is None:
        raise InvalidRow("line too long")
    try:
        columns = line.decode().split("\t")
    except UnicodeDecodeError:
        raise InvalidRow("not UTF-8") from None
    if len(columns) != 3:
        raise InvalidRow("not three columns", f"{len(columns)} found")
    return columns


def _song(columns: list[str]) -> dict[str, Any]:
    song, title, genre = columns
    return {"source_id": identifier(song, "song id"), "title": title, "genre": genre}


def _play(columns: list[str]) -> dict[str, Any]:
    user, song, seconds = columns
    return {"user": identifier(user, "user"), "item": identifier(song, "song"), "time": unix_micros(seconds, "s")}
