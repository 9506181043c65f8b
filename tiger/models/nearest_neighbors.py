"""The items nearest to the last one, by cosine of their text embeddings, that one excluded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from tiger.models.base import ModelConfig, ModelData
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender, Rows, Search
from tiger.models.scoring import CountingRecommender, top_items

_BLOCK_ITEMS = 1 << 16
_MERGED = 8  # candidates of a block for each result


class Config(ModelConfig):
    """Nearest neighbors have no options."""

    inputs: ClassVar[tuple[str, ...]] = ("catalog", "embeddings")

    kind: Literal["nearest_neighbors"] = Field("nearest_neighbors", description="the items nearest to the last one")


class NearestNeighbors(CountingRecommender):
    """Ranks items by the similarity of their texts to that of the last item, a block of items at a time."""

    def __init__(self, data: ModelData) -> None:
        super().__init__(data)
        self.vectors = data.text_embeddings  # of a large catalog, mapped from a file
        blocks = self.vectors.split(_BLOCK_ITEMS)
        lengths = [np.linalg.norm(block.float().numpy(), axis=1, keepdims=True) for block in blocks]
        self.lengths = np.maximum(np.concatenate(lengths), 1e-12)

    def _unit(self, items: npt.NDArray[Any] | slice) -> npt.NDArray[np.float32]:
        """Return the text embeddings of some items, divided by their lengths."""
        rows = self.vectors[items if isinstance(items, slice) else torch.from_numpy(items)].float().numpy()
        unit: npt.NDArray[np.float32] = rows / self.lengths[items]
        return unit

    def search(self, options: DecodingConfig, allowed_items: npt.NDArray[np.bool_] | None) -> Search:
        """Return the function that keeps the best items of all blocks; scores are cosines."""

        def search(
            histories: list[Rows], users: Sequence[str] | None, num_results: int, exclude_seen: bool
        ) -> tuple[Tensor, Tensor]:
            last = self._unit(np.array([history[-1] for history in histories]))
            items = np.zeros((len(last), 0), np.int64)
            scores = np.zeros((len(last), 0), np.float32)
            for begin in range(0, self.num_items, _BLOCK_ITEMS):
                block = self._similarity(histories, last, begin, allowed_items, exclude_seen)
                rows, columns = _candidates(block, scores, num_results)
                items, scores = _merge(items, scores, rows, columns + begin, block[rows, columns], num_results)
            return torch.from_numpy(np.where(np.isneginf(scores), -1, items)), torch.from_numpy(scores)

        return search

    def _similarity(
        self,
        histories: list[Rows],
        last: npt.NDArray[np.float32],
        begin: int,
        allowed_items: npt.NDArray[np.bool_] | None,
        exclude_seen: bool,
    ) -> npt.NDArray[np.float32]:
        """Return the cosines of last items (unit vectors) with those of a block, [B, block]; -inf for excluded ones."""
        end = min(begin + _BLOCK_ITEMS, self.num_items)
        similarity: npt.NDArray[np.float32] = last @ self._unit(slice(begin, end)).T
        if allowed_items is not None:
            similarity[:, ~allowed_items[begin:end]] = -np.inf
        for row, history in enumerate(histories):
            excluded = history if exclude_seen else history[-1:]
            similarity[row, excluded[(excluded >= begin) & (excluded < end)] - begin] = -np.inf
        return similarity


def _candidates(
    block: npt.NDArray[np.float32], best: npt.NDArray[np.float32], width: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return rows and columns of scores [B, N] among which are those that belong to the best `width` of each row.

    Args:
        block: scores of the next items.
        best: the best scores so far, [B, at most `width`], highest first; an equal score of a later item is not better.
        width: number of scores to keep.
    """
    if best.shape[1] == width:
        found = np.flatnonzero(block > best[:, -1:])
        if len(found) <= _MERGED * best.size:  # as a rule few: finding the best of all takes five times as long
            rows, columns = np.divmod(found, block.shape[1])
            return rows, columns
    columns = top_items(block, width)
    return np.repeat(np.arange(len(block)), columns.shape[1]), columns.ravel()


def _merge(
    items: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    more_items: npt.NDArray[np.int64],
    more_scores: npt.NDArray[np.float32],
    width: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the best items of each row, and their scores, [B, at most `width`]; of equal scores the first item.

    Args:
        items, scores: those so far, [B, k].
        rows, more_items, more_scores: those to merge, in any order; every row has as many or more than it lacks.
        width: number of items to keep.
    """
    held = items.shape[1]
    row = np.concatenate([np.repeat(np.arange(len(items)), held), rows])
    item, score = np.append(items, more_items), np.append(scores, more_scores)
    order = np.lexsort((item, -score, row))
    counts = np.bincount(row, minlength=len(items))
    kept = min(width, int(counts.min(initial=width)))
    best = order[(np.cumsum(counts) - counts)[:, None] + np.arange(kept)]
    return item[best], score[best]


def recommender(module: nn.Module, config: Config, data: ModelData, device: torch.device) -> Recommender:
    """Read the text embeddings."""
    return NearestNeighbors(data)
