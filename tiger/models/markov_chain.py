"""A first-order Markov chain: what most often followed the last item in training; then what is most popular."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from pydantic import Field
from torch import nn

from tiger.models.base import ModelConfig, ModelData
from tiger.models.recommender import Recommender, Rows
from tiger.models.scoring import ScoringRecommender


class Config(ModelConfig):
    """The Markov chain has no options."""

    kind: Literal["markov_chain"] = Field("markov_chain", description="what most often came next after the last item")


class MarkovChain(ScoringRecommender):
    """Ranks items by how often they followed the last item."""

    def __init__(self, data: ModelData) -> None:
        super().__init__(data)
        histories = data.histories
        targets = histories.training_target_positions()
        following, before = histories.items[targets], histories.items[targets - 1]
        shape = (data.num_items, data.num_items)
        self.transitions = scipy.sparse.coo_matrix((np.ones(len(before)), (before, following)), shape=shape).tocsr()
        counts = self.training_counts()
        self.tie_break = counts / (counts.max() + 1.0)  # below 1, the weight of a transition

    def scores(self, histories: list[Rows]) -> npt.NDArray[Any]:
        """Return the numbers of transitions from the last items, float64 [B, items]."""
        scores: npt.NDArray[Any] = self.transitions[[history[-1] for history in histories]].toarray() + self.tie_break
        return scores


def recommender(module: nn.Module, config: Config, data: ModelData, device: torch.device) -> Recommender:
    """Count the transitions of the training parts."""
    return MarkovChain(data)
