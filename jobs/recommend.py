"""Model -> recommendations after the users' whole histories: item ids, titles, scores."""

from __future__ import annotations

import json
import logging

import numpy as np

from jobs.command import command
from jobs.train import whole_training
from tiger import artifacts
from tiger.artifacts import Artifact, Draft
from tiger.catalog import Catalog
from tiger.diagnostics import check_recommendations, require
from tiger.recommender import show
from tiger.run import RunConfig
from tiger.scale.decode import decode_users

log = logging.getLogger(__name__)

_SHOWN = 5
_TABLE = "recommendations"


def recommend(run: RunConfig, model: Artifact) -> Artifact:
    config = run.recommend
    catalog = Catalog(model.inputs["catalog"])

    def make(draft: Draft) -> None:
        histories = catalog.histories
        users = range(min(len(histories), config.users or len(histories)))
        items, _ = decode_users(
            model,
            histories,
            users,
            [histories.of(user) for user in users],
            draft,
            _TABLE,
            k=config.k,
            beam=config.beam,
            history="excluded" if config.exclude_history else "allowed",
            max_actors=config.max_actors,
        )
        _write_readable(draft, catalog)
        draft.figures = {"users": len(users), "k": config.k}
        draft.health = require(check_recommendations(items, catalog.n_items, cutoff=config.k))

    return artifacts.build(run.root, "recommendations", config, {"model": model}, make)


def _write_readable(draft: Draft, catalog: Catalog) -> None:
    """recommendations.jsonl: the user's name, and item names, titles and scores, best first."""
    table, lines = draft.folder.read_table(_TABLE), []
    for user, items, scores in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
        found = [
            {"item": catalog.source_ids[item], "title": catalog.titles[item], "score": round(score, 4)}
            for item, score in zip(items, scores, strict=True)
            if item >= 0
        ]
        lines.append(json.dumps({"user": catalog.histories.source_ids[user], "items": found}, ensure_ascii=False))
    draft.folder.write_bytes("recommendations.jsonl", ("\n".join(lines) + "\n").encode())


def show_some(recommendations: Artifact) -> None:
    """Prints the first users' histories and recommendations with titles."""
    catalog = Catalog(recommendations.inputs["model"].inputs["catalog"])
    found = recommendations.folder.read_table(_TABLE).slice(0, _SHOWN)
    for user, items, scores in zip(*(found[name].to_pylist() for name in found.column_names), strict=True):
        name, history = catalog.histories.source_ids[user], catalog.histories.of(user)
        log.info("user %s\n%s", name, show(catalog, history, np.array(items), np.array(scores)))


if __name__ == "__main__":

    def _recommend_and_show(run: RunConfig) -> Artifact:
        artifact = recommend(run, whole_training(run))
        show_some(artifact)
        return artifact

    command(__doc__, _recommend_and_show)
