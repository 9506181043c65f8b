"""A trained model, ready to recommend: evaluation, batch jobs and serving call only this.

recommender = Recommender.load("runs/model-1a2b3c4d")
print(recommender.recommend([["B000142FVW", "B0009V1YR8"]], k=5))  # ids, titles and scores
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tiger.core.artifacts import Artifact, open_artifact
from tiger.core.config import build
from tiger.core.errors import ConfigError, DataError
from tiger.core.storage import MANIFEST, Folder
from tiger.data.catalog import Catalog
from tiger.models.base import ModelConfig, StoredData, load_family
from tiger.models.decoding import DecodingConfig
from tiger.models.exported import HUB, download, is_exported, load_exported
from tiger.models.sampling import hash_users, limit_per_group, sample_top_k
from tiger.training.weights import load_weights

_OVERSAMPLING = 4
"""Items per prefix of a beam that a sample, or a limit per first code, chooses from."""

Rows = npt.NDArray[np.int64]
Search = Callable[[list[Rows], Sequence[str] | None, int, bool], tuple[Tensor, Tensor]]
"""(histories, users, number of results, exclude seen) -> items int64 [B, R] and scores [B, R], best first, item -1 with
score -inf where there are fewer."""


@dataclass(frozen=True)
class Recommendations:
    """For each history the best items, best first; printed with titles if the catalog is known.

    Attributes:
        items: int64 [U, K] item indices, -1 where the catalog has no more.
        scores: float32 [U, K], -inf there; log-probabilities of generative models.
        by_popularity: bool [U], whether the history was empty: its list holds the most popular items of training, with
            the logarithms of their frequencies.
        catalog: the catalog of the items, for their ids and titles.
    """

    items: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    by_popularity: npt.NDArray[np.bool_]
    catalog: Catalog | None = field(default=None, repr=False)

    @property
    def ids(self) -> list[list[str]]:
        """The catalog's own ids of each list."""
        return self._of_items(self._known_catalog().source_ids)

    @property
    def titles(self) -> list[list[str]]:
        """The titles of each list."""
        return self._of_items(self._known_catalog().titles)

    def _known_catalog(self) -> Catalog:
        if self.catalog is None:
            raise DataError("the recommender was made without a catalog, so that items have no ids; use `items`")
        return self.catalog

    def _of_items(self, values: list[str]) -> list[list[str]]:
        return [[values[item] for item in row if item >= 0] for row in self.items.tolist()]

    def __str__(self) -> str:
        """Format every list: rank, score, id and title."""
        lines = []
        for user, (ids, titles, scores) in enumerate(zip(self.ids, self.titles, self.scores, strict=True)):
            lines.append(f"history {user}" + (": most popular items" if self.by_popularity[user] else ""))
            for rank, (name, title, score) in enumerate(zip(ids, titles, scores, strict=False), 1):
                lines.append(f"{rank:>4}. {score:>7.2f}  {name:<12}  {title:.80}")
        return "\n".join(lines)


