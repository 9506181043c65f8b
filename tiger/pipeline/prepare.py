"""Prepare the catalog from raw files: items with one text each, histories in time order, splits."""

from __future__ import annotations

import logging
from collections import Counter
from types import ModuleType
from typing import Any

from tiger.core.artifacts import Artifact, Draft, stage
from tiger.core.config import Config, load_plugin
from tiger.core.progress import timed
from tiger.data import catalog
from tiger.data.catalog import CatalogConfig
from tiger.data.download import cache_folder
from tiger.data.profile import format_profile
from tiger.data.readers.reading import read_rows
from tiger.data.sources.base import DatasetConfig, Files, RawFile, RowCounts
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
    files = source.locate(run.data, cache_folder())
    raw = describe_files(files)
    config = PrepareConfig(data=run.data, catalog=run.catalog)
    artifact = write_catalog.build(
        run.root, config, {}, run, source, files, raw, source=identify(raw), record={"raw_files": raw}
    )
    catalog.check_limits(artifact, run.data.max_bad_row_fraction, run.catalog.max_unknown_item_fraction)
    return artifact


@stage("catalog", verb="prepare")
def write_catalog(draft: Draft, run: RunConfig, source: ModuleType, files: Files, raw: list[dict[str, Any]]) -> None:
    """Read the raw files with the module of their source, and write items, histories and splits."""
    items, interactions, max_bad = RowCounts("items"), RowCounts("interactions"), run.data.max_bad_row_fraction
    sizes: dict[str, list[tuple[RawFile, int]]] = {"items": [], "interactions": []}
    for (role, file), entry in zip(files.roles(), raw, strict=True):
        sizes[role].append((file, entry["bytes"]))
    profile = catalog.make(
        run.catalog,
        read_rows(source.read_items(run.data, files, items), sizes["items"], items, max_bad),
        read_rows(
            source.read_interactions(run.data, files, interactions), sizes["interactions"], interactions, max_bad
        ),
        draft.folder,
    )
    log.info("catalog: %s", format_profile(profile))
    figures = ("items", "users", "interactions", "training_examples", "validation_users", "test_users")
    draft.metrics = {name: profile[name] for name in figures}
    draft.metrics["rows"] = {"items": items.record(), "interactions": interactions.record()}
    draft.health = require(check_catalog(profile))


def describe_files(files: Files) -> list[dict[str, Any]]:
    """Return role, position, name, bytes and sha256 of every raw file, in reading order, for the manifest."""
    described: list[dict[str, Any]] = []
    positions: Counter[str] = Counter()
    for role, file in files.roles():
        entry = {"role": role, "position": positions[role], "name": file.name, "bytes": file.size()}
        with timed(f"checksum of {file}"):
            described.append(entry | {"sha256": file.digest()})
        positions[role] += 1
    return described


def identify(raw: list[dict[str, Any]]) -> dict[str, str]:
    """Return the fingerprinted properties of the raw files: role, order and content, not the names."""
    return {f"{file['role']}/{file['position']}": file["sha256"] for file in raw}


job = prepare
