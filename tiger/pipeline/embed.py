"""Embed the catalog's texts on a pool of sentence-transformers actors (Ray Data).

With embedding.import_path=FILE.parquet (item_id, vector) it imports precomputed embeddings of the catalog's items
instead.
"""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
import pyarrow as pa

from tiger.core.artifacts import Artifact, Draft, stage
from tiger.core.config import Config
from tiger.core.progress import Progress
from tiger.data.sources.base import RawFile, expand
from tiger.embedding.encoder import EmbedShard, encoder_identity
from tiger.embedding.external import VectorJoin, own_item_ids
from tiger.embedding.vectors import count_embeddings, precision_figures, read_tokens, sample_embeddings
from tiger.evaluation.health import check_embeddings, require
from tiger.on_ray.map import map_shards
from tiger.pipeline.prepare import prepare
from tiger.run import RunConfig

log = logging.getLogger(__name__)

_HEALTH_SAMPLE = 20_000  # maximum number of vectors for the health checks
_PART_ROWS = 65_536  # minimum rows per file of imported vectors; those of texts have the catalog's row groups


class OwnVectorsConfig(Config):
    """The embedding options that are fingerprinted for imported vectors."""

    vectors_id: str
    vectors_column: str
    storage_dtype: Literal["float32", "float16"]


def embed(run: RunConfig, catalog: Artifact) -> Artifact:
    """Embed the catalog's texts, or import precomputed embeddings of its items if `embedding.import_path` is set."""
    if run.embedding.import_path is not None:
        return join(run, catalog)
    identity = encoder_identity(run.embedding.model)
    source = _items(catalog) | {"encoder": identity.get("sha256") or identity["revision"]}
    return embed_texts.build(
        run.root, run.embedding, {}, run, catalog, identity["model"], source=source, read_from={"catalog": catalog},
        record={"encoder": identity},
    )  # fmt: skip


def join(run: RunConfig, catalog: Artifact) -> Artifact:
    """Import precomputed embeddings and join them to the items of the catalog by source id."""
    files = own_vector_files(run)
    source = _items(catalog) | _identify(files)
    return join_vectors.build(
        run.root, _own_config(run), {}, run, catalog, files, source=source, read_from={"catalog": catalog}
    )


def adopt(run: RunConfig) -> Artifact:
    """Import precomputed embeddings without a catalog: the items are those that have a vector."""
    files = own_vector_files(run)
    return adopt_vectors.build(run.root, _own_config(run), {}, run, files, source=_identify(files))


@stage("embeddings", verb="embed")
def embed_texts(draft: Draft, run: RunConfig, catalog: Artifact, model: str) -> None:
    """Embed the texts with a sentence-transformers model, given by its name or path."""
    config = run.embedding
    names = ("storage_dtype", "prefix", "max_tokens", "precision", "batch_tokens")
    map_shards(
        catalog.folder,
        "items.parquet",
        ["item_id", "text"],
        draft.folder.child("vectors"),
        EmbedShard,
        {"model": model} | {name: getattr(config, name) for name in names},
        actors=config.resources,
        what="embed",
        scale=run.scale,
        size_by="text",
    )
    draft.folder.copy_from(catalog.folder, "items.parquet")
    vectors = sample_embeddings(draft.folder, _HEALTH_SAMPLE).numpy()
    tokens = read_tokens(draft.folder)
    quantiles = {f"{q:.0%}": float(np.quantile(tokens, q)) for q in (0.5, 0.95, 1)}
    draft.metrics = {
        "items": count_embeddings(draft.folder),
        "dimension": vectors.shape[1],
        "tokens": quantiles,
        **precision_figures(draft.folder),
    }
    draft.health = require(check_embeddings(vectors))


@stage("embeddings", verb="embed")
def join_vectors(draft: Draft, run: RunConfig, catalog: Artifact, files: list[RawFile]) -> None:
    """Import vectors of the catalog's items."""
    items = catalog.folder.read_table("items.parquet", ["source_id"])["source_id"].to_pylist()
    vectors = VectorJoin(items, run.embedding)
    _write_joined(draft, vectors, files)
    draft.folder.copy_from(catalog.folder, "items.parquet")
    draft.metrics["vectors_without_item"] = vectors.unknown


@stage("embeddings", verb="embed")
def adopt_vectors(draft: Draft, run: RunConfig, files: list[RawFile]) -> None:
    """Import vectors, and make their ids the items."""
    items = own_item_ids(files, run.embedding)
    _write_joined(draft, VectorJoin(items, run.embedding), files)
    numbers = pa.array(np.arange(len(items), dtype=np.int32))
    draft.folder.write_table("items.parquet", pa.table({"item_id": numbers, "source_id": pa.array(items)}))


def own_vector_files(run: RunConfig) -> list[RawFile]:
    """Return the files of `embedding.import_path`.

    Raises:
        DataError: there is no such file.
    """
    return expand([run.embedding.import_path or ""], "embedding.import_path")


def _own_config(run: RunConfig) -> OwnVectorsConfig:
    config = run.embedding
    return OwnVectorsConfig(
        vectors_id=config.vectors_id, vectors_column=config.vectors_column, storage_dtype=config.storage_dtype
    )


def _items(catalog: Artifact) -> dict[str, str]:
    """Return the identity of the items alone: histories and splits are not read."""
    return {"items": catalog.manifest["files"]["items.parquet"]["sha256"]}


def _identify(files: list[RawFile]) -> dict[str, str]:
    return {f"vectors/{position}": file.digest() for position, file in enumerate(files)}


def _write_joined(draft: Draft, vectors: VectorJoin, files: list[RawFile]) -> None:
    progress = Progress("join vectors", len(vectors.row_of), "items")
    parts, pending, rows = 0, [], 0
    for table in vectors.tables(files):
        pending.append(table)
        rows += len(table)
        progress.add(len(table))
        if rows >= _PART_ROWS:
            draft.folder.write_table(f"vectors/part-{parts:05d}.parquet", pa.concat_tables(pending))
            parts, pending, rows = parts + 1, [], 0
    if pending:
        draft.folder.write_table(f"vectors/part-{parts:05d}.parquet", pa.concat_tables(pending))
    progress.close()
    sample = sample_embeddings(draft.folder, _HEALTH_SAMPLE).numpy()
    draft.metrics = {"items": count_embeddings(draft.folder), "dimension": sample.shape[1]}
    draft.health = require(check_embeddings(sample))


def job(run: RunConfig) -> Artifact:
    """Embed the catalog of a configuration."""
    return embed(run, prepare(run))
