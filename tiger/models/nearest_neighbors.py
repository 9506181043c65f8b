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
                top = top_items(block, num_results)
                items = np.concatenate([items, top + begin], axis=1)
                scores = np.concatenate([scores, np.take_along_axis(block, top, axis=1)], axis=1)
                best = np.argsort(-scores, axis=1, kind="stable")[:, :num_results]  # earlier items come first in ties
                items = np.take_along_axis(items, best, axis=1)
                scores = np.take_along_axis(scores, best, axis=1)
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


def recommender(module: nn.Module, config: Config, data: ModelData, device: torch.device) -> Recommender:
    """Read the text embeddings."""
    return NearestNeighbors(data)
