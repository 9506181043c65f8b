"""Evaluation of one part of a table of users, by all models and baselines: what an actor of a pool runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from tiger.core.artifacts import open_artifact
from tiger.core.config import build
from tiger.core.storage import Folder
from tiger.data.grown_catalog import available_items
from tiger.data.histories import Split
from tiger.data.history_blocks import SPLITS, slices
from tiger.data.user_tables import shard_files
from tiger.evaluation.evaluator import LIST_LENGTH, MethodRanks, SplitUsers
from tiger.metrics.lists import ListSums, sum_lists
from tiger.metrics.ranking import target_ranks
from tiger.models.base import ModelConfig, StoredData, load_family
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommendations, Recommender
from tiger.models.shard import fixed_lists

RANKS, LISTS, SUMS = "ranks", "lists", "scratch/sums"
"""Folders of the outputs of `EvaluateShard`."""


class EvaluateShard:
    """Ranks the targets of one part of a table of users: user_id, source_id, history, target, split.

    The outputs are, of each user, the ranks of the target in the lists of every method; the sums of the lists, of each
    method and split; and the lists themselves, of models.
    """

    def __init__(
        self,
        models: dict[str, str],
        baselines: dict[str, dict[str, Any]],
        options: dict[str, Any],
        semantic_ids: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Load the models.

        Args:
            models: folders of model artifacts of one catalog, by name; the first one is evaluated.
            baselines: values of a `ModelConfig` of families without training, by name.
            options: values of a `DecodingConfig`.
            semantic_ids: folder of the semantic IDs of an append to the first model's; None: its own.
            device: where models compute; None as for `Recommender.load`.
        """
        self.options: DecodingConfig = build(DecodingConfig, options).ranked(LIST_LENGTH)
        place = None if device is None else str(device)
        first = next(iter(models))
        self.models = {
            name: Recommender.load(model, place, semantic_ids=semantic_ids if name == first else None)
            for name, model in models.items()
        }
        inputs = open_artifact(models[first], expected_kind="model").inputs
        if semantic_ids is not None:
            inputs = inputs | {"semantic_ids": open_artifact(semantic_ids)}
        self.methods = self.models | load_baselines(inputs, baselines)

    def __call__(self, part: pa.Table) -> dict[str, pa.Table | bytes]:
        """Return the ranks of the users' targets, the sums of the lists, and the lists of models."""
        histories, users = slices(part["history"]), part["source_id"].to_pylist()
        targets, splits = np.asarray(part["target"]), np.asarray(part["split"])
        ranks = {
            "user_id": part["user_id"],
            "split": part["split"],
            "target": part["target"],
            "history_length": pa.array([len(history) for history in histories], pa.int32()),
        }
        outputs: dict[str, pa.Table | bytes] = {}
        sums = []
        for name, recommender in self.methods.items():
            found, unseen = recommender.recommend_with_and_without_seen(histories, self.options, users=users)
            ranks[rank_column(name)] = _ranks(found, targets)
            ranks[rank_column(name, exclude_seen=True)] = _ranks(unseen, targets)
            for split in np.unique(splits):
                own = sum_lists(found.items[splits == split], recommender.num_items)
                labels = pa.array([list_key(name, SPLITS[split])] * len(own)).dictionary_encode()
                sums.append(own.append_column("list", labels))
            if name in self.models:
                columns = _columns(found, "") | _columns(unseen, "unseen_")
                outputs[f"{LISTS}/{name}"] = pa.table({"user_id": part["user_id"], **columns})
        return outputs | {SUMS: pa.concat_tables(sums).unify_dictionaries(), RANKS: pa.table(ranks)}


def load_baselines(inputs: dict[str, Any], baselines: dict[str, dict[str, Any]]) -> dict[str, Recommender]:
    """Return the recommenders of families without training, by name, for the artifacts that a model was made from."""
    data = StoredData(inputs)
    ids = inputs.get("semantic_ids")
    found: dict[str, Recommender] = {}
    for name, values in baselines.items():
        config = ModelConfig.resolve(values)
        found[name] = load_family(config).recommender(nn.Module(), config, data, torch.device("cpu"))
        found[name].available = None if ids is None else available_items(ids)
    return found


def rank_column(method: str, exclude_seen: bool = False) -> str:
    """Return the column with the ranks of a method, from 1; 0 where the list does not hold the target."""
    return f"{'unseen_' if exclude_seen else ''}rank_{method}"


def list_key(method: str, split: str) -> str:
    """Return what the sums of a method's lists for a split are filed under."""
    return f"{method}/{split}"


def read_ranks(
    folder: Folder, methods: Sequence[str], counts: npt.NDArray[np.int64]
) -> dict[Split, tuple[dict[str, MethodRanks], SplitUsers]]:
    """Return by split what the shards have found of every method, and of the users, in their order.

    Args:
        folder: folder with the outputs of all shards.
        methods: names of the methods.
        counts: int64 [items], interactions of every item in training.
    """
    sums = {(method, split): ListSums(len(counts)) for method in methods for split in SPLITS}
    parts = []
    for file in shard_files(folder.child(RANKS)):
        parts.append(folder.read_table(f"{RANKS}/{file}"))
        table = folder.read_table(f"{SUMS}/{file}")
        for (method, split), total in sums.items():
            total.add(table.filter(pc.equal(table["list"], list_key(method, split))))
    ranks = pa.concat_tables(parts)
    found: dict[Split, tuple[dict[str, MethodRanks], SplitUsers]] = {}
    for number, split in enumerate(SPLITS):
        own = ranks.filter(pc.equal(ranks["split"], number))
        users = SplitUsers(np.asarray(own["history_length"]), counts[np.asarray(own["target"])])
        of_methods = {
            method: MethodRanks(
                np.asarray(own[rank_column(method)]),
                np.asarray(own[rank_column(method, exclude_seen=True)]),
                sums[method, split],
            )
            for method in methods
        }
        found[split] = of_methods, users
    return found


def _ranks(found: Recommendations, targets: npt.NDArray[Any]) -> pa.Array:
    return pa.array(target_ranks(found.items, targets).astype(np.uint8))


def _columns(found: Recommendations, prefix: str) -> dict[str, pa.Array]:
    return {
        f"{prefix}items": fixed_lists(found.items.astype(np.int32)),
        f"{prefix}scores": fixed_lists(found.scores),
    }
