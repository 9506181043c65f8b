"""Searches the tokenizer's settings with Ray Tune; leaves all trials, a picture, and the winner as best.toml.

The space stands beside the configuration, in NAME.search.toml; overrides of it begin with `search.`.
"""

from __future__ import annotations

import logging
import sys

from jobs.command import CONFIGS, command
from jobs.embed import embeddings_of
from tiger import artifacts
from tiger.artifacts import Artifact, Draft
from tiger.config import dump_toml, load
from tiger.embedding import read_vectors
from tiger.run import RunConfig
from tiger.scale.tune import search_tokenizer
from tiger.search import SearchConfig, SweepConfig, apply, picture, table

log = logging.getLogger(__name__)


def tune(run: RunConfig, search: SearchConfig, embeddings: Artifact) -> Artifact:
    def make(draft: Draft) -> None:
        trials = search_tokenizer(run, search, read_vectors(embeddings.folder), draft.folder)
        rows = trials.to_pylist()
        winner = {key: rows[0][key] for key in search.space}
        best = apply(run, winner, looks=None)
        draft.folder.write_table("trials.parquet", trials)
        draft.folder.write_bytes("best.toml", dump_toml(best.model_dump(mode="json", serialize_as_any=True)).encode())
        draft.folder.write_bytes("search.svg", picture(rows, list(search.space)).encode())
        spent = sum(row["epochs"] or 0 for row in rows) / (len(rows) * run.tokenizer.training.epochs)
        draft.figures = {
            "trials": len(rows),
            "epochs_spent": round(spent, 3),
            "objective": rows[0]["objective"],
            **winner,
        }
        for line in table(rows[:10], list(search.space)):
            log.info("tune: %s", line)
        log.info("tune: the winner is in %s/best.toml: python -m jobs.pipeline that-file", draft.folder.uri)

    config = SweepConfig(tokenizer=run.tokenizer, search=search)
    return artifacts.build(run.root, "sweep", config, {"embeddings": embeddings}, make)


if __name__ == "__main__":
    mine = [argument for argument in sys.argv[1:] if argument.startswith("search.")]
    sys.argv = [argument for argument in sys.argv if argument not in mine]
    name = next((argument for argument in sys.argv[1:] if "=" not in argument and argument[0] != "-"), "sample")

    def _tune(run: RunConfig) -> Artifact:
        file = (
            f"{name.removesuffix('.toml')}.search.toml"
            if name.endswith(".toml")
            else str(CONFIGS / f"{name}.search.toml")
        )
        search = load(SearchConfig, file, [override.removeprefix("search.") for override in mine], CONFIGS)
        return tune(run, search, embeddings_of(run))

    command(__doc__, _tune)
