"""Run all stages in order, from raw catalog and history files to recommendations.

Finished stages are skipped; a stage that fails a health check stops the run.
"""

from __future__ import annotations

import logging

from tiger.core.artifacts import Artifact
from tiger.evaluation.evaluator import EvaluationResult
from tiger.pipeline.embed import embed
from tiger.pipeline.evaluate import RESULT, evaluate
from tiger.pipeline.item_vectors import build_item_vectors
from tiger.pipeline.prepare import prepare
from tiger.pipeline.recommend import print_examples, recommend
from tiger.pipeline.report import PAGE, report
from tiger.pipeline.semantic_ids import build_semantic_ids
from tiger.pipeline.train import train_model
from tiger.run import RunConfig

log = logging.getLogger(__name__)


def run_pipeline(run: RunConfig) -> Artifact:
    """Run all stages; return the evaluation artifact."""
    catalog = prepare(run)  # raw files -> items with one text each, users with their histories
    embeddings = embed(run, catalog)  # texts -> vectors
    vectors = build_item_vectors(run, catalog, embeddings)  # ... and what is bought together -> item vectors
    ids = build_semantic_ids(run, vectors)  # item vectors -> codes -> one unique semantic ID per item
    model = train_model(run, catalog, embeddings, ids)  # histories as semantic IDs -> a model that generates the next
    metrics = evaluate(run, model)  # how often it finds what users took next
    recommendations = recommend(run, model)  # what they may take next
    page = report(run, metrics, recommendations)  # all of it on one HTML page
    log.info("%s", summary([*metrics.lineage(), recommendations, page], run.scale.dollars_per_hour))
    print_examples(recommendations)
    result = EvaluationResult.model_validate(metrics.folder.read_json(RESULT))
    log.info("%s", result.splits["test"].short_table("test"))
    log.info("model: %s (for tiger recommend, tiger serve)", model.folder.uri)
    log.info("report: %s/%s", page.folder.uri, PAGE)
    return metrics


def summary(parts: list[Artifact], dollars_per_hour: float | None) -> str:
    """Format seconds and cost per stage; for skipped stages, those of the run that created the artifact."""
    total = sum(part.manifest["seconds"] for part in parts)
    lines = []
    for kind, seconds in [*((part.kind, part.manifest["seconds"]) for part in parts), ("all stages", total)]:
        cost = "" if dollars_per_hour is None else f"  $ {seconds / 3600 * dollars_per_hour:8.2f}"
        lines.append(f"  {kind:<16}{seconds:>9.1f} s{cost}")
    return "\n".join(["time by stage", *lines])


job = run_pipeline
