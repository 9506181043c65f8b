"""RQ-VAE: an autoencoder whose latent is a sum of one vector from each of several codebooks (TIGER, section 3.1;
Zeghidour et al. 2021 for the residual quantizer).

Beside the usual perceptrons, encoder and decoder have a linear path that starts as the principal directions (as the
identity where nothing is compressed), with the perceptrons starting at zero. So training starts where residual k-means
ends, and every step improves on it; a random encoder never comes back to it. What else keeps it from collapsing, each
measured in LOG.md: standardized inputs, a k-means start, one Lloyd iteration per level every other epoch until the
learning rate is small, directions instead of vectors at the later levels, a reconstruction loss summed over
dimensions, AdamW.

Names of shapes: B batch, D embedding, Z latent, L levels, K codes of a level.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tiger.tokenizers._residual import Level, QuantizeWithCommitment, ResidualConfig, ResidualTokenizer, rotation_trick
from tiger.tokenizers.kmeans import cluster_sums, lloyd, nearest, revive
from tiger.training.loop import TrainingConfig, all_reduce_sum


class RQVAETraining(TrainingConfig):
    """How the autoencoder is trained."""

    epochs: int = Field(40, ge=0, description="passes over all items, at most")
    batch_size: int = Field(256, ge=1, description="items per step, over all workers")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's peak learning rate")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's weight decay")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up, before a cosine to zero")
    max_grad_norm: float = Field(0.0, ge=0, description="gradients are scaled down to this norm; 0: never")
    validate_every_epochs: float = Field(10.0, gt=0, description="epochs between two looks at usage and reconstruction")
    patience: int = Field(10, ge=1, description="looks without a better reconstruction before training stops")


class Config(ResidualConfig):
    """Shape of the autoencoder, its loss, and its training."""

    kind: str = Field("rqvae", description="quantizer: residual-quantized autoencoder")
    hidden_dims: tuple[int, ...] = Field(
        (512, 256, 128), description="widths of the encoder's layers; the decoder mirrors them"
    )
    latent_dim: int = Field(0, ge=0, description="dimension of the quantized vector; 0: that of the embeddings")
    linear_skip: bool = Field(True, description="a linear path beside the layers, started as principal directions")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after every hidden layer")
    commitment_weight: float = Field(
        0.25, ge=0, description="weight of the loss that draws the latent to its codes (beta)"
    )
    codebook_update: Literal["lloyd", "ema", "gradient"] = Field(
        "lloyd", description="gradients and now and then a k-means iteration; moving averages; gradients alone"
    )
    codebook_update_every: int = Field(
        2, ge=1, description="epochs between two k-means iterations, or resets of dead codes"
    )
    codebook_update_until: float = Field(0.6, ge=0, le=1, description="share of the epochs after which that ends")
    ema_decay: float = Field(0.99, gt=0, lt=1, description="of the moving averages, per step")
    reset_dead_codes: bool = Field(True, description="codes that no item has move to badly represented items")
    gradient_estimator: Literal["straight-through", "rotation"] = Field(
        "straight-through", description="how the gradient passes the quantization"
    )
    reconstruction_reduction: Literal["sum", "mean"] = Field("sum", description="the squared error, over dimensions")
    training: RQVAETraining = RQVAETraining()


def _mlp(widths: list[int], dropout: float, last_is_zero: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")  # He et al. 2015
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if index < len(widths) - 2:
            layers += [nn.ReLU(), nn.Dropout(dropout)]
        elif last_is_zero:
            nn.init.zeros_(linear.weight)
    return nn.Sequential(*layers)


class _MLPWithSkip(nn.Module):
    """Encoder or decoder: layers, and a linear path beside them."""

    def __init__(self, widths: list[int], dropout: float, linear_skip: bool) -> None:
        super().__init__()
        self.layers = _mlp(widths, dropout, linear_skip)
        self.linear = nn.Linear(widths[0], widths[-1]) if linear_skip else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y if self.linear is None else y + self.linear(x)


class RQVAE(ResidualTokenizer):
    ema_sums: Tensor
    ema_counts: Tensor

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__(config, dim)
        latent = config.latent_dim or dim
        widths = [dim, *config.hidden_dims, latent]
        self.encoder = _MLPWithSkip(widths, config.dropout, config.linear_skip)
        self.decoder = _MLPWithSkip(widths[::-1], config.dropout, config.linear_skip)
        self.codebooks = nn.Parameter(torch.zeros(config.num_levels, config.codebook_size, latent))
        self.config, self.codebook_update_every, self.codebook_update_until = (
            config,
            config.codebook_update_every,
            config.codebook_update_until,
        )
        if config.codebook_update == "ema":
            self.codebooks.requires_grad_(False)
            self.register_buffer("ema_sums", torch.zeros_like(self.codebooks))
            self.register_buffer("ema_counts", torch.zeros(config.num_levels, config.codebook_size))

    @torch.no_grad()
    def initialize(self, sample: Tensor, generator: torch.Generator) -> None:
        if self.encoder.linear is not None and self.decoder.linear is not None:
            directions = _principal_directions(sample, self.codebooks.shape[2])
            self.encoder.linear.weight.copy_(directions.T)
            self.decoder.linear.weight.copy_(directions)
            for linear in (self.encoder.linear, self.decoder.linear):
                nn.init.zeros_(linear.bias)
        super().initialize(sample, generator)
        if self.config.codebook_update == "ema":
            self._reset_ema()

    def _reset_ema(self) -> None:
        """The averages start as if every code had been chosen once a step, where it stands."""
        self.ema_counts.fill_(1.0)
        self.ema_sums.copy_(self.codebooks)

    @torch.no_grad()
    def refresh(self, sample: Tensor) -> None:
        """Lloyd: one iteration per level on the rests of the encoded vectors; otherwise, dead codes get an item again.

        The encoder moves faster than gradients can pull the codes after it: without this, seven of eight codes of the
        first level were dead after ten epochs on Beauty.
        """
        if self.config.codebook_update == "lloyd":
            self.refit(sample, lloyd)
        else:
            before = self.codebooks.clone()
            self.refit(
                sample, _reset_dead_codes if self.config.reset_dead_codes else lambda points, codebook: (codebook, None)
            )
            if self.config.codebook_update == "ema":
                moved = (self.codebooks != before).any(dim=2)
                self.ema_counts[moved] = 1.0
                self.ema_sums[moved] = self.codebooks[moved]

    def latent(self, standardized: Tensor) -> Tensor:
        latent: Tensor = self.encoder(standardized)
        return latent

    def decode_latent(self, latent: Tensor) -> Tensor:
        embedding: Tensor = self.decoder(latent)
        return embedding

    def forward(self, batch: Tensor) -> Tensor:
        latent_BZ = self.encoder(batch)
        levels = list(self.quantize(latent_BZ))
        quantization_B, passed_BZ = QuantizeWithCommitment.apply(
            latent_BZ, self.codebooks, levels, self.config.commitment_weight
        )
        if self.config.gradient_estimator == "rotation":
            passed_BZ = rotation_trick(latent_BZ, passed_BZ.detach())
        error_B = F.mse_loss(self.decoder(passed_BZ), batch, reduction="none").sum(1)
        if self.training and self.config.codebook_update == "ema":
            self._ema_update(levels)
        return quantization_B + (error_B if self.config.reconstruction_reduction == "sum" else error_B / self.dim)

    @torch.no_grad()
    def _ema_update(self, levels: list[Level]) -> None:
        """Moving averages of the points of each code, over the batches of all workers (van den Oord et al. 2017)."""
        decay = self.config.ema_decay
        for index, level in enumerate(levels):
            sums, counts = cluster_sums(level.point, level.code, self.codebook_size)
            self.ema_sums[index].mul_(decay).add_(all_reduce_sum(sums), alpha=1 - decay)
            self.ema_counts[index].mul_(decay).add_(all_reduce_sum(counts), alpha=1 - decay)
        self.codebooks.copy_(self.ema_sums / self.ema_counts.clamp_min(1e-6)[:, :, None])


def _reset_dead_codes(points: Tensor, codebook: Tensor) -> tuple[Tensor, None]:
    code, distance = nearest(points, codebook)
    return revive(codebook, torch.bincount(code, minlength=len(codebook)), points, distance), None


def _principal_directions(points: Tensor, count: int) -> Tensor:
    """Orthonormal columns [d, count] of greatest variance, zeros beyond d; the identity where count is d."""
    dim = points.shape[1]
    if count == dim:
        return torch.eye(dim, device=points.device)
    _, directions = torch.linalg.eigh(points.T @ points / len(points))
    return F.pad(directions.flip(1)[:, :count], (0, max(0, count - dim)))


def build(config: Config, dim: int) -> RQVAE:
    return RQVAE(config, dim)
