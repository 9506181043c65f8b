"""Catalog + semantic IDs -> generative model, trained on Ray Train; the checkpoint is chosen on validation."""

from __future__ import annotations

from jobs.command import command
from jobs.embed import embed
from jobs.prepare import prepare
from jobs.semantic_ids import make_ids
from tiger import artifacts
from tiger.artifacts import Artifact, Draft
from tiger.catalog import Catalog
from tiger.diagnostics import check_model, popularity_recall, require
from tiger.learning import model_worker
from tiger.run import RunConfig
from tiger.scale.train import train


def train_model(run: RunConfig, catalog: Artifact, ids: Artifact) -> Artifact:
    def make(draft: Draft) -> None:
        arguments = {
            "config": run.model.model_dump(mode="json"),
            "catalog": catalog.folder.uri,
            "semantic_ids": ids.folder.uri,
            "target": draft.folder.uri,
        }
        draft.figures = train(
            model_worker, arguments, draft.folder, run.scale, "model", batch_size=run.model.training.batch_size
        )
        guessing = min(1.0, 10 / catalog.figures["items"])
        popular = popularity_recall(Catalog(catalog).histories, run.model.validation_users, run.model.seed)
        draft.health = require(check_model(draft.figures["recall@10"], guessing, *popular))

    return artifacts.build(run.root, "model", run.model, {"catalog": catalog, "semantic_ids": ids}, make)


def whole_training(run: RunConfig) -> Artifact:
    catalog = prepare(run)
    return train_model(run, catalog, make_ids(run, embed(run, catalog)))


if __name__ == "__main__":
    command(__doc__, whole_training)
