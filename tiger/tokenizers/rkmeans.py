"""Residual k-means: level by level, k-means on what the levels before have left over.

No gradient, seconds on a CPU, no dead codes: the baseline that a learned tokenizer has to beat (OneRec's RQ-KMeans,
arXiv 2502.18965, section 3). For catalogs larger than memory `on_ray/kmeans.py` fits the same over a Ray Dataset.
"""

from __future__ import annotations

import torch
from pydantic import Field

from tiger.tokenizers._residual import ResidualConfig, ResidualTokenizer
from tiger.tokenizers.base import NoTrainingConfig


class Config(ResidualConfig):
    """Knobs of k-means over catalogs beyond memory, beside those of residual quantization."""

    kind: str = Field("rkmeans", description="quantizer: residual k-means")
    streaming: bool = Field(
        False, description="read the vectors part by part, on all nodes: for catalogs beyond memory"
    )
    passes_per_level: int = Field(10, ge=1, description="passes over all vectors per level, with streaming = true")
    training: NoTrainingConfig = NoTrainingConfig()


class ResidualKMeans(ResidualTokenizer):
    def __init__(self, config: Config, dim: int) -> None:
        super().__init__(config, dim)
        self.register_buffer("codebooks", torch.zeros(config.num_levels, config.codebook_size, dim))


def build(config: Config, dim: int) -> ResidualKMeans:
    return ResidualKMeans(config, dim)
