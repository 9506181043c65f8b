"""Residual k-means: each level is k-means on the residuals of the earlier levels.

It needs no gradients and takes seconds on a CPU without dead codes: the baseline for learned tokenizers (OneRec's
RQ-KMeans, arXiv 2502.18965, section 3). For catalogs larger than memory `streaming.py` fits it shard by shard.
"""

from __future__ import annotations

import torch
from pydantic import Field

from tiger.tokenizers._residual import ResidualConfig, ResidualTokenizer
from tiger.tokenizers.base import NoTrainingConfig


class Config(ResidualConfig):
    """Options of k-means over catalogs larger than memory, in addition to those of residual quantization."""

    kind: str = Field("rkmeans", description="quantizer: residual k-means")
    streaming: bool = Field(False, description="stream shards on all nodes: for catalogs larger than memory")
    passes_per_level: int = Field(10, ge=1, description="passes over all vectors per level, with streaming = true")
    training: NoTrainingConfig = NoTrainingConfig()


class ResidualKMeans(ResidualTokenizer):
    """Residual quantization of the standardized embeddings themselves."""

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__(config, dim)
        self.register_buffer("codebooks", torch.zeros(config.num_levels, config.codebook_size, dim))


def build(config: Config, dim: int) -> ResidualKMeans:
    """Return an unfitted tokenizer for embeddings of dimension `dim`."""
    return ResidualKMeans(config, dim)