class Recommender(ABC):
    """Ranks the items of a catalog after a history."""

    needs_users = False
    """Whether the model reads the user's id."""

    def __init__(self, num_items: int, device: torch.device, catalog: Catalog | None = None) -> None:
        self.num_items, self.device, self.catalog = num_items, device, catalog
        self.groups: Tensor | None = None
        """int64 [items], the first code of every item; None for a model without semantic IDs."""
        self.max_history_items: int | None = None
        """Most recent items of a history that are read; None: all."""

    @staticmethod
    def load(run: str | Artifact, device: str | None = None) -> Recommender:
        """Open a model artifact of any family, or an exported model.

        Args:
            run: the artifact or its folder, a folder that `tiger export` has written, or `hf://USER/NAME`.
            device: where to compute; None: the GPU if there is one.

        Raises:
            ArtifactError: it is missing, incomplete, altered, or not a model.
            ResourceError: the hub does not have it or cannot be reached.
        """
        if isinstance(run, str) and (exported := _exported(run)):
            found: Recommender = load_exported(exported, default_device(device))
            return found
        artifact = open_artifact(run, expected_kind="model") if isinstance(run, str) else run
        artifact.verify()
        if "semantic_ids" in artifact.inputs:
            artifact.inputs["semantic_ids"].verify()
        config: ModelConfig = ModelConfig.resolve(artifact.manifest["config"])
        data = StoredData(artifact.inputs)
        family = load_family(config)
        module = family.build(config, data) if hasattr(family, "build") else nn.Module()
        load_weights(module, artifact.folder)
        recommender: Recommender = family.recommender(module, config, data, default_device(device))
        recommender.catalog = data.catalog
        return recommender

    @abstractmethod
    def search(self, options: DecodingConfig, allowed_items: npt.NDArray[np.bool_] | None) -> Search:
        """Return the function that ranks a batch of non-empty histories, under a filter bool [items] if given."""

    @abstractmethod
    def training_counts(self) -> npt.NDArray[np.int64]:
        """Return how often training has seen each item, int64 [items]."""

    def recommend(
        self,
        histories: Sequence[Sequence[int] | Sequence[str] | npt.NDArray[Any]],
        options: DecodingConfig | None = None,
        *,
        users: Sequence[str] | None = None,
        allowed_items: npt.NDArray[np.bool_] | Sequence[int] | Sequence[str] | None = None,
        **changes: Any,
    ) -> Recommendations:
        """Return the best next items of each history.

        Args:
            histories: items in time order, as the catalog's own ids or as indices; the model reads the most recent
                ones. An empty one gets the most popular items.
            options: see `DecodingConfig`.
            users: ids of the users, for a model that reads them, and for samples that do not depend on the batch.
            allowed_items: a filter for all users, in stock or of a category: bool [items], ids, or indices.
            **changes: options to change: `k=5`, `beam=20`.

        Raises:
            ConfigError: an option is unknown, out of its range, or not for this model.
            DataError: a history or the filter holds what is not an item of the catalog; names it.
            ValueError: the numbers of users and histories differ, or users are missing.
        """
        options = options or DecodingConfig()
        if changes:
            options = build(DecodingConfig, options.model_dump() | changes, "decoding.")
        if users is not None and len(users) != len(histories):
            raise ValueError(f"{len(users)} users for {len(histories)} histories")
        if self.needs_users and users is None:
            raise ValueError("this model reads user ids: pass users")
        if options.max_per_first_code is not None and self.groups is None:
            raise ConfigError("decoding.max_per_first_code: this model has no semantic IDs; remove the key")
        allowed = None if allowed_items is None else self._filter(allowed_items)
        arrays = [self._indices(history, f"history {row}") for row, history in enumerate(histories)]
        items = np.full((len(arrays), options.k), -1, np.int64)
        scores = np.full((len(arrays), options.k), -np.inf, np.float32)
        lengths = np.array([len(history) for history in arrays], np.int64)
        by_popularity = lengths == 0
        if by_popularity.any():
            popular, frequency = self._most_popular(options.k, allowed)
            items[by_popularity, : len(popular)], scores[by_popularity, : len(popular)] = popular, frequency
        read = np.minimum(lengths, self.max_history_items or np.iinfo(np.int64).max)
        order = np.argsort(read, kind="stable")[int(by_popularity.sum()) :]  # equal lengths share a batch
        search = self.search(options, allowed)
        draws = _draws(users, len(arrays))
        sampled = options.temperature > 0 or options.max_per_first_code is not None
        results = max(options.k, _OVERSAMPLING * options.beam) if sampled else options.k
        for first in range(0, len(order), options.batch_size):
            rows = order[first : first + options.batch_size]
            batch = [arrays[row] for row in rows]
            names = None if users is None else [users[row] for row in rows]
            found, score = search(batch, names, results, options.exclude_seen)
            if options.temperature > 0:
                uniform = [np.random.default_rng([options.seed, draws[row]]).random(found.shape[1]) for row in rows]
                noise = torch.from_numpy(np.stack(uniform).clip(1e-12, 1 - 1e-12)).to(found.device)
                found, score = sample_top_k(found, score, found.shape[1], options.temperature, noise)
            if options.max_per_first_code is not None:
                assert self.groups is not None
                found, score = limit_per_group(found, score, options.k, self.groups, options.max_per_first_code)
            width = min(options.k, found.shape[1])
            items[rows, :width] = found[:, :width].cpu().numpy()
            scores[rows, :width] = score[:, :width].cpu().numpy()
        return Recommendations(items, scores, by_popularity, self.catalog)

    def recommend_with_and_without_seen(
        self,
        histories: Sequence[npt.NDArray[Any]],
        options: DecodingConfig,
        *,
        users: Sequence[str] | None = None,
        allowed_items: npt.NDArray[np.bool_] | Sequence[int] | Sequence[str] | None = None,
    ) -> tuple[Recommendations, Recommendations]:
        """Return the best items of each history, once with all items allowed and once without those of the history.

        One search gives both: what a history holds is left out of longer lists. Arguments are those of `recommend`.
        """
        longest = max((len(np.unique(history)) for history in histories), default=0)
        wide = self.recommend(histories, options.ranked(options.k + longest), users=users, allowed_items=allowed_items)
        unseen = drop_seen(wide, histories, options.k)
        everything = Recommendations(
            wide.items[:, : options.k], wide.scores[:, : options.k], wide.by_popularity, self.catalog
        )
        return everything, unseen

    def _most_popular(
        self, k: int, allowed: npt.NDArray[np.bool_] | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the `k` items that training has seen most, and the logarithms of their frequencies."""
        counts = self.training_counts()
        candidates = np.arange(len(counts)) if allowed is None else np.flatnonzero(allowed)
        items = candidates[np.argsort(-counts[candidates], kind="stable")][:k]
        return items, np.log((counts[items] + 1) / (counts.sum() + len(counts))).astype(np.float32)

    def _filter(self, allowed: npt.NDArray[np.bool_] | Sequence[int] | Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return a filter as bool [items]."""
        array = np.asarray(allowed)
        if array.dtype == bool:
            if array.shape != (self.num_items,):
                raise DataError(f"allowed_items has shape {array.shape}, the catalog {self.num_items} items")
            return array
        mask = np.zeros(self.num_items, bool)
        mask[self._indices(allowed, "allowed_items")] = True
        return mask

    def _indices(self, items: Sequence[Any] | npt.NDArray[Any], where: str) -> Rows:
        """Return items as indices, int64 [N].

        Raises:
            DataError: one is not of the catalog; names `where` and the item.
        """
        if not len(items):
            return np.zeros(0, np.int64)
        array = np.asarray(items, None if isinstance(items, np.ndarray) else object)
        if array.ndim == 1 and self.catalog is not None and all(isinstance(item, str) for item in array):
            index = self.catalog.item_index
            if unknown := [name for name in array if name not in index]:
                raise DataError(f"{where} holds {unknown[0]!r}, which is not an item id of the catalog")
            return np.array([index[name] for name in array], np.int64)
        numbers = array.dtype.kind in "iu" or all(type(item) is int or isinstance(item, np.integer) for item in array)
        if array.ndim != 1 or not numbers:
            raise DataError(f"{where} holds {array.flat[0]!r}, which is neither an item id nor an index")
        if array.min() < 0 or array.max() >= self.num_items:
            raise DataError(f"{where} holds an item outside of 0 .. {self.num_items - 1}")
        return array.astype(np.int64)


def default_device(device: str | None) -> torch.device:
    """Return the device of this name; None: the GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _exported(run: str) -> Folder | None:
    """Return the folder of an exported model, downloaded if needed; None if it is something else."""
    folder = download(run) if run.startswith(HUB) else Folder(run)
    return folder if not folder.exists(MANIFEST) and is_exported(folder) else None


def drop_seen(found: Recommendations, histories: Sequence[npt.NDArray[Any]], k: int) -> Recommendations:
    """Return lists of `k` items without those of the histories."""
    items, scores = np.full((len(histories), k), -1, np.int64), np.full((len(histories), k), -np.inf, np.float32)
    for row, history in enumerate(histories):
        kept = np.flatnonzero(~np.isin(found.items[row], history) & (found.items[row] >= 0))[:k]
        items[row, : len(kept)], scores[row, : len(kept)] = found.items[row, kept], found.scores[row, kept]
    return Recommendations(items, scores, found.by_popularity, found.catalog)


def _draws(users: Sequence[str] | None, rows: int) -> npt.NDArray[np.int64]:
    """Return the seeds of samples, int64 [rows]: of the user, or of the row where users have no ids."""
    return np.arange(rows) if users is None else hash_users(users, 1 << 31)
