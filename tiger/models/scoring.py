"""Recommenders that count or score items of the whole catalog, and the top of each row of scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger.data.history_blocks import training_counts
from tiger.models.base import ModelData
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender, Rows, Search

_SCORES_AT_ONCE = 1 << 27
"""Scores in memory at a time: histories x items."""


class CountingRecommender(Recommender):
    """Base of the families that know how often training has seen each item, with NumPy."""

    def __init__(self, data: ModelData, device: torch.device | None = None) -> None:
        super().__init__(data.num_items, device or torch.device("cpu"))
        self._counts = training_counts(data.history_blocks(), data.num_items)

    def training_counts(self) -> npt.NDArray[np.int64]:
        """Return the number of training interactions of each item, int64 [items]."""
        return self._counts


class RankingRecommender(CountingRecommender):
    """Base of the families that rank the items of one history at a time; `ranking` has all items by popularity."""

    def __init__(self, data: ModelData) -> None:
        super().__init__(data)
        self.ranking = by_popularity(self._counts)

    @abstractmethod
    def best_items(
        self,
        history: Rows,
        excluded: Rows,
        ranking: npt.NDArray[np.int64],
        allowed_items: npt.NDArray[np.bool_] | None,
        width: int,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Return the best items after a non-empty history, at most `width`, and their scores.

        Args:
            history: the items of the history.
            excluded: items that must not come back.
            ranking: the allowed items by popularity.
            allowed_items: bool [items]; None: all.
            width: number of items.
        """

    def search(self, options: DecodingConfig, allowed_items: npt.NDArray[np.bool_] | None) -> Search:
        """Return the function that ranks the items of every history."""
        ranking = self.ranking if allowed_items is None else self.ranking[allowed_items[self.ranking]]

        def search(
            histories: list[Rows], users: Sequence[str] | None, num_results: int, exclude_seen: bool
        ) -> tuple[Tensor, Tensor]:
            width = min(num_results, self.num_items)
            items = np.full((len(histories), width), -1, np.int64)
            scores = np.full((len(histories), width), -np.inf, np.float32)
            for row, history in enumerate(histories):
                excluded = history if exclude_seen else history[:0]
                found, score = self.best_items(history, excluded, ranking, allowed_items, width)
                items[row, : len(found)], scores[row, : len(found)] = found, score
            return torch.from_numpy(items), torch.from_numpy(scores)

        return search


class ScoringRecommender(CountingRecommender):
    """Base of the families that compare a history with all items."""

    @abstractmethod
    def scores(self, histories: list[Rows]) -> npt.NDArray[Any]:
        """Return the scores of all items after non-empty histories, floating-point [B, items]; -inf: never.

        The array is a new one: `search` overwrites the scores of excluded items in it.
        """

    def search(self, options: DecodingConfig, allowed_items: npt.NDArray[np.bool_] | None) -> Search:
        """Return the function that scores all items and takes the best ones, of equals the lower index first."""
        at_once = max(1, _SCORES_AT_ONCE // max(1, self.num_items))

        def search(
            histories: list[Rows], users: Sequence[str] | None, num_results: int, exclude_seen: bool
        ) -> tuple[Tensor, Tensor]:
            parts = [histories[first : first + at_once] for first in range(0, len(histories), at_once)]
            found = [self._best(part, allowed_items, num_results, exclude_seen) for part in parts]
            items, best = (np.concatenate(column) for column in zip(*found, strict=True))
            return torch.from_numpy(items), torch.from_numpy(best.astype(np.float32))

        return search

    def _best(
        self, histories: list[Rows], allowed_items: npt.NDArray[np.bool_] | None, num_results: int, exclude_seen: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        scores = self.scores(histories)
        if allowed_items is not None:
            scores = np.where(allowed_items, scores, -np.inf)
        if exclude_seen:
            for row, history in enumerate(histories):
                scores[row, history] = -np.inf
        items = top_items(scores, num_results)
        best = np.take_along_axis(scores, items, axis=1)
        return np.where(np.isneginf(best), -1, items), best


def top_items(scores: npt.NDArray[Any], k: int) -> npt.NDArray[np.int64]:
    """Return the columns of the `k` highest scores of each row, highest first, of equals the lower column first.

    Args:
        scores: floating-point [B, N]; if N < k, N columns are returned.
        k: number of columns.
    """
    width = min(k, scores.shape[1])
    top = np.argpartition(-scores, width - 1, axis=1)[:, :width]
    lowest = np.take_along_axis(scores, top, axis=1).min(axis=1)
    for row in np.flatnonzero((scores >= lowest[:, None]).sum(axis=1) > width):  # ties at the edge
        above = np.flatnonzero(scores[row] > lowest[row])
        tied = np.flatnonzero(scores[row] == lowest[row])
        top[row] = np.concatenate([above, tied[: width - len(above)]])
    top.sort(axis=1)
    order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable")
    return np.take_along_axis(top, order, axis=1).astype(np.int64)


def by_popularity(counts: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Return all items by their counts [N], highest first, of equals the lower index first, int64 [N]."""
    return np.argsort(-counts, kind="stable")


def first_unseen(ranking: npt.NDArray[np.int64], seen: npt.NDArray[np.integer], k: int) -> npt.NDArray[np.int64]:
    """Return the first `k` items of a ranking that are not among the seen ones; the rest of it is not looked at."""
    beginning = ranking[: k + len(seen)]
    return beginning[~np.isin(beginning, seen)][:k]
