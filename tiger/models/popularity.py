"""Popularity: the items with most interactions in training, for everyone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from tiger.models.base import ModelConfig, ModelData
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender, Rows, Search
from tiger.models.scoring import CountingRecommender, by_popularity, first_unseen


class Config(ModelConfig):
    """Popularity has no options."""

    personalized: ClassVar[bool] = False

    kind: Literal["popularity"] = Field("popularity", description="the items with most interactions in training")


class Popularity(CountingRecommender):
    """Ranks items by their number of interactions in training; one ranking for all histories."""

    def __init__(self, data: ModelData) -> None:
        super().__init__(data)
        self.ranking = by_popularity(self.training_counts())

    def search(self, options: DecodingConfig, allowed_items: npt.NDArray[np.bool_] | None) -> Search:
        """Return the function that takes the beginning of the ranking; scores are the counts."""
        ranking = self.ranking if allowed_items is None else self.ranking[allowed_items[self.ranking]]

        def search(
            histories: list[Rows], users: Sequence[str] | None, num_results: int, exclude_seen: bool
        ) -> tuple[Tensor, Tensor]:
            width = min(num_results, self.num_items)
            items = np.full((len(histories), width), -1, np.int64)
            scores = np.full((len(histories), width), -np.inf, np.float32)
            for row, history in enumerate(histories):
                found = first_unseen(ranking, history, width) if exclude_seen else ranking[:width]
                items[row, : len(found)], scores[row, : len(found)] = found, self._counts[found]
            return torch.from_numpy(items), torch.from_numpy(scores)

        return search


def recommender(module: nn.Module, config: Config, data: ModelData, device: torch.device) -> Recommender:
    """Count the interactions of the training parts."""
    return Popularity(data)
