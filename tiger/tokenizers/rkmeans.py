"""Residual k-means: level by level, k-means on what the levels before have left over.

No gradient, seconds on a CPU, no dead codes: the baseline that a learned tokenizer has to beat (OneRec's RQ-KMeans,
arXiv 2502.18965, section 3).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from tiger.tokenizers import TokenizerConfig
from tiger.tokenizers._residual import ResidualTokenizer
from tiger.training import TrainingConfig


class NoTraining(TrainingConfig):
    """k-means is all there is."""

    epochs: int = Field(0, ge=0, le=0, description="always 0: there is nothing to train")


class Config(TokenizerConfig):
    """All knobs are those of the contract."""

    kind: str = Field("rkmeans", description="quantizer: residual k-means")
    training: NoTraining = NoTraining()


class ResidualKMeans(ResidualTokenizer):
    def __init__(self, config: Config, dim: int) -> None:
        super().__init__(config, dim)
        self.register_buffer("codebooks", torch.zeros(config.levels, config.codebook_size, dim))

    def forward(self, batch: Tensor) -> Tensor:
        return self.standardize(self.decode(self.encode(batch)) - batch + self.mean).square().sum(1)


def build(config: Config, dim: int) -> ResidualKMeans:
    return ResidualKMeans(config, dim)
