"""Append items to the catalog of a trained model, delete items, and update fields; nothing published moves.

New items are embedded and get semantic IDs from the model's frozen tokenizer. The result is a `semantic_ids` artifact
that continues the model's, or those of an earlier append (`append.onto`), with a verdict on drift: continue, or retrain
now.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tiger.core.artifacts import SCRATCH, Artifact, Draft, Folder, stage
from tiger.core.config import Config, load_plugin
from tiger.core.errors import ArtifactError, ConfigError, DataError
from tiger.core.progress import Progress
from tiger.data.catalog import CatalogConfig
from tiger.data.grown_catalog import (
    DELETED,
    MergedItems,
    chain,
    is_append,
    items_folder,
    merge_items,
    open_append,
)
from tiger.data.history_files import HistoryFiles
from tiger.data.item_names import ITEMS, ItemNames
from tiger.data.readers.reading import read_rows
from tiger.data.sources.base import DatasetConfig, Files, RawFile, RowCounts, expand
from tiger.embedding.encoder import EmbeddingConfig, EmbedShard, encoder_identity
from tiger.embedding.external import VectorJoin
from tiger.embedding.vectors import load_embeddings, sample_embeddings
from tiger.evaluation.drift import drift_metrics, judge
from tiger.evaluation.health import check_semantic_ids, require
from tiger.evaluation.new_items import grown_recommender, recall_of_new_items
from tiger.metrics.codes import nearest_distances
from tiger.models.base import text_embeddings
from tiger.models.decoding import DecodingConfig
from tiger.on_ray.map import map_shards
from tiger.pipeline.train import ensure_model
from tiger.run import AppendConfig, RunConfig
from tiger.tokenizers.append import number_items

log = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]

_SHARD_ITEMS = 1024
_TRAINED_SAMPLE = 10_000  # trained texts with which new ones are compared
_IN_PROCESS = 4096  # new texts up to which this process embeds them: starting Ray and its actors takes longer


class AppendStageConfig(Config):
    """The options that determine an append."""

    append: AppendConfig
    data: DatasetConfig


@dataclass(frozen=True)
class Given:
    """Files of an append, and ids to delete."""

    items: list[RawFile]
    interactions: list[RawFile]
    vectors: list[RawFile]
    deleted: list[str]

    def source(self) -> dict[str, str]:
        """Return what identifies them: roles, order and content."""
        roles = {"items": self.items, "interactions": self.interactions, "vectors": self.vectors}
        found = {f"{role}/{at}": file.digest() for role, files in roles.items() for at, file in enumerate(files)}
        return found | {f"deleted/{at}": name for at, name in enumerate(sorted(self.deleted))}


def append(run: RunConfig, model: Artifact) -> Artifact:
    """Return the semantic IDs of a model's items and of the items that are appended.

    Raises:
        ArtifactError: the model has no semantic IDs, or `append.onto` does not continue them.
        ConfigError: there is nothing to append, delete or update.
    """
    if "semantic_ids" not in model.inputs:
        raise ArtifactError(f"{model.folder.uri} was trained without semantic IDs; items cannot be appended to it")
    inputs = {"model": model, "semantic_ids": model.inputs["semantic_ids"]}
    inputs |= open_append(run.append.onto, model, "append.onto")
    given = _given(run)
    config = AppendStageConfig(append=run.append, data=run.data)
    base = inputs["semantic_ids"]
    return append_items.build(run.root, config, inputs, run, model, base, given, source=given.source())


def _given(run: RunConfig) -> Given:
    config, vectors = run.append, run.embedding.import_path
    if not config.items and config.deleted_file is None:
        raise ConfigError(
            "there is nothing to append: set append.items, the files of new items, or append.deleted_file"
        )
    deleted: list[str] = []
    if config.deleted_file is not None:
        try:
            lines = Path(config.deleted_file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"append.deleted_file = {config.deleted_file} cannot be read ({error}); it must contain one source id "
                "per line, in UTF-8"
            ) from None
        deleted = sorted({line.strip() for line in lines} - {""})
    return Given(
        expand(config.items, "append.items"),
        expand(config.interactions, "append.interactions"),
        expand([vectors], "embedding.import_path") if vectors else [],
        deleted,
    )


@stage("semantic_ids", verb="append")
def append_items(draft: Draft, run: RunConfig, model: Artifact, base: Artifact, given: Given) -> None:
    """Read, embed and number the new items; write all items and IDs, the new vectors, and the verdict on drift."""
    begin = time.monotonic()
    trained = chain(base)[0]
    before, merged = _read_items(draft, run, model.inputs["catalog"], base, given)
    new = merged.items.slice(before)
    _embed(draft, run, text_embeddings(trained), new, given.vectors)
    embedded = time.monotonic()
    text = load_embeddings(draft.folder) if len(new) else torch.zeros(0, text_embeddings(trained).metrics["dimension"])
    numbered = number_items(base, trained, text)
    ids, moved = numbered.growth.ids, numbered.growth.moved
    ids.write(draft.folder, [merged.items.select(["source_id"])])
    _write_deleted(draft, base, merged, given.deleted)
    metrics = drift_metrics(
        ids, trained.metrics["items"], before, moved, trained.metrics["moved_items"] / trained.metrics["items"],
        numbered.errors, numbered.trained_errors, *_distances(text_embeddings(trained).folder, text.numpy()),
    )  # fmt: skip
    if given.interactions and len(new):
        users = _read_histories(draft, run, model.inputs["catalog"], given.interactions)
        recommender = grown_recommender(model, base, ids, text)
        metrics |= recall_of_new_items(recommender, users, before, DecodingConfig())
    report = judge(metrics, run.append.limits)
    draft.folder.write_json("drift.json", report.model_dump(mode="json"))
    draft.metrics |= {
        "items": len(ids), "new_items": len(new), "trained_items": trained.metrics["items"],
        "moved_items": trained.metrics["moved_items"] + int(moved.sum()), "displaced_items": numbered.growth.displaced,
        "verdict": report.verdict, "reasons": report.reasons, "embed_seconds": round(embedded - begin, 1),
        "number_seconds": round(time.monotonic() - embedded, 1),
    }  # fmt: skip
    draft.health = require(check_semantic_ids(ids.collisions))
    log.info(
        "append: %s new items, %s updated, %s deleted in all; %s items", f"{len(new):,}", f"{merged.updated:,}",
        f"{draft.metrics['deleted_items']:,}", f"{len(ids):,}",
    )  # fmt: skip
    (log.warning if report.reasons else log.info)("%s", report)


def _read_items(
    draft: Draft, run: RunConfig, catalog: Artifact, base: Artifact, given: Given
) -> tuple[int, MergedItems]:
    """Write the rows of all items; return the number of published ones, and the rows."""
    published = items_folder(catalog, base).read_table(ITEMS)
    ledger, merged = RowCounts("items"), MergedItems(published, 0, np.zeros(0, np.int64), 0, [])
    if given.items:
        source = load_plugin(DatasetConfig.plugin_package, run.data.kind)
        batches = source.read_items(run.data, Files(given.items, []), ledger)
        sizes = [(file, file.size()) for file in given.items]
        rules = CatalogConfig.model_validate(catalog.manifest["config"]["catalog"])
        merged = merge_items(published, read_rows(batches, sizes, ledger, run.data.max_bad_row_fraction), rules)
        if not merged.new + merged.updated:
            raise DataError("append.items: the files have no items")
    draft.folder.write_table(ITEMS, merged.items, row_group_size=_SHARD_ITEMS)
    if merged.ignored:
        log.info("append: columns that the catalog does not have are left out: %s", ", ".join(merged.ignored))
    draft.metrics = {
        "updated_items": merged.updated, "duplicate_rows": merged.duplicates, "rows": {"items": ledger.record()},
    }  # fmt: skip
    return len(published), merged


def _embed(draft: Draft, run: RunConfig, trained: Artifact, new: pa.Table, vectors: list[RawFile]) -> None:
    """Write the text embeddings of the new items, numbered from 0, as those of the training were made."""
    if not len(new):
        return
    config = EmbeddingConfig.model_validate(trained.manifest["config"] if "encoder" in trained.manifest else {})
    numbers = pa.array(np.arange(len(new), dtype=np.int32))
    if "encoder" not in trained.manifest:
        if not vectors:
            raise ConfigError(
                "the vectors of the model's items were imported: set embedding.import_path to those of the new items"
            )
        stored = trained.manifest["config"]["storage_dtype"]
        join = VectorJoin(new["source_id"].to_pylist(), run.embedding.model_copy(update={"storage_dtype": stored}))
        tables = list(join.tables(vectors))
        draft.folder.write_table("vectors/part-00000.parquet", pa.concat_tables(tables))
        return
    recorded = trained.manifest["encoder"]
    if encoder_identity(recorded["model"]) != recorded:
        raise ArtifactError(
            f"the text encoder {recorded['model']} is not the one that {trained.home.uri} was made with; new vectors "
            "would not be comparable"
        )
    names = ("storage_dtype", "prefix", "max_tokens", "precision", "batch_tokens")
    arguments = {"model": recorded["model"]} | {name: getattr(config, name) for name in names}
    texts = pa.table({"item_id": numbers, "text": pc.fill_null(new["text"], "")})
    if len(new) > _IN_PROCESS:
        scratch = draft.folder.child(SCRATCH)
        scratch.write_table("texts.parquet", texts, row_group_size=_SHARD_ITEMS)
        map_shards(
            scratch, "texts.parquet", texts.column_names, draft.folder.child("vectors"), EmbedShard, arguments,
            actors=run.embedding.resources, what="embed", scale=run.scale, unit="items",
        )  # fmt: skip
        return
    progress, encoder = Progress("embed", len(new), "items"), EmbedShard(**arguments)
    for shard, first in enumerate(range(0, len(new), _SHARD_ITEMS)):
        part = texts.slice(first, _SHARD_ITEMS)
        draft.folder.write_table(f"vectors/part-{shard:05d}.parquet", encoder(part))
        progress.add(len(part))
    progress.close()


def _distances(trained: Folder, text: Vectors) -> tuple[Vectors, Vectors]:
    """Return the distances of new texts to the nearest trained one, and of a sample of these to the nearest other."""
    sample = sample_embeddings(trained, _TRAINED_SAMPLE).numpy()
    center = sample.mean(axis=0)
    return nearest_distances(sample - center, text - center), nearest_distances(sample - center)


def _write_deleted(draft: Draft, base: Artifact, merged: MergedItems, names: list[str]) -> None:
    """Write which items are deleted: those of before, unless the files have them again, and those named now."""
    deleted = np.zeros(len(merged.items), bool)
    if is_append(base):
        deleted[np.asarray(base.folder.read_table(DELETED)["item_id"])] = True
    deleted[merged.updates] = False
    at = pc.index_in(pa.array(names, pa.string()), value_set=merged.items["source_id"])
    deleted[np.asarray(at.drop_null())] = True
    if at.null_count:
        log.warning("append: %d ids of append.deleted_file are not in the catalog", at.null_count)
    if deleted.all():
        raise DataError("append.deleted_file: no item is left to recommend")
    draft.folder.write_table(DELETED, pa.table({"item_id": np.flatnonzero(deleted).astype(np.int32)}))
    draft.metrics |= {"deleted_items": int(deleted.sum()), "unknown_deleted": at.null_count}


def _read_histories(draft: Draft, run: RunConfig, catalog: Artifact, files: list[RawFile]) -> Iterator[pa.Table]:
    """Return the users of files with interactions, whose items may be new."""
    source, ledger = load_plugin(DatasetConfig.plugin_package, run.data.kind), RowCounts("interactions")
    sizes = [(file, file.size()) for file in files]
    rules = CatalogConfig.model_validate(catalog.manifest["config"]["catalog"])
    spills = draft.folder.child(SCRATCH).child("events")
    histories = HistoryFiles(ItemNames(draft.folder), rules, spills, sum(size for _, size in sizes))
    interactions = source.read_interactions(run.data, Files([], files), ledger)
    histories.read(read_rows(interactions, sizes, ledger, run.data.max_bad_row_fraction))
    draft.metrics["rows"]["interactions"] = ledger.record()
    return histories.users()


def on_model(run: RunConfig, model: Artifact) -> Artifact:
    """Append items to the catalog of a trained model."""
    return append(run, model)


SECTIONS_ON_MODEL = ("append", "data", "embedding", "scale", "tracking")


def job(run: RunConfig) -> Artifact:
    """Append items to the catalog of a configuration's model; train it first if needed."""
    return append(run, ensure_model(run))
