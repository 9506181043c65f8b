"""Raw catalog and history files -> catalog: items with one text each, histories in time order, splits."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pyarrow as pa

from jobs.command import command
from tiger import artifacts, catalog
from tiger.artifacts import Artifact, Draft, Folder
from tiger.catalog import CatalogConfig
from tiger.config import Config, load_plugin
from tiger.datasets import DatasetConfig, Ledger
from tiger.diagnostics import check_catalog, require
from tiger.download import cache_folder
from tiger.run import RunConfig

log = logging.getLogger(__name__)


class PrepareConfig(Config):
    data: DatasetConfig
    catalog: CatalogConfig


def prepare(run: RunConfig) -> Artifact:
    source = load_plugin(DatasetConfig.plugin_package, run.data.kind)
    files = source.locate(run.data, cache_folder())
    digests = {path.name: Folder(str(path.parent)).digest(path.name) for path in [*files.items, *files.interactions]}

    def make(draft: Draft) -> None:
        items, interactions = Ledger("items"), Ledger("interactions")
        profile = catalog.make(
            run.catalog,
            _closed(source.read_items(run.data, files, items), items, run.data.max_bad_rows),
            _closed(source.read_interactions(run.data, files, interactions), interactions, run.data.max_bad_rows),
            draft.folder,
        )
        log.info("catalog: %s", catalog.describe(profile))
        figures = ("items", "users", "interactions", "training_examples", "validation_users", "test_users")
        draft.figures = {name: profile[name] for name in figures}
        draft.figures["rows"] = {"items": items.record(), "interactions": interactions.record()}
        draft.health = require(check_catalog(profile))

    config = PrepareConfig(data=run.data, catalog=run.catalog)
    return artifacts.build(run.root, "catalog", config, {}, make, source=digests)


def _closed(batches: Iterator[pa.RecordBatch], ledger: Ledger, max_bad_rows: float) -> Iterator[pa.RecordBatch]:
    yield from batches
    ledger.close(max_bad_rows)


if __name__ == "__main__":
    command(__doc__, prepare)
