"""Many users on a pool of actors with models: their recommendations, and the ranks of targets for an evaluation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiger.core.artifacts import Artifact
from tiger.core.storage import Folder
from tiger.data.user_tables import TARGETS, USERS
from tiger.evaluation.shard import RANKS, EvaluateShard
from tiger.models.base import ModelConfig
from tiger.models.decoding import DecodingConfig
from tiger.models.shard import TABLE, RecommendShard
from tiger.on_ray.map import map_shards
from tiger.run import ResourcesConfig


def recommend_users(
    users: Folder,
    name: str,
    target: Folder,
    model: Artifact,
    options: DecodingConfig,
    scale: ResourcesConfig,
    *,
    fields: list[str],
    json_lines: bool = False,
    allowed_items: npt.NDArray[np.bool_] | None = None,
    semantic_ids: Artifact | None = None,
) -> None:
    """Recommend to every user of a table; finished shards are skipped.

    Args:
        users: folder of the table.
        name: file of the table of users.
        target: folder for the outputs, see `RecommendShard`.
        model: model artifact.
        options: how lists are made, and the actors that make them.
        scale: GPUs of the run, and how long to wait for them.
        fields: further columns: ids, titles, scores.
        json_lines: whether to write the lists as JSON lines, too.
        allowed_items: a filter for all users, bool [items]; None: all items.
        semantic_ids: those of an append to the model's; None: its own.
    """
    map_shards(
        users,
        name,
        USERS.names,
        target,
        RecommendShard,
        {
            "model": model.folder.uri,
            "options": options.model_dump(mode="json"),
            "fields": fields,
            "json_lines": json_lines,
            "allowed_items": allowed_items,
            "semantic_ids": None if semantic_ids is None else semantic_ids.folder.uri,
        },
        actors=options.resources,
        what="recommend",
        scale=scale,
        into=TABLE,
        unit="users",
    )


def evaluate_users(
    users: Folder,
    name: str,
    target: Folder,
    models: dict[str, Artifact],
    baselines: dict[str, ModelConfig],
    options: DecodingConfig,
    scale: ResourcesConfig,
    semantic_ids: Artifact | None = None,
) -> None:
    """Rank the target of every user of a table with all models and baselines; finished shards are skipped.

    Args:
        users: folder of the table.
        name: file of the table of users to evaluate.
        target: folder for the outputs, see `EvaluateShard`.
        models: model artifacts by name.
        baselines: families without training by name.
        options: how lists are made, and the actors that make them.
        scale: GPUs of the run, and how long to wait for them.
        semantic_ids: those of an append to the first model's; None: its own.
    """
    map_shards(
        users,
        name,
        TARGETS.names,
        target,
        EvaluateShard,
        {
            "models": {each: artifact.folder.uri for each, artifact in models.items()},
            "baselines": {each: family.model_dump(mode="json") for each, family in baselines.items()},
            "options": options.model_dump(mode="json"),
            "semantic_ids": None if semantic_ids is None else semantic_ids.folder.uri,
        },
        actors=options.resources,
        what="evaluate",
        scale=scale,
        into=RANKS,
        unit="users",
    )
