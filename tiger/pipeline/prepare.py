"""Prepare the catalog from raw files: items with one text each, histories in time order, splits.

Raw data up to `scale.in_process_megabytes` are prepared in this process; more by tasks on Ray, with the same result.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from tiger.core.artifacts import Artifact, Draft, stage
from tiger.core.config import Config, load_plugin
from tiger.core.external_sort import FolderStore, MemoryStore
from tiger.core.progress import Progress
from tiger.core.runner import InProcess
from tiger.core.storage import SCRATCH
from tiger.data import catalog
from tiger.data.catalog import CatalogConfig
from tiger.data.download import cache_folder
from tiger.data.prepare import sources
from tiger.data.prepare.build import ONE_RANGE, Sizes, build_catalog
from tiger.data.profile import format_profile
from tiger.data.readers.sections import Scan
from tiger.data.sources.base import DatasetConfig, Files, Meter, RawFile, Role, RowCounts, metered
from tiger.evaluation.health import check_catalog, require
from tiger.run import RunConfig

log = logging.getLogger(__name__)


class PrepareConfig(Config):
    """The options that determine a catalog."""

    data: DatasetConfig
    catalog: CatalogConfig


def prepare(run: RunConfig) -> Artifact:
    """Return the catalog artifact of a configuration."""
    source = load_plugin(DatasetConfig.plugin_package, run.data.kind)
    files: Files = source.locate(run.data, cache_folder())
    scans = sources.scan_files(run.data, files)
    raw = describe_files(files, scans)
    config = PrepareConfig(data=run.data, catalog=run.catalog)
    artifact = write_catalog.build(
        run.root, config, {}, run, files, scans, source=identify(raw), record={"raw_files": raw}
    )
    catalog.check_limits(artifact, run.data.max_bad_row_fraction, run.catalog.max_unknown_item_fraction)
    return artifact


@stage("catalog", verb="prepare")
def write_catalog(draft: Draft, run: RunConfig, files: Files, scans: list[Scan]) -> None:
    """Read the raw files with the module of their source, and write items, histories and splits."""
    reading = _Reading(files, scans, run.data.max_bad_row_fraction)
    expanded = sum(map(sources.expanded_bytes, (file for _, file in files.roles()), scans))
    if expanded <= run.scale.in_process_megabytes << 20:
        whole = _MeteredData(sources.whole(run.data, files), reading)
        profile = build_catalog(
            run.catalog, whole, draft.folder, store=MemoryStore(), runner=InProcess(), sizes=ONE_RANGE, reading=reading
        )
    else:
        profile = _prepare_on_ray(draft, run, files, scans, reading)
    log.info("catalog: %s", format_profile(profile))
    figures = ("items", "users", "interactions", "training_examples", "validation_users", "test_users")
    draft.metrics = {name: profile[name] for name in figures}
    draft.metrics["rows"] = {role: counts.record() for role, counts in reading.counts.items()}
    draft.health = require(check_catalog(profile))


def _prepare_on_ray(draft: Draft, run: RunConfig, files: Files, scans: list[Scan], reading: _Reading) -> dict[str, Any]:
    from tiger.on_ray.tasks import RayTasks, seen_by_all_nodes  # small data need no Ray, which takes seconds to import

    runner = RayTasks(draft.folder)
    local = [file.path for _, file in files.roles() if isinstance(file.filesystem, pafs.LocalFileSystem)]
    is_here = not seen_by_all_nodes(local)
    if is_here:
        log.warning("read: not all nodes see the raw files, such as %s: they are read on this machine alone", local[0])
    data = sources.cut(run.data, files, scans, runner, is_here)
    reading.follow(data)
    scratch = draft.folder.child(f"{SCRATCH}/tables")
    scratch.delete()  # of an earlier attempt
    return build_catalog(
        run.catalog, data, draft.folder, store=FolderStore(scratch), runner=runner, sizes=Sizes(), reading=reading
    )


def describe_files(files: Files, scans: list[Scan]) -> list[dict[str, Any]]:
    """Return role, position, name, bytes and sha256 of every raw file, in reading order, for the manifest."""
    described: list[dict[str, Any]] = []
    positions: Counter[str] = Counter()
    for (role, file), scan in zip(files.roles(), scans, strict=True):
        entry = {"role": role, "position": positions[role], "name": file.name, "bytes": scan.size}
        described.append(entry | {"sha256": scan.sha256})
        positions[role] += 1
    return described


def identify(raw: list[dict[str, Any]]) -> dict[str, str]:
    """Return the fingerprinted properties of the raw files: role, order and content, not the names."""
    return {f"{file['role']}/{file['position']}": file["sha256"] for file in raw}


class _Reading:
    """Logs the progress of reading, and checks the counts of rows."""

    def __init__(self, files: Files, scans: list[Scan], max_bad_row_fraction: float) -> None:
        self.sizes: dict[Role, list[tuple[RawFile, int]]] = {"items": [], "interactions": []}
        for (role, file), scanned in zip(files.roles(), scans, strict=True):
            self.sizes[role].append((file, scanned.size))
        self.max_bad = max_bad_row_fraction
        self.counts: dict[Role, RowCounts] = {}
        self.progress: dict[Role, Progress] = {}
        self.fractions: dict[Role, list[float]] = {}

    def follow(self, data: sources.SourceData) -> None:
        """Expect parts of the raw files."""
        for role, parts in data.parts.items():
            of_parts = [sum(_bytes(file) for file in getattr(files, role)) for files in parts]
            total = max(1, sum(of_parts))
            self.fractions[role] = [sum(of_parts[: part + 1]) / total for part in range(len(parts))]

    def start(self, role: Role) -> Progress:
        """Return the progress of reading a table."""
        return self.progress.setdefault(role, Progress(f"read {role}", None, "rows"))

    def part_read(self, role: Role, part: int, rows: int) -> None:
        """Log the progress of reading in parts."""
        if self.fractions:
            self.start(role).add(rows)
            self.start(role).at(self.fractions[role][part])

    def table_read(self, role: Role, counts: RowCounts) -> None:
        """Log and check the counts of a table."""
        self.start(role).close()
        self.counts[role] = counts
        counts.close(self.max_bad)


def _bytes(file: RawFile) -> int:
    return file.size() if file.span is None else file.span.end - file.span.begin


@dataclass(frozen=True)
class _MeteredData:
    """Rows of a source that are read in this process, with progress by the bytes that are read."""

    data: sources.SourceData
    reading: _Reading
    is_here: bool = True

    def num_parts(self, role: Role) -> int:
        return self.data.num_parts(role)

    def read(self, role: Role, part: int, fields: tuple[str, ...] | None) -> tuple[Iterator[pa.RecordBatch], RowCounts]:
        batches, counts = self.data.read(role, part, fields)
        progress = self.reading.start(role)

        def read() -> Iterator[pa.RecordBatch]:
            for batch in metered(batches, Meter(self.reading.sizes[role], progress)):
                progress.add(batch.num_rows)
                yield batch

        return read(), counts


job = prepare
