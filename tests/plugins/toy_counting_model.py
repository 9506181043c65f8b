"""An example of a model family without weights: items that share the most users with the history."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from tiger.models.base import ModelConfig, ModelData
from tiger.models.recommender import Recommender, Rows
from tiger.models.scoring import ScoringRecommender


class Config(ModelConfig):
    """Counting has no options."""

    kind: str = Field("tests.plugins.toy_counting_model", description="items that share the most users")


class SharedUsers(ScoringRecommender):
    """Ranks items by the number of training users that they share with each item of the history, summed."""

    def __init__(self, data: ModelData) -> None:
        super().__init__(data)
        histories = data.histories
        owned = np.zeros((len(histories), data.num_items), np.int64)
        for user, (begin, end) in enumerate(zip(histories.offsets, histories.train_end, strict=False)):
            owned[user, histories.items[begin:end]] = 1  # training parts only: the rest are targets
        self.shared = owned.T @ owned

    def scores(self, histories: list[Rows]) -> npt.NDArray[Any]:
        """Return the numbers of shared users, float64 [B, items]."""
        return np.stack([self.shared[history].sum(axis=0) for history in histories]).astype(np.float64)


def recommender(module: nn.Module, config: Config, data: ModelData, device: torch.device) -> Recommender:
    """Count the users of the training parts."""
    return SharedUsers(data)
