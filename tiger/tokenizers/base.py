"""The contract of a tokenizer: embeddings -> exactly `levels` codes an item.

A tokenizer is a module in this folder (or anywhere, by its dotted name) with

    class Config(TokenizerConfig)           its knobs
    build(config, dim) -> Tokenizer         an untrained tokenizer for embeddings of that dimension

Training calls `initialize` once, on one worker, and sends the state to the others; then `forward` on every batch, as
many steps as the configuration says (none where `initialize` does all the work), with `refresh` every few epochs, on
one worker again. Collisions are not its concern: `semantic_ids.py` tells items of equal codes apart, with the help of
`last_level_costs`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tiger.core.config import PluginConfig, load_plugin
from tiger.core.errors import ConfigError
from tiger.training.loop import TrainingConfig


class TokenizerConfig(PluginConfig):
    """Knobs that every tokenizer has."""

    plugin_package: ClassVar[str] = "tiger.tokenizers"
    default_kind: ClassVar[str] = "rqvae"

    kind: str = Field("rqvae", description="quantizer: rqvae, rkmeans, opq, or a dotted module name")
    num_levels: int = Field(3, ge=1, le=8, description="codes per item, the collision code not counted")
    codebook_size: int = Field(256, ge=2, le=32_767, description="codes to choose from at each level")
    kmeans_iterations: int = Field(50, ge=1, description="iterations of k-means per level, at most")
    kmeans_sample: int = Field(100_000, ge=256, description="items that k-means looks at, at most")
    training: TrainingConfig = TrainingConfig()
    seed: int = Field(0, ge=0, description="seed of weights, k-means, dropout and order")

    @model_validator(mode="after")
    def _sample_fills_codebook(self) -> TokenizerConfig:
        if self.kmeans_sample < self.codebook_size:
            raise ValueError(
                f"kmeans_sample = {self.kmeans_sample} is less than codebook_size = {self.codebook_size}, and k-means "
                "needs at least one item per code; raise kmeans_sample"
            )
        return self


class NoTrainingConfig(TrainingConfig):
    """For tokenizers that `initialize` makes complete."""

    epochs: int = Field(0, ge=0, le=0, description="always 0: there is nothing to train")


class Tokenizer(nn.Module):
    """Base of all tokenizers; [B, d] embeddings in, int64 [B, levels] codes out."""

    mean: Tensor
    scale: Tensor
    codebook_update_every = 1
    """Epochs between two calls of `refresh`."""
    codebook_update_until = 1.0
    """Share of the epochs after which there are no further calls."""

    def __init__(self, config: TokenizerConfig, dim: int) -> None:
        super().__init__()
        self.levels, self.codebook_size, self.dim = config.num_levels, config.codebook_size, dim
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def initialize(self, sample: Tensor, generator: torch.Generator) -> None:
        """Sets the state that data decide, such as k-means codebooks. Called once, after `fit_normalizer`.

        Args:
            sample: float32 [N, d] standardized embeddings, N at least the codebook size.
            generator: the source of all randomness.
        """
        raise NotImplementedError

    def refresh(self, sample: Tensor) -> None:
        """Brings state that is not learned by gradients up to date. Called on one worker, every
        `codebook_update_every` epochs.

        Args:
            sample: the same as in `initialize`.
        """

    def forward(self, batch: Tensor) -> Tensor:
        """Loss of each row, float32 [B], of standardized embeddings; gradients are synchronized through this only.

        Here the squared error of the codes, for kinds that have nothing to train.
        """
        return (self.decode_normalized(self.encode_normalized(batch)) - batch).square().sum(1)

    def encode_normalized(self, batch: Tensor) -> Tensor:
        """Codes int64 [B, levels] of standardized embeddings; deterministic."""
        raise NotImplementedError

    def decode_normalized(self, codes: Tensor) -> Tensor:
        """Standardized embeddings float32 [B, d] that stand for int64 [B, levels] codes."""
        raise NotImplementedError

    def last_level_costs(self, batch: Tensor) -> Tensor:
        """What each code would cost an item at the last level, its codes before given: float32 [B, K].

        Squared errors, or anything that can be summed over items to say which assignment of last codes is better.

        Args:
            batch: float32 [B, d] embeddings.
        """
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, batch: Tensor) -> Tensor:
        """Codes int64 [B, levels] of float32 [B, d] embeddings."""
        return self.encode_normalized(self.standardize(batch))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Embeddings float32 [B, d] that stand for int64 [B, levels] codes."""
        return self.decode_normalized(codes) * self.scale + self.mean

    @torch.no_grad()
    def errors(self, batch: Tensor, codes: Tensor) -> Tensor:
        """Squared errors [B] of codes [B, levels], in standardized embeddings, summed over dimensions."""
        return (self.decode_normalized(codes) - self.standardize(batch)).square().sum(1)

    def latent(self, standardized: Tensor) -> Tensor:
        """What is quantized, [B, latent]: the standardized embedding unless there is an encoder."""
        return standardized

    def fit_normalizer(self, sample: Tensor) -> None:
        """Mean and standard deviation of every dimension; a constant dimension is left at its scale."""
        spread, mean = torch.std_mean(sample, dim=0, unbiased=False)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(spread > 1e-8, spread, torch.ones_like(spread)))

    def standardize(self, batch: Tensor) -> Tensor:
        return (batch - self.mean) / self.scale


def check_codebook_size(config: TokenizerConfig, n_items: int) -> None:
    """Refuses a codebook larger than the catalog.

    Raises:
        ConfigError: with the largest size that works.
    """
    if n_items < config.codebook_size:
        raise ConfigError(
            f"tokenizer.codebook_size = {config.codebook_size} is more than the {n_items} items of the catalog; "
            f"use at most {n_items}"
        )


def build(config: TokenizerConfig, dim: int) -> Tokenizer:
    """An untrained tokenizer of the configured kind for embeddings of dimension `dim`."""
    return load_plugin(TokenizerConfig.plugin_package, config.kind).build(config, dim)
