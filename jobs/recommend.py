"""Model -> recommendations after the users' whole histories: item ids, titles, scores."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa

from jobs.command import command
from jobs.train import whole_training
from tiger import artifacts
from tiger.artifacts import SCRATCH, Artifact, Draft
from tiger.catalog import Catalog
from tiger.diagnostics import check_recommendations, require
from tiger.recommender import DecodeUsers, show
from tiger.run import RunConfig
from tiger.scale.map import Actors, map_table

log = logging.getLogger(__name__)

_SHOWN = 5


def recommend(run: RunConfig, model: Artifact) -> Artifact:
    config = run.recommend
    catalog = Catalog(model.inputs["catalog"])

    def make(draft: Draft) -> None:
        histories = catalog.histories
        users = range(min(len(histories), config.users or len(histories)))
        table = pa.table(
            {
                "user_id": pa.array(users, pa.int32()),
                "source_id": [histories.source_ids[user] for user in users],
                "history": pa.array([histories.of(user) for user in users], pa.list_(pa.int32())),
            }
        )
        draft.folder.write_table(f"{SCRATCH}/users.parquet", table, row_group_size=1024)
        map_table(
            draft.folder.child(SCRATCH),
            "users.parquet",
            table.column_names,
            draft.folder.child("recommendations"),
            DecodeUsers,
            {
                "model": model.folder.uri,
                "k": config.k,
                "beam": config.beam,
                "exclude_history": config.exclude_history,
            },
            actors=Actors(maximum=config.max_actors),
            what="recommend",
        )
        found = draft.folder.read_table("recommendations").combine_chunks()
        items = np.asarray(found["items"].combine_chunks().flatten()).reshape(len(users), config.k).astype(np.int64)
        draft.figures = {"users": len(users), "k": config.k}
        draft.health = require(check_recommendations(items, catalog.n_items, cutoff=config.k))

    return artifacts.build(run.root, "recommendations", config, {"model": model}, make)


def show_some(recommendations: Artifact) -> None:
    """Prints the first users' histories and recommendations with titles."""
    catalog = Catalog(recommendations.inputs["model"].inputs["catalog"])
    found = recommendations.folder.read_table("recommendations").slice(0, _SHOWN)
    for user, items, scores in zip(*(found[name].to_pylist() for name in found.column_names), strict=True):
        name, history = catalog.histories.source_ids[user], catalog.histories.of(user)
        log.info("user %s\n%s", name, show(catalog, history, np.array(items), np.array(scores)))


if __name__ == "__main__":

    def _recommend_and_show(run: RunConfig) -> Artifact:
        artifact = recommend(run, whole_training(run))
        show_some(artifact)
        return artifact

    command(__doc__, _recommend_and_show)
