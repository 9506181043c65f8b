"""Searches the tokenizer's settings with Ray Tune; leaves all trials, a picture, and the winner as best.toml.

The space is next to the configuration, in NAME.search.toml; overrides of it begin with `search.`. The same command
continues a sweep that was killed, also with other resources; with more `search.trials` it continues a finished one.
"""

from __future__ import annotations

import logging

from jobs.command import command
from jobs.embed import embeddings_of
from tiger import artifacts
from tiger.artifacts import Artifact, Draft
from tiger.config import dump_toml
from tiger.embedding import read_vectors
from tiger.run import RunConfig
from tiger.scale.tune import search_tokenizer
from tiger.search import SearchConfig, SweepConfig, apply, picture, table

log = logging.getLogger(__name__)


def tune(run: RunConfig, search: SearchConfig, embeddings: Artifact) -> Artifact:
    def make(draft: Draft) -> None:
        family = config.family(embeddings.fingerprint)
        trials = search_tokenizer(run, search, read_vectors(embeddings.folder), draft.folder, family)
        rows = trials.to_pylist()
        winner = {key: rows[0][key] for key in search.space}
        best = apply(run, winner, looks=None)
        draft.folder.write_table("trials.parquet", trials)
        draft.folder.write_bytes("best.toml", dump_toml(best.model_dump(mode="json", serialize_as_any=True)).encode())
        draft.folder.write_bytes("search.svg", picture(rows, list(search.space)).encode())
        whole = len(rows) * run.tokenizer.training.epochs  # 0 for a tokenizer that has nothing to train
        spent = sum(row["epochs"] or 0 for row in rows) / whole if whole else 0.0
        draft.figures = {
            "trials": len(rows),
            "epochs_spent": round(spent, 3),
            "objective": rows[0]["objective"],
            **winner,
        }
        for line in table(rows[:10], list(search.space)):
            log.info("tune: %s", line)
        job = "pipeline" if embeddings.manifest.get("read_from") else "semantic_ids"
        log.info("tune: the winner is in %s/best.toml: python -m jobs.%s that-file", draft.folder.uri, job)

    config = SweepConfig(tokenizer=run.tokenizer, search=search)
    return artifacts.build(run.root, "sweep", config, {"embeddings": embeddings}, make)


if __name__ == "__main__":
    command(
        __doc__,
        lambda run, search: tune(run, search, embeddings_of(run)),
        sections={"search": SearchConfig},
    )
