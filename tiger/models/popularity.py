"""Popularity: the items with most interactions in training, for everyone."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from tiger.models.base import ModelConfig, ModelData
from tiger.models.recommender import Recommender, Rows
from tiger.models.scoring import ScoringRecommender


class Config(ModelConfig):
    """Popularity has no options."""

    personalized: ClassVar[bool] = False

    kind: Literal["popularity"] = Field("popularity", description="the items with most interactions in training")


class Popularity(ScoringRecommender):
    """Ranks items by their number of interactions in training."""

    def scores(self, histories: list[Rows]) -> npt.NDArray[Any]:
        """Return the counts for every history, float64 [B, items]."""
        return np.tile(self.training_counts().astype(np.float64), (len(histories), 1))


def recommender(module: nn.Module, config: Config, data: ModelData, device: torch.device) -> Recommender:
    """Count the interactions of the training parts."""
    return Popularity(data)
