"""The items nearest to the last one, by cosine of their text embeddings, that one excluded."""

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
    """Nearest neighbors have no options."""

    inputs: ClassVar[tuple[str, ...]] = ("catalog", "embeddings")

    kind: Literal["nearest_neighbors"] = Field("nearest_neighbors", description="the items nearest to the last one")


class NearestNeighbors(ScoringRecommender):
    """Ranks items by the similarity of their texts to that of the last item."""

    def __init__(self, data: ModelData) -> None:
        super().__init__(data)
        vectors = data.text_embeddings.float().numpy()
        self.unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def scores(self, histories: list[Rows]) -> npt.NDArray[Any]:
        """Return cosines, float32 [B, items]; -inf for the last item itself."""
        last = np.array([history[-1] for history in histories])
        similarity: npt.NDArray[Any] = self.unit[last] @ self.unit.T
        similarity[np.arange(len(last)), last] = -np.inf
        return similarity


def recommender(module: nn.Module, config: Config, data: ModelData, device: torch.device) -> Recommender:
    """Read the text embeddings."""
    return NearestNeighbors(data)
