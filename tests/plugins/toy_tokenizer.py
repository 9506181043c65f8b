"""An example of a tokenizer: one principal component per level, cut into bins of equal numbers of items."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from tiger.core.errors import ConfigError
from tiger.tokenizers.base import NoTrainingConfig, Tokenizer, TokenizerConfig


class Config(TokenizerConfig):
    """The bins have no options of their own."""

    kind: str = Field("tests.plugins.toy_tokenizer", description="bins of principal components")
    training: NoTrainingConfig = NoTrainingConfig()


class PrincipalBins(Tokenizer):
    """Directions [L, d], edges of the bins [L, K - 1], and their centers [L, K]."""

    directions: Tensor
    edges: Tensor
    centers: Tensor

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__(config, dim)
        if dim < self.levels:
            raise ConfigError(
                f"tokenizer.num_levels = {self.levels} is more than the {dim} dimensions; use at most {dim}"
            )
        self.register_buffer("directions", torch.zeros(self.levels, dim))
        self.register_buffer("edges", torch.zeros(self.levels, self.codebook_size - 1))
        self.register_buffer("centers", torch.zeros(self.levels, self.codebook_size))

    @torch.no_grad()
    def initialize(self, sample: Tensor, generator: torch.Generator) -> None:
        """Compute the principal components and the quantiles of the sample along them."""
        self.directions.copy_(torch.linalg.svd(sample, full_matrices=False).Vh[: self.levels])
        quantiles = torch.arange(1, 2 * self.codebook_size) / (2 * self.codebook_size)
        found = torch.quantile(sample @ self.directions.T, quantiles.to(sample), dim=0).T
        self.centers.copy_(found[:, 0::2])
        self.edges.copy_(found[:, 1::2])

    @torch.no_grad()
    def encode_normalized(self, batch: Tensor) -> Tensor:
        """Return the number of the bin at each level."""
        return torch.searchsorted(self.edges, (self.directions @ batch.T).contiguous()).T

    @torch.no_grad()
    def decode_normalized(self, codes: Tensor) -> Tensor:
        """Return the sum of the directions, each scaled to the center of its bin."""
        return self.centers[torch.arange(self.levels, device=codes.device), codes] @ self.directions

    @torch.no_grad()
    def last_level_costs(self, batch: Tensor) -> Tensor:
        """Return the squared distances to all centers of the last level."""
        position = self.standardize(batch) @ self.directions[-1]
        return (position[:, None] - self.centers[-1]).square()


def build(config: Config, dim: int) -> PrincipalBins:
    """Return the tokenizer before `initialize`."""
    return PrincipalBins(config, dim)
