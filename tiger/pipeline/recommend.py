"""Recommend items to every user, given the whole history: item ids, titles, scores."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiger.core.artifacts import Artifact, Draft, stage
from tiger.core.config import Config, fingerprint
from tiger.core.errors import DataError
from tiger.data.catalog import Catalog
from tiger.evaluation.health import check_recommendations, require
from tiger.models.base import ModelConfig
from tiger.models.decoding import DecodingConfig
from tiger.on_ray.recommend import recommend_users
from tiger.pipeline.train import ensure_model
from tiger.run import RecommendConfig, RunConfig

log = logging.getLogger(__name__)

_SHOWN = 5  # users, and items of their lists
_TABLE = "recommendations"


class RecommendStageConfig(Config):
    """The options that determine recommendations."""

    recommend: RecommendConfig
    decoding: DecodingConfig


def recommend(run: RunConfig, model: Artifact) -> Artifact:
    """Return the recommendations artifact of a model."""
    allowed = _names(run.recommend.allowed_items_file)
    config = RecommendStageConfig(recommend=run.recommend, decoding=run.decoding)
    source = {"allowed": fingerprint(sorted(allowed))} if allowed is not None else None
    return write_recommendations.build(run.root, config, {"model": model}, run, model, allowed, source=source)


@stage("recommendations", verb="recommend")
def write_recommendations(draft: Draft, run: RunConfig, model: Artifact, allowed: set[str] | None) -> None:
    """Recommend to the first users, with `allowed` source ids only: as a table, and as readable lines."""
    catalog = Catalog(model.inputs["catalog"])
    histories = catalog.histories
    users = range(min(len(histories), run.recommend.users or len(histories)))
    items, _ = recommend_users(
        model,
        histories,
        users,
        [histories.of(user) for user in users],
        draft,
        _TABLE,
        options=run.decoding,
        allowed_items=_items_of(allowed, catalog),
        scale=run.scale,
    )
    _write_readable(draft, catalog)
    draft.metrics = {"users": len(users), "k": run.decoding.k}
    personalized = ModelConfig.resolve(model.manifest["config"]).personalized
    draft.health = require(check_recommendations(items, catalog.n_items, run.decoding.k, personalized))


def _names(file: str | None) -> set[str] | None:
    """Read a file of item ids, one per line.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    if file is None:
        return None
    try:
        return {line.strip() for line in Path(file).read_text("utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"recommend.allowed_items_file = {file} cannot be read ({error}); it must contain one source id per "
            "line, in UTF-8"
        ) from None


def _items_of(names: set[str] | None, catalog: Catalog) -> list[int] | None:
    """Return the item indices of source ids, and log the number of unknown ones.

    Raises:
        DataError: none of the names is in the catalog.
    """
    if names is None:
        return None
    items = [item for item, name in enumerate(catalog.source_ids) if name in names]
    if not items:
        raise DataError(
            f"recommend.allowed_items_file: none of its {len(names)} ids is in the catalog; "
            "it must contain one source id per line"
        )
    log.info("recommend: %d items allowed, %d ids are not in the catalog", len(items), len(names) - len(items))
    return items


def _write_readable(draft: Draft, catalog: Catalog) -> None:
    """Write recommendations.jsonl: per user the source id, and item ids, titles and scores, best first."""
    table, lines = draft.folder.read_table(_TABLE), []
    for user, items, scores in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
        found = [
            {"item": catalog.source_ids[item], "title": catalog.titles[item], "score": round(score, 4)}
            for item, score in zip(items, scores, strict=True)
            if item >= 0
        ]
        lines.append(json.dumps({"user": catalog.histories.source_ids[user], "items": found}, ensure_ascii=False))
    draft.folder.write_bytes("recommendations.jsonl", ("\n".join(lines) + "\n").encode())


def print_examples(recommendations: Artifact) -> None:
    """Log the first users' histories and recommendations with titles."""
    catalog = Catalog(recommendations.inputs["model"].inputs["catalog"])
    found = recommendations.folder.read_table(_TABLE).slice(0, _SHOWN)
    for user, items, scores in zip(*(found[name].to_pylist() for name in found.column_names), strict=True):
        name, history = catalog.histories.source_ids[user], catalog.histories.of(user)
        log.info("user %s\n%s", name, _show(catalog, history, np.array(items), np.array(scores)))


def _show(catalog: Catalog, history: npt.NDArray[Any], items: npt.NDArray[Any], scores: npt.NDArray[Any]) -> str:
    """Format one user's history and recommendations: source ids, titles, scores."""
    lines = [f"  history {catalog.source_ids[item]:<12} {catalog.titles[item]:.90}" for item in history[-5:]]
    for rank, (item, score) in enumerate(zip(items[:_SHOWN], scores[:_SHOWN], strict=True), 1):
        if item >= 0:
            lines.append(f"  {rank:>2}. {score:>7.2f} {catalog.source_ids[item]:<12} {catalog.titles[item]:.80}")
    return "\n".join(lines)


def on_model(run: RunConfig, model: Artifact) -> Artifact:
    """Recommend items to every user with a trained model and log the first lists."""
    artifact = recommend(run, model)
    print_examples(artifact)
    return artifact


SECTIONS_ON_MODEL = ("recommend", "decoding", "scale", "tracking")


def job(run: RunConfig) -> Artifact:
    """Recommend items to every user and log the first lists; train the model first if needed."""
    return on_model(run, ensure_model(run))
