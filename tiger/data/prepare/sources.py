"""The raw rows of a data source, cut into parts that tasks read independently."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tiger.core.config import load_plugin
from tiger.core.runner import Runner
from tiger.data.readers.row_counts import RowCounts
from tiger.data.readers.sections import Scan, scan
from tiger.data.sources.base import DatasetConfig, Files, RawFile, Role
from tiger.data.sources.tables import FileTypes, Types, join_types

_SCANNED_AT_ONCE = 8
_GZIP_RATIO, _PARQUET_RATIO = 6, 5  # bytes of text per byte of a file, as a rule of thumb


@dataclass(frozen=True)
class SourceData:
    """Rows of a source; see `RawData`.

    Attributes:
        config: of the source.
        parts: what each part of a table reads.
        types: of the fields of items, by file, if the source tells them.
        is_here: whether only this machine can read the files.
    """

    config: DatasetConfig
    parts: dict[Role, list[Files]]
    types: FileTypes | None = None
    is_here: bool = False

    def num_parts(self, role: Role) -> int:
        """Return the number of parts of a table."""
        return len(self.parts[role])

    def read(self, role: Role, part: int, fields: tuple[str, ...] | None) -> tuple[Iterator[pa.RecordBatch], RowCounts]:
        """Return the rows of a part, and their counts; see `RawData.read`."""
        module, counts, files = _module(self.config), RowCounts(role), self.parts[role][part]
        if role == "interactions":
            return module.read_interactions(self.config, files, counts), counts
        accepted = inspect.signature(module.read_items).parameters
        given = {name: value for name, value in (("fields", fields), ("types", self.types)) if name in accepted}
        return module.read_items(self.config, files, counts, **given), counts


def _module(config: DatasetConfig) -> Any:
    return load_plugin(DatasetConfig.plugin_package, config.kind)


def whole(config: DatasetConfig, files: Files) -> SourceData:
    """Return the rows of a source, each table in one part."""
    return SourceData(config, {"items": [files], "interactions": [files]})


def scan_files(config: DatasetConfig, files: Files) -> list[Scan]:
    """Read all files once, several at a time, in the order of `files.roles()`.

    Raises:
        DataError: a file cannot be read.
    """
    quote = getattr(_module(config), "quote", lambda config, role: b"")
    with ThreadPoolExecutor(_SCANNED_AT_ONCE) as pool:
        return list(pool.map(lambda pair: scan(pair[1], quote(config, pair[0])), files.roles()))


def expanded_bytes(file: RawFile, scanned: Scan) -> int:
    """Estimate the bytes of a file's content without its compression."""
    with file.open() as stream:
        begin = stream.read(4)
    if begin == b"PAR1":
        return scanned.size * _PARQUET_RATIO
    return scanned.size * (_GZIP_RATIO if begin.startswith(b"\x1f\x8b") else 1)


def cut(config: DatasetConfig, files: Files, scans: list[Scan], runner: Runner, is_here: bool = False) -> SourceData:
    """Return the rows of a source in as many parts as its files allow; see `SourceData`."""
    module = _module(config)
    by_role: dict[Role, list[tuple[RawFile, Scan]]] = {"items": [], "interactions": []}
    for (role, file), scanned in zip(files.roles(), scans, strict=True):
        by_role[role].append((file, scanned))
    parts: dict[Role, list[Files]] = {}
    for role, own in by_role.items():
        sections = None
        if hasattr(module, "parts") and own:
            sections = module.parts(config, role, [file for file, _ in own], [scanned for _, scanned in own])
        if sections is None:
            parts[role] = [files]
        elif role == "items":
            parts[role] = [Files([section], [], partial=True) for section in sections]
        else:
            parts[role] = [Files([], [section], partial=True) for section in sections]
    types: dict[str, Types] | None = None
    if hasattr(module, "item_types"):
        tasks = [(config, part) for part in parts["items"]]
        types = {}
        for found in runner.map(_item_types, tasks, what="find the fields of items", here=is_here):
            for label, fields in found.items():  # sections of one file may have other fields
                types[label] = join_types([types.get(label, {}), fields])
    return SourceData(config, parts, types, is_here)


def _item_types(config: DatasetConfig, files: Files) -> FileTypes:
    types: FileTypes = _module(config).item_types(config, files)
    return types
