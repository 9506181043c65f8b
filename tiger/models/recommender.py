"""A trained model, ready to recommend: evaluation, batch jobs and serving call only this.

recommender = Recommender.load("runs/model-1a2b3c4d")
print(recommender.recommend([["B000142FVW", "B0009V1YR8"]], k=5))  # ids, titles and scores
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tiger.core.artifacts import Artifact, open_artifact
from tiger.core.config import build
from tiger.core.errors import ArtifactError, ConfigError, DataError
from tiger.core.storage import MANIFEST, Folder
from tiger.data.catalog import Catalog
from tiger.data.grown_catalog import available_items, chain, require_chain
from tiger.data.histories import most_popular
from tiger.data.item_names import shortened
from tiger.models.base import ModelConfig, StoredData, load_family
from tiger.models.decoding import DecodingConfig
from tiger.models.exported import HUB, download, is_exported, load_exported
from tiger.models.sampling import hash_users, limit_per_group, sample_top_k
from tiger.training.weights import WEIGHTS, load_weights

_OVERSAMPLING = 4
"""Items per prefix of a beam that a sample, or a limit per first code, chooses from."""

_ITEMS_AT_ONCE = 1 << 16
"""Items of the histories of a batch, with which lists of seen items grow."""

_WIDE = 512
"""Items up to which lists grow with the longest history of a call; further ones with that of their batch."""

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

    def _of_items(self, values: Sequence[str]) -> list[list[str]]:
        return [[values[item] for item in row if item >= 0] for row in self.items.tolist()]

    def __str__(self) -> str:
        """Format every list: rank, score, id and title."""
        lines = []
        for user, (ids, titles, scores) in enumerate(zip(self.ids, self.titles, self.scores, strict=True)):
            lines.append(f"history {user}" + (": most popular items" if self.by_popularity[user] else ""))
            for rank, (name, title, score) in enumerate(zip(ids, titles, scores, strict=False), 1):
                lines.append(f"{rank:>4}. {score:>7.2f}  {name:<12}  {shortened(title)}")
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
        self.available: npt.NDArray[np.bool_] | None = None
        """Items that may be recommended, bool [items]: those that are not deleted; None: all."""

    @staticmethod
    def load(
        run: str | Artifact, device: str | None = None, *, semantic_ids: str | Artifact | None = None
    ) -> Recommender:
        """Open a model artifact of any family, or an exported model.

        Args:
            run: the artifact or its folder, a folder that `tiger export` has written, or `hf://USER/NAME`.
            device: where to compute; None: the GPU if there is one.
            semantic_ids: semantic IDs of an append to the model's (`tiger append`), or their folder: its new items can
                be recommended and be part of histories, deleted ones are not recommended, and `catalog` has the ids
                and titles of all. None: the items of the training.

        Raises:
            ArtifactError: it is missing, incomplete, altered, or not a model; or the semantic IDs do not continue its
                own, or it cannot score items that training has not seen.
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
        family = load_family(config)
        trained = data = StoredData(artifact.inputs)
        if semantic_ids is not None:
            data = StoredData(artifact.inputs | {"semantic_ids": _open_append(semantic_ids, artifact)})
        module = family.build(config, data) if hasattr(family, "build") else nn.Module()
        if semantic_ids is None:
            load_weights(module, artifact.folder)
        elif hasattr(family, "grow"):
            family.grow(module, artifact.folder.read_tensors(WEIGHTS), config, trained)
        else:
            raise ArtifactError(f"model.kind = {config.kind} cannot score items that its training has not seen")
        recommender: Recommender = family.recommender(module, config, data, default_device(device))
        recommender.catalog = data.catalog
        recommender.available = available_items(data.artifacts["semantic_ids"]) if semantic_ids is not None else None
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
        self._check(histories, options, users)
        allowed = self._filter(allowed_items)
        arrays = [self._indices(history, f"history {row}") for row, history in enumerate(histories)]
        lists = self._fallback(arrays, options.k, allowed)
        for batch in self._batches(arrays, options, users, allowed, 0):
            lists.put(batch.rows, batch.items, batch.scores)
        return lists.recommendations(arrays, self.catalog)

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
        options = options.ranked(options.k)
        self._check(histories, options, users)
        allowed = self._filter(allowed_items)
        arrays = [self._indices(history, f"history {row}") for row, history in enumerate(histories)]
        everything, unseen = (self._fallback(arrays, options.k, allowed) for _ in range(2))
        longest = max((len(np.unique(history)) for history in arrays), default=0)
        for batch in self._batches(arrays, options, users, allowed, longest):
            everything.put(batch.rows, batch.items, batch.scores)
            for position, row in enumerate(batch.rows):
                kept = ~np.isin(batch.items[position], arrays[row]) & (batch.items[position] >= 0)
                unseen.put(row, batch.items[position, kept], batch.scores[position, kept])
        return everything.recommendations(arrays, self.catalog), unseen.recommendations(arrays, self.catalog)

    def _check(self, histories: Sequence[Any], options: DecodingConfig, users: Sequence[str] | None) -> None:
        if users is not None and len(users) != len(histories):
            raise ValueError(f"{len(users)} users for {len(histories)} histories")
        if self.needs_users and users is None:
            raise ValueError("this model reads user ids: pass users")
        if options.max_per_first_code is not None and self.groups is None:
            raise ConfigError("decoding.max_per_first_code: this model has no semantic IDs; remove the key")

    def _batches(
        self,
        histories: list[Rows],
        options: DecodingConfig,
        users: Sequence[str] | None,
        allowed: npt.NDArray[np.bool_] | None,
        longer: int,
    ) -> Iterator[_Batch]:
        """Yield the lists of non-empty histories, batch by batch, those of similar lengths together.

        Args:
            histories: items of each user.
            options: of the lists.
            users: their ids, if needed.
            allowed: a filter for all of them.
            longer: the most items of a history that a list must have room for, in addition to `options.k`.
        """
        lengths = np.array([len(history) for history in histories], np.int64)
        read = np.minimum(lengths, self.max_history_items or np.iinfo(np.int64).max)
        order = np.lexsort((lengths, read))[int((lengths == 0).sum()) :]  # equal lengths share a batch
        search = self.search(options, allowed)
        draws = _draws(users, len(histories))
        sampled = options.temperature > 0 or options.max_per_first_code is not None
        first = 0
        while first < len(order):
            rows = order[first : first + options.batch_size]
            # Lists have room for the longest history of a batch: one of thousands of items must not widen many others.
            rows = rows[: max(1, int(np.searchsorted(np.cumsum(lengths[rows]), _ITEMS_AT_ONCE)))]
            first += len(rows)
            results = options.k + (longer if longer <= _WIDE else min(longer, int(lengths[rows].max())))
            if sampled:
                results = max(options.k, _OVERSAMPLING * options.beam)
            names = None if users is None else [users[row] for row in rows]
            found, score = search([histories[row] for row in rows], names, results, options.exclude_seen)
            if options.temperature > 0:
                uniform = [np.random.default_rng([options.seed, draws[row]]).random(found.shape[1]) for row in rows]
                noise = torch.from_numpy(np.stack(uniform).clip(1e-12, 1 - 1e-12)).to(found.device)
                found, score = sample_top_k(found, score, found.shape[1], options.temperature, noise)
            if options.max_per_first_code is not None:
                assert self.groups is not None
                found, score = limit_per_group(found, score, options.k, self.groups, options.max_per_first_code)
            yield _Batch(rows, found.cpu().numpy(), score.cpu().numpy())

    def _fallback(self, histories: list[Rows], k: int, allowed: npt.NDArray[np.bool_] | None) -> _Lists:
        """Return lists in which empty histories have the most popular items, and others nothing yet."""
        items, scores = np.full((len(histories), k), -1, np.int64), np.full((len(histories), k), -np.inf, np.float32)
        if (empty := _is_empty(histories)).any():
            popular, frequency = self._most_popular(k, allowed)
            items[empty, : len(popular)], scores[empty, : len(popular)] = popular, frequency
        return _Lists(items, scores)

    def kept_prefixes(
        self,
        history: Rows,
        options: DecodingConfig,
        user: str | None = None,
        allowed_items: npt.NDArray[np.bool_] | None = None,
    ) -> list[list[tuple[tuple[int, ...], float]]]:
        """Return the prefixes of semantic IDs that a search keeps after a non-empty history, per level with scores.

        Empty for families that do not search prefixes.
        """
        return []

    def _most_popular(
        self, k: int, allowed: npt.NDArray[np.bool_] | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the `k` items that training has seen most, and the logarithms of their frequencies."""
        counts = self.training_counts()
        if allowed is None:
            items = most_popular(counts, k)
        else:
            candidates = np.flatnonzero(allowed)
            items = candidates[most_popular(counts[candidates], k)]
        return items, np.log((counts[items] + 1) / (counts.sum() + len(counts))).astype(np.float32)

    def _filter(
        self, allowed: npt.NDArray[np.bool_] | Sequence[int] | Sequence[str] | None
    ) -> npt.NDArray[np.bool_] | None:
        """Return a filter as bool [items], without deleted items; None: all items."""
        if allowed is None:
            return self.available
        mask = self._mask(allowed)
        return mask if self.available is None else mask & self.available

    def _mask(self, allowed: npt.NDArray[np.bool_] | Sequence[int] | Sequence[str]) -> npt.NDArray[np.bool_]:
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


@dataclass(frozen=True)
class _Batch:
    """Ranked items and scores [B, R] of some rows [B] of a call."""

    rows: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Lists:
    """Lists that are being filled: items int64 [U, K] and scores float32 [U, K]."""

    items: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]

    def put(self, rows: Any, items: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]) -> None:
        """Take the beginning of longer lists [B, R] of rows [B], or of one list [R] of a row."""
        width = min(self.items.shape[1], items.shape[-1])
        self.items[rows, :width], self.scores[rows, :width] = items[..., :width], scores[..., :width]

    def recommendations(self, histories: list[Rows], catalog: Catalog | None) -> Recommendations:
        return Recommendations(self.items, self.scores, _is_empty(histories), catalog)


def _open_append(semantic_ids: str | Artifact, model: Artifact) -> Artifact:
    """Open the semantic IDs of an append to those of a model, and verify them."""
    opened = (
        open_artifact(semantic_ids, expected_kind="semantic_ids") if isinstance(semantic_ids, str) else semantic_ids
    )
    require_chain(opened, model)
    for each in chain(opened):
        each.verify()
    return opened


def _is_empty(histories: list[Rows]) -> npt.NDArray[np.bool_]:
    return np.array([not len(history) for history in histories], bool)


def default_device(device: str | None) -> torch.device:
    """Return the device of this name; None: the GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _exported(run: str) -> Folder | None:
    """Return the folder of an exported model, downloaded if needed; None if it is something else."""
    folder = download(run) if run.startswith(HUB) else Folder(run)
    return folder if not folder.exists(MANIFEST) and is_exported(folder) else None


def _draws(users: Sequence[str] | None, rows: int) -> npt.NDArray[np.int64]:
    """Return the seeds of samples, int64 [rows]: of the user, or of the row where users have no ids."""
    return np.arange(rows) if users is None else hash_users(users, 1 << 31)
