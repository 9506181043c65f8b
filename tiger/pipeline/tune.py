"""Tune the tokenizer with Ray Tune; write all trials, a plot and the best configuration (best.toml).

The space is next to the configuration, in NAME.tune.toml; overrides of it begin with `tuning.`. The same command
continues a sweep that was killed, also with other resources; with more `tuning.num_trials` it continues a finished one.
"""

from __future__ import annotations

import logging

from tiger.core.artifacts import Artifact, Draft, stage
from tiger.core.config import dump_toml
from tiger.embedding.vectors import load_embeddings
from tiger.on_ray.tune import tune_tokenizer
from tiger.pipeline.item_vectors import ensure_item_vectors
from tiger.run import RunConfig
from tiger.tuning import TuningConfig, TuningStageConfig, apply, plot_trials, table

log = logging.getLogger(__name__)


def tune(run: RunConfig, tuning: TuningConfig, embeddings: Artifact) -> Artifact:
    """Return the tuning artifact of the tokenizer of a configuration."""
    config = TuningStageConfig(tokenizer=run.tokenizer, tuning=tuning)
    return run_trials.build(run.root, config, {embeddings.kind: embeddings}, run, config, embeddings)


@stage("tuning", verb="tune")
def run_trials(draft: Draft, run: RunConfig, config: TuningStageConfig, embeddings: Artifact) -> None:
    """Run all trials, and write them, a plot and the best configuration."""
    tuning, family = config.tuning, config.family(embeddings.fingerprint)
    trials = tune_tokenizer(run, tuning, load_embeddings(embeddings.folder), draft.folder, family)
    rows = trials.to_pylist()
    winner = {key: rows[0][key] for key in tuning.space}
    best = apply(run, winner, num_evaluations=None)
    draft.folder.write_table("trials.parquet", trials)
    draft.folder.write_bytes("best.toml", dump_toml(best.model_dump(mode="json", serialize_as_any=True)).encode())
    draft.folder.write_bytes("tuning.svg", plot_trials(rows, list(tuning.space)).encode())
    whole = len(rows) * run.tokenizer.training.epochs  # 0 for a tokenizer that has nothing to train
    spent = sum(row["epochs"] or 0 for row in rows) / whole if whole else 0.0
    draft.metrics = {
        "trials": len(rows),
        "epochs_spent": round(spent, 3),
        "objective": rows[0]["objective"],
        **winner,
    }
    for line in table(rows[:10], list(tuning.space)):
        log.info("tune: %s", line)
    job = "pipeline" if embeddings.manifest.get("read_from") else "semantic_ids"
    uri = draft.folder.uri
    log.info("tune: best configuration: %s/best.toml (run: python -m jobs.%s %s/best.toml)", uri, job, uri)


SECTIONS = {"tuning": TuningConfig}


def job(run: RunConfig, tuning: TuningConfig) -> Artifact:
    """Tune the tokenizer of a configuration."""
    return tune(run, tuning, ensure_item_vectors(run))
