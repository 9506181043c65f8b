"""Train the model on users' histories (Ray Train); validation selects the weights. model.kind names the family."""

from __future__ import annotations

from torch import nn

from tiger.core.artifacts import Artifact, Draft, stage
from tiger.core.errors import ConfigError
from tiger.data.catalog import Catalog
from tiger.evaluation.health import check_model, popularity_recall, require
from tiger.models.base import load_family
from tiger.models.train import ModelJob
from tiger.models.warm_start import WarmStart
from tiger.on_ray.train import train
from tiger.pipeline.embed import embed
from tiger.pipeline.item_vectors import build_item_vectors
from tiger.pipeline.prepare import prepare
from tiger.pipeline.semantic_ids import build_semantic_ids
from tiger.run import RunConfig
from tiger.training.weights import write_weights


def train_model(run: RunConfig, *inputs: Artifact) -> Artifact:
    """Return the model artifact trained on the artifacts that its family reads; others are left out."""
    given = {artifact.kind: artifact for artifact in inputs}
    used = {kind: given[kind] for kind in run.model.inputs}
    start = None if run.warm_start is None else WarmStart.open(run.warm_start)
    return fit_model.build(run.root, run.model, used, run, used, start, source=start.source if start else None)


@stage("model", verb="train")
def fit_model(draft: Draft, run: RunConfig, inputs: dict[str, Artifact], start: WarmStart | None) -> None:
    """Train the model on its inputs, by kind, and compare it with guessing and popularity."""
    config = run.model
    if not hasattr(load_family(config), "train"):  # nothing but the configuration has to be kept
        write_weights(nn.Module(), draft.folder)
        return
    folders = {kind: artifact.folder for kind, artifact in inputs.items()}
    job = ModelJob(config, folders, draft.folder, None if start is None else start.folder)
    draft.metrics = train(job, draft.folder, run.scale, "model", batch_size=config.training.batch_size)
    if "recall@10" not in draft.metrics:
        raise ConfigError(
            f"model.kind = {config.kind}: the result of its train has no recall@10; see tiger.models.base"
        )
    guessing = min(1.0, 10 / inputs["catalog"].metrics["items"])
    popular = popularity_recall(Catalog(inputs["catalog"]).histories, config.training.validation_users, config.seed)
    draft.health = require(check_model(draft.metrics["recall@10"], guessing, *popular))


def ensure_model(run: RunConfig) -> Artifact:
    """Run the stages up to the model that its family needs, as far as they are not finished; return the model."""
    catalog = prepare(run)
    if run.model.inputs == ("catalog",):
        return train_model(run, catalog)
    embeddings = embed(run, catalog)
    if "semantic_ids" not in run.model.inputs:
        return train_model(run, catalog, embeddings)
    return train_model(run, catalog, build_semantic_ids(run, build_item_vectors(run, catalog, embeddings)))


job = ensure_model
