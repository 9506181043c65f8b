"""RQ-VAE: an autoencoder whose latent is quantized as a sum of one vector per codebook.

TIGER, section 3.1; Zeghidour et al. 2021 for the residual quantizer. In addition to the usual MLPs, encoder and decoder
have a linear skip connection initialized with the principal directions (or the identity without compression), and the
MLPs' last layers are initialized with zeros. So training starts from residual k-means and improves on it, which a
randomly initialized encoder does not reach. Further measures against collapse, each measured in LOG.md: standardized
inputs, k-means initialization, one Lloyd iteration per level every other epoch until the learning rate is small,
quantizing directions instead of vectors, a reconstruction loss summed over dimensions, AdamW.

Shape suffixes: B batch, D embedding, Z latent, L levels, K codes per level.
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
    """Training of the autoencoder."""

    epochs: int = Field(40, ge=0, description="maximum passes over all items")
    batch_size: int = Field(256, ge=1, description="items per step, over all workers")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay of AdamW")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up, before cosine decay to zero")
    max_grad_norm: float = Field(0.0, ge=0, description="maximum gradient norm; 0: no clipping")
    validate_every_epochs: float = Field(10.0, gt=0, description="epochs between validations of utilization and error")
    patience: int = Field(10, ge=1, description="validations without improvement before training stops early")


class Config(ResidualConfig):
    """Architecture, loss and training of the autoencoder."""

    kind: str = Field("rqvae", description="quantizer: residual-quantized autoencoder")
    hidden_dims: tuple[int, ...] = Field(
        (512, 256, 128), description="widths of the encoder's layers; the decoder mirrors them"
    )
    latent_dim: int = Field(0, ge=0, description="dimension of the quantized vector; 0: that of the embeddings")
    linear_skip: bool = Field(True, description="linear skip connection, initialized with principal directions")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after every hidden layer")
    commitment_weight: float = Field(0.25, ge=0, description="weight of the commitment loss (beta)")
    codebook_update: Literal["lloyd", "ema", "gradient"] = Field(
        "lloyd", description="lloyd: gradients and periodic k-means iterations; ema: moving averages; gradients only"
    )
    codebook_update_every: int = Field(
        2, ge=1, description="epochs between k-means iterations, or resets of dead codes"
    )
    codebook_update_until: float = Field(0.6, ge=0, le=1, description="fraction of the epochs after which these stop")
    ema_decay: float = Field(0.99, gt=0, lt=1, description="decay of the moving averages, per step")
    reset_dead_codes: bool = Field(True, description="re-initialize unused codes at poorly reconstructed items")
    gradient_estimator: Literal["straight-through", "rotation"] = Field(
        "straight-through", description="gradient estimator of the quantization"
    )
    reconstruction_reduction: Literal["sum", "mean"] = Field(
        "sum", description="reduction of the squared error over dimensions"
    )
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
    """Encoder or decoder: an MLP with an optional linear skip connection."""

    def __init__(self, widths: list[int], dropout: float, linear_skip: bool) -> None:
        super().__init__()
        self.layers = _mlp(widths, dropout, linear_skip)
        self.linear = nn.Linear(widths[0], widths[-1]) if linear_skip else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the MLP and the skip connection for x [B, widths[0]]: [B, widths[-1]]."""
        y: Tensor = self.layers(x)
        return y if self.linear is None else y + self.linear(x)


class RQVAE(ResidualTokenizer):
    """Encoder, residual quantizer with learned codebooks, decoder."""

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
        """Set the skip connections to the principal directions, and the codebooks by residual k-means."""
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
        """Initialize the moving averages as if every code had been assigned one point per step, equal to itself."""
        self.ema_counts.fill_(1.0)
        self.ema_sums.copy_(self.codebooks)

    @torch.no_grad()
    def refresh(self, sample: Tensor) -> None:
        """Run one Lloyd iteration per level on the residuals of the sample; with `ema` or `gradient` reset dead codes.

        The encoder drifts faster than codebook gradients follow: without this, 7 of 8 codes of the first level were
        dead after 10 epochs on Beauty.
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
        """Encode standardized embeddings [B, D] to latents [B, Z]."""
        latent: Tensor = self.encoder(standardized)
        return latent

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Decode latents [B, Z] to standardized embeddings [B, D]."""
        embedding: Tensor = self.decoder(latent)
        return embedding

    def forward(self, batch: Tensor) -> Tensor:
        """Return the loss [B] of standardized embeddings [B, D]: quantization loss plus reconstruction error."""
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
        loss_B: Tensor = quantization_B + (
            error_B if self.config.reconstruction_reduction == "sum" else error_B / self.dim
        )
        return loss_B

    @torch.no_grad()
    def _ema_update(self, levels: list[Level]) -> None:
        """Update the moving averages of each code's points over all workers' batches (van den Oord et al. 2017)."""
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
    """Return `count` orthonormal columns [d, count] of largest variance, zeros beyond d; the identity if it is d."""
    dim = points.shape[1]
    if count == dim:
        return torch.eye(dim, device=points.device)
    _, directions = torch.linalg.eigh(points.T @ points / len(points))
    return F.pad(directions.flip(1)[:, :count], (0, max(0, count - dim)))


def build(config: Config, dim: int) -> RQVAE:
    """Return an untrained RQ-VAE for embeddings of dimension `dim`."""
    return RQVAE(config, dim)
