"""Train the generative model on histories as semantic IDs (Ray Train); validation selects the weights."""

from __future__ import annotations

from tiger.core import artifacts
from tiger.core.artifacts import Artifact, Draft
from tiger.data.catalog import Catalog
from tiger.evaluation.health import check_model, popularity_recall, require
from tiger.models.tiger.train import ModelJob
from tiger.on_ray.train import train
from tiger.pipeline.embed import embed
from tiger.pipeline.item_vectors import build_item_vectors
from tiger.pipeline.prepare import prepare
from tiger.pipeline.semantic_ids import build_semantic_ids
from tiger.run import RunConfig


def train_model(run: RunConfig, catalog: Artifact, ids: Artifact) -> Artifact:
    """Return the model artifact trained on a catalog's histories as semantic IDs."""

    def make(draft: Draft) -> None:
        worker_job = ModelJob(run.model, catalog.folder, ids.folder, draft.folder)
        draft.metrics = train(worker_job, draft.folder, run.scale, "model", batch_size=run.model.training.batch_size)
        guessing = min(1.0, 10 / catalog.metrics["items"])
        popular = popularity_recall(Catalog(catalog).histories, run.model.training.validation_users, run.model.seed)
        draft.health = require(check_model(draft.metrics["recall@10"], guessing, *popular))

    return artifacts.build(run.root, "model", run.model, {"catalog": catalog, "semantic_ids": ids}, make)


def ensure_model(run: RunConfig) -> Artifact:
    """Run all stages up to the model, as far as needed; return the model artifact."""
    catalog = prepare(run)
    vectors = build_item_vectors(run, catalog, embed(run, catalog))
    return train_model(run, catalog, build_semantic_ids(run, vectors))


job = ensure_model
