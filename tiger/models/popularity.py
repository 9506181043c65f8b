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
from tiger.models.scoring import RankingRecommender, first_unseen


class Config(ModelConfig):
    """Popularity has no options."""

    personalized: ClassVar[bool] = False

    kind: Literal["popularity"] = Field("popularity", description="the items with most interactions in training")


class Popularity(RankingRecommender):
    """Ranks items by their number of interactions in training; one ranking for all histories."""

    def best_items(
        self,
        history: Rows,
        excluded: Rows,
        ranking: npt.NDArray[np.int64],
        allowed_items: npt.NDArray[np.bool_] | None,
        width: int,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Return the beginning of the ranking; scores are the counts."""
        found = first_unseen(ranking, excluded, width)
        return found, self._counts[found]


def recommender(module: nn.Module, config: Config, data: ModelData, device: torch.device) -> Recommender:
    """Count the interactions of the training parts."""
    return Popularity(data)
