"""The contract of a tokenizer: embeddings -> exactly `levels` codes per item.

A tokenizer is a module in this folder (or in any installed package, by its dotted name) with

    class Config(TokenizerConfig)           its options
    build(config, dim) -> Tokenizer         an untrained tokenizer for embeddings of that dimension

Training calls `initialize` once, on rank 0, and broadcasts the state; then `forward` on every batch, for the configured
number of steps (zero for tokenizers fitted entirely in `initialize`), with `refresh` every few epochs, again on rank 0.
Collisions are not resolved here but in `tiger.semantic_ids`, with `assignment_costs`.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tiger.core.config import PluginConfig, load_plugin
from tiger.core.errors import ConfigError
from tiger.semantic_ids.assignment import Costs
from tiger.training.loop import TrainingConfig


class TokenizerConfig(PluginConfig):
    """Options of every tokenizer."""

    plugin_package: ClassVar[str] = "tiger.tokenizers"
    default_kind: ClassVar[str] = "rqvae"

    kind: str = Field("rqvae", description="quantizer: rqvae, rkmeans, opq, or a dotted module name")
    num_levels: int = Field(3, ge=1, le=8, description="codes per item, without the collision code")
    codebook_size: int = Field(256, ge=2, le=32_767, description="number of codes per level")
    kmeans_iterations: int = Field(50, ge=1, description="maximum k-means iterations per level")
    kmeans_sample: int = Field(100_000, ge=256, description="maximum number of items for k-means")
    training: TrainingConfig = TrainingConfig()
    seed: int = Field(0, ge=0, description="seed of weights, k-means, dropout and order")

    @model_validator(mode="after")
    def _sample_fills_codebook(self) -> TokenizerConfig:
        if self.kmeans_sample < self.codebook_size:
            raise ValueError(
                f"kmeans_sample = {self.kmeans_sample} is less than codebook_size = {self.codebook_size}, and k-means "
                "needs at least one item per code; increase kmeans_sample"
            )
        return self


class NoTrainingConfig(TrainingConfig):
    """Training options of tokenizers fitted entirely in `initialize`."""

    epochs: int = Field(0, ge=0, le=0, description="always 0: there is nothing to train")


class Tokenizer(nn.Module):
    """Base of all tokenizers: float32 [B, d] embeddings -> int64 [B, levels] codes."""

    mean: Tensor
    scale: Tensor
    codebook_update_every = 1
    """Epochs between two calls of `refresh`."""
    codebook_update_until = 1.0
    """Fraction of the epochs after which `refresh` is no longer called."""

    def __init__(self, config: TokenizerConfig, dim: int) -> None:
        super().__init__()
        self.levels, self.codebook_size, self.dim = config.num_levels, config.codebook_size, dim
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def initialize(self, sample: Tensor, generator: torch.Generator) -> None:
        """Initialize data-dependent state, such as k-means codebooks. Called once, after `fit_normalizer`.

        Args:
            sample: float32 [N, d] standardized embeddings, N at least the codebook size.
            generator: the source of all randomness.
        """
        raise NotImplementedError

    def refresh(self, sample: Tensor) -> None:
        """Update state that is not learned by gradients, on rank 0, every `codebook_update_every` epochs.

        Args:
            sample: the same as in `initialize`.
        """

    def forward(self, batch: Tensor) -> Tensor:
        """Return the loss float32 [B] of standardized embeddings; DDP synchronizes gradients of this method only.

        The default is the squared error of the codes, for tokenizers without training.
        """
        return (self.decode_normalized(self.encode_normalized(batch)) - batch).square().sum(1)

    def encode_normalized(self, batch: Tensor) -> Tensor:
        """Return the codes int64 [B, levels] of standardized embeddings; deterministic."""
        raise NotImplementedError

    def decode_normalized(self, codes: Tensor) -> Tensor:
        """Reconstruct standardized embeddings float32 [B, d] from int64 [B, levels] codes."""
        raise NotImplementedError

    def last_level_costs(self, batch: Tensor) -> Tensor:
        """Return the cost of every last-level code for each item, given its earlier codes: float32 [B, K].

        Costs are squared errors, or any other values whose sum over items should be minimized.

        Args:
            batch: float32 [B, d] embeddings.
        """
        raise NotImplementedError

    def assignment_costs(self, vectors: Tensor) -> Costs:
        """Return a function: rows int64 [n] of the vectors -> costs float64 [n, K] of the last level's codes.

        Unlike `last_level_costs` of a batch, the costs of an item depend neither on the other items of the call nor on
        the processor: they are computed in double precision and rounded to 20 bits of the largest cost of the item. So
        items with equal vectors have equal costs, and are assigned in the order of their ids.

        Args:
            vectors: float32 [N, d] embeddings.
        """
        exact = copy.deepcopy(self).double()

        @torch.no_grad()
        def costs(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
            found = exact.last_level_costs(vectors[torch.from_numpy(rows)].double()).cpu().numpy()
            _, exponent = np.frexp(np.abs(found).max(axis=1, keepdims=True, initial=0))
            rounded: npt.NDArray[np.floating] = np.ldexp(np.round(np.ldexp(found, 20 - exponent)), exponent - 20)
            return rounded

        return costs

    @torch.no_grad()
    def encode(self, batch: Tensor) -> Tensor:
        """Return the codes int64 [B, levels] of float32 [B, d] embeddings."""
        return self.encode_normalized(self.standardize(batch))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Reconstruct embeddings float32 [B, d] from int64 [B, levels] codes."""
        return self.decode_normalized(codes) * self.scale + self.mean

    @torch.no_grad()
    def errors(self, batch: Tensor, codes: Tensor) -> Tensor:
        """Return the squared errors [B] of codes [B, levels] in standardized embeddings, summed over dimensions."""
        return (self.decode_normalized(codes) - self.standardize(batch)).square().sum(1)

    def latent(self, standardized: Tensor) -> Tensor:
        """Return the vector to quantize, [B, latent]: the standardized embedding unless there is an encoder."""
        return standardized

    def fit_normalizer(self, sample: Tensor) -> None:
        """Set mean and standard deviation per dimension; the scale of a constant dimension is 1."""
        spread, mean = torch.std_mean(sample, dim=0, unbiased=False)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(spread > 1e-8, spread, torch.ones_like(spread)))

    def standardize(self, batch: Tensor) -> Tensor:
        """Return embeddings [B, d] with mean 0 and standard deviation 1 per dimension."""
        return (batch - self.mean) / self.scale


def check_codebook_size(config: TokenizerConfig, n_items: int) -> None:
    """Check that the codebook is not larger than the catalog.

    Raises:
        ConfigError: it is larger; names the maximum and a suitable size.
    """
    if n_items < config.codebook_size:
        raise ConfigError(
            f"tokenizer.codebook_size = {config.codebook_size} is larger than the {n_items} items of the catalog; "
            f"use at most {n_items}; {min(n_items, suitable_codebook_size(n_items))} is suitable"
        )


def suitable_codebook_size(n_items: int) -> int:
    """Return a power of two with 16 to 32 items per code; at least 4."""
    return max(4, 1 << max(0, (n_items // 16).bit_length() - 1))


def build(config: TokenizerConfig, dim: int) -> Tokenizer:
    """Return an untrained tokenizer of the configured kind for embeddings of dimension `dim`."""
    tokenizer: Tokenizer = load_plugin(TokenizerConfig.plugin_package, config.kind).build(config, dim)
    return tokenizer
