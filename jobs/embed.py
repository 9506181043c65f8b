"""Catalog -> embeddings: the texts stream through a pool of sentence-transformers actors on Ray Data."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np

from jobs.command import command
from jobs.prepare import prepare
from tiger import artifacts
from tiger.artifacts import Artifact, Draft, Folder
from tiger.config import Config
from tiger.diagnostics import check_embeddings, require
from tiger.embedding import (
    EncodeTexts,
    adopt_vectors,
    count_vectors,
    encoder_identity,
    precision_figures,
    sample_vectors,
)
from tiger.errors import DataError
from tiger.run import RunConfig
from tiger.scale.map import Actors, map_table

log = logging.getLogger(__name__)

_LOOK_AT = 20_000  # vectors that the health checks read, at most
_PART_ROWS = 65_536  # of embeddings made elsewhere; those of texts come in the catalog's parts


class AdoptedConfig(Config):
    """What of the embedding's settings counts for vectors that were made elsewhere."""

    storage: Literal["float32", "float16"]


def embed(run: RunConfig, catalog: Artifact) -> Artifact:
    run.require_no_own_vectors()
    config = run.embedding
    identity = encoder_identity(config.model)
    encoder = {
        "model": identity["model"],
        "prompt": config.prompt,
        "max_tokens": config.max_tokens,
        "precision": config.precision,
        "batch_tokens": config.batch_tokens,
    }

    def make(draft: Draft) -> None:
        map_table(
            catalog.folder,
            "items.parquet",
            ["item_id", "text"],
            draft.folder.child("vectors"),
            EncodeTexts,
            {"storage": config.storage, **encoder},
            actors=Actors(config.min_actors, config.max_actors, config.cpus_per_actor, config.gpus_per_actor),
            what="embed",
            scale=run.scale,
        )
        draft.folder.write_bytes("items.parquet", catalog.folder.read_bytes("items.parquet"))
        vectors = sample_vectors(draft.folder, _LOOK_AT).numpy()
        tokens = np.asarray(draft.folder.read_table("vectors", ["tokens"])["tokens"])
        quantiles = {f"{q:.0%}": float(np.quantile(tokens, q)) for q in (0.5, 0.95, 1)}
        draft.figures = {
            "items": count_vectors(draft.folder),
            "dimension": vectors.shape[1],
            "tokens": quantiles,
            **precision_figures(draft.folder),
        }
        draft.health = require(check_embeddings(vectors))

    source = {
        "items": catalog.manifest["files"]["items.parquet"]["sha256"],  # no histories, no split: they are not read
        "encoder": identity.get("sha256") or identity["revision"],
    }
    return artifacts.build(
        run.root, "embeddings", config, {}, make, source=source, read_from={"catalog": catalog},
        record={"encoder": identity},
    )  # fmt: skip


def adopt(run: RunConfig) -> Artifact:
    """Embeddings made elsewhere, where `embedding.vectors` names them: no catalog, no text."""
    config = run.embedding
    folder, slash, name = (config.vectors or "").rpartition("/")
    source = Folder(folder or slash or ".")
    if not source.exists(name):
        raise DataError(f"{config.vectors} does not exist; correct embedding.vectors")

    def make(draft: Draft) -> None:
        vectors, items = adopt_vectors(source.read_table(name), name, config.storage)
        for part, begin in enumerate(range(0, len(vectors), _PART_ROWS)):
            draft.folder.write_table(f"vectors/part-{part:05d}.parquet", vectors.slice(begin, _PART_ROWS))
        draft.folder.write_table("items.parquet", items)
        looked_at = sample_vectors(draft.folder, _LOOK_AT).numpy()
        draft.figures = {"items": count_vectors(draft.folder), "dimension": looked_at.shape[1]}
        draft.health = require(check_embeddings(looked_at))

    given = {"vectors": source.digest(name)}
    return artifacts.build(run.root, "embeddings", AdoptedConfig(storage=config.storage), {}, make, source=given)


def embeddings_of(run: RunConfig) -> Artifact:
    """Embeddings from elsewhere where the configuration names them, else those of the catalog's texts."""
    return adopt(run) if run.embedding.vectors else embed(run, prepare(run))


if __name__ == "__main__":
    command(__doc__, lambda run: embed(run, prepare(run)))
