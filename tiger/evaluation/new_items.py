"""How well a trained model finds items that came after its training, from interactions with them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from tiger.core.artifacts import Artifact
from tiger.data.grown_catalog import chain
from tiger.data.history_blocks import slices
from tiger.metrics.ranking import recall, target_ranks
from tiger.models.base import InMemoryData, ModelConfig, StoredData, load_family
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender
from tiger.semantic_ids.assignment import SemanticIds
from tiger.training.weights import WEIGHTS

_MOST_USERS = 2000
_CUTOFF = 10


def first_new_items(
    users: Iterable[pa.Table], first_new: int, at_most: int = _MOST_USERS
) -> tuple[list[str], list[npt.NDArray[np.int32]], npt.NDArray[np.int64]]:
    """Return users who took a new item after another one: ids, histories before it, and it.

    Args:
        users: tables of users, see `tiger.data.user_tables.USERS`.
        first_new: index of the first new item; all later ones are new.
        at_most: number of users.
    """
    names: list[str] = []
    histories: list[npt.NDArray[np.int32]] = []
    targets: list[int] = []
    for table in users:
        for name, items in zip(table["source_id"].to_pylist(), slices(table["history"]), strict=True):
            found = np.flatnonzero(items[1:] >= first_new)
            if len(found) and len(names) < at_most:
                at = int(found[0]) + 1
                names.append(name)
                histories.append(items[:at])
                targets.append(int(items[at]))
    return names, histories, np.array(targets, np.int64)


def grown_recommender(model: Artifact, base: Artifact, ids: SemanticIds, new_text: Tensor) -> Recommender:
    """Return a model that knows the items of an append which is not published yet.

    Args:
        model: model artifact.
        base: the semantic IDs that the append continues.
        ids: semantic IDs of all items.
        new_text: float32 [n, d] text embeddings of the new items.
    """
    config: ModelConfig = ModelConfig.resolve(model.manifest["config"])
    family, trained = load_family(config), StoredData(model.inputs)
    before = StoredData(model.inputs | {"semantic_ids": base}) if len(chain(base)) > 1 else trained
    data = InMemoryData(len(ids), None, ids, torch.cat([before.text_embeddings, new_text]))
    module = family.build(config, data)
    family.grow(module, model.folder.read_tensors(WEIGHTS), config, trained)
    recommender: Recommender = family.recommender(module, config, data, torch.device("cpu"))
    return recommender


def recall_of_new_items(
    recommender: Recommender,
    users: Iterable[pa.Table],
    first_new: int,
    options: DecodingConfig,
) -> dict[str, float]:
    """Return Recall@10 of users whose next item is new: among all items, and among the new ones.

    `recall_ratio` compares the latter with random lists of new items. Empty without such users.
    """
    names, histories, targets = first_new_items(users, first_new)
    if not names:
        return {}
    options = options.ranked(_CUTOFF)
    is_new = np.arange(recommender.num_items) >= first_new
    found = {
        "recall@10_new_items": recommender.recommend(histories, options, users=names),
        "recall@10_among_new_items": recommender.recommend(histories, options, users=names, allowed_items=is_new),
    }
    metrics = {name: float(recall(target_ranks(lists.items, targets), _CUTOFF).mean()) for name, lists in found.items()}
    chance = min(1.0, _CUTOFF / int(is_new.sum()))
    metrics["recall_ratio"] = metrics["recall@10_among_new_items"] / chance
    return metrics | {"users_with_new_items": float(len(names))}
