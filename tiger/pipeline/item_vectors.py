"""Fuse text embeddings with what is bought together, for the tokenizer (`collaborative.weight`)."""

from __future__ import annotations

import logging

import numpy as np

from tiger.core.artifacts import Artifact, Draft, stage
from tiger.core.external_sort import FolderStore
from tiger.core.storage import SCRATCH
from tiger.data.catalog import Catalog
from tiger.data.sources import synthetic
from tiger.embedding.collaborative import KnownFactors, factors_of, fit_fusion, write_fused
from tiger.embedding.collaborative_shards import fuse_shards
from tiger.embedding.vectors import count_embeddings, sample_embeddings
from tiger.evaluation.health import check_embeddings, require
from tiger.models.warm_start import WarmStart
from tiger.on_ray.tasks import RayTasks
from tiger.pipeline.embed import adopt, embed
from tiger.pipeline.prepare import prepare
from tiger.run import RunConfig

log = logging.getLogger(__name__)

_CHECKED_VECTORS = 20_000
_ALIGNED_ITEMS = 100_000  # by which co-occurrence vectors are aligned with those of an earlier training


def build_item_vectors(run: RunConfig, catalog: Artifact, embeddings: Artifact) -> Artifact:
    """Return the vectors to quantize: text and co-occurrence, or with `collaborative.weight = 0` the text embeddings.

    The fused vectors depend on the training parts of the histories, the text embeddings on the items alone: another
    split embeds nothing again.
    """
    if not run.collaborative.weight:
        return embeddings
    source = {"histories": catalog.manifest["files"]["histories.parquet"]["sha256"]}
    start = None if run.warm_start is None else WarmStart.open(run.warm_start)
    return fuse_vectors.build(
        run.root, run.collaborative, {"embeddings": embeddings}, run, catalog, embeddings, start,
        source=source | (start.source if start else {}), read_from={"catalog": catalog},
    )  # fmt: skip


@stage("item_vectors", verb="item_vectors")
def fuse_vectors(
    draft: Draft, run: RunConfig, catalog: Artifact, embeddings: Artifact, start: WarmStart | None
) -> None:
    """Fuse the text embeddings with the co-occurrence of items in the training parts of the histories."""
    known = None if start is None else _known_factors(start, embeddings)
    if _fits_memory(run, catalog, embeddings):
        fusion = fit_fusion(run.collaborative, embeddings.folder, Catalog(catalog).histories, known)
        write_fused(fusion, embeddings.folder, draft.folder)
        num_known = int(fusion.cooccurrence.any(axis=1).sum())
    else:
        scratch = draft.folder.child(f"{SCRATCH}/pairs")
        scratch.delete()  # of an earlier attempt
        fusion, num_known = fuse_shards(
            run.collaborative, embeddings.folder, catalog.folder, draft.folder, RayTasks(draft.folder),
            FolderStore(scratch), known,
        )  # fmt: skip
    draft.folder.write_tensors("fusion.safetensors", fusion.tensors())
    draft.folder.copy_from(embeddings.folder, "items.parquet")
    vectors = sample_embeddings(draft.folder, _CHECKED_VECTORS).numpy()
    draft.metrics = {
        "items": count_embeddings(draft.folder),
        "dimension": vectors.shape[1],
        "items_with_cooccurrence": num_known,
    }
    draft.health = require(check_embeddings(vectors))


def _known_factors(start: WarmStart, embeddings: Artifact) -> KnownFactors | None:
    """Return the co-occurrence vectors of the items that the training before had."""
    before = start.item_vectors
    if before is None:
        return None
    old = start.items_of(embeddings.folder)
    items = np.flatnonzero((old >= 0) & (old < before.metrics["items"]))
    items = items[:: max(1, len(items) // _ALIGNED_ITEMS)]
    return KnownFactors(items, factors_of(before.folder, before.manifest["config"], old[items]))


def _fits_memory(run: RunConfig, catalog: Artifact, embeddings: Artifact) -> bool:
    """Return whether the vectors are fused in this process rather than by tasks."""
    pairs = 2 * run.collaborative.window * catalog.metrics["interactions"]
    rows = catalog.metrics["items"] * (embeddings.metrics["dimension"] + run.collaborative.rank)
    return int(12 * pairs + 4 * rows) <= run.scale.in_process_megabytes << 20


def ensure_item_vectors(run: RunConfig) -> Artifact:
    """Return the vectors to quantize, made if needed; of own vectors without data files, those of the vectors' items.

    The default data are a generated sample, which cannot be what own vectors belong to.
    """
    if run.embedding.import_path is not None and run.data.kind == synthetic.Config().kind:
        log.info("embed: data.kind = synthetic: the items are those of embedding.import_path, without a catalog")
        return adopt(run)
    catalog = prepare(run)
    return build_item_vectors(run, catalog, embed(run, catalog))


job = ensure_item_vectors
