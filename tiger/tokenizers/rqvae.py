"""RQ-VAE: an autoencoder whose latent is a sum of one vector from each of several codebooks (TIGER, section 3.1;
Zeghidour et al. 2021 for the residual quantizer).

What keeps it from collapsing, each measured in LOG.md: standardised inputs, k-means codebooks on the residuals of
*encoded* vectors at the start and one Lloyd iteration of it before every epoch, a shallow encoder with He-uniform
weights, a reconstruction loss summed over dimensions, AdamW.

Names of shapes: B batch, D embedding, Z latent, L levels, K codes of a level.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from pydantic import Field
from torch import Tensor, nn

from tiger.kmeans import lloyd, nearest
from tiger.tokenizers import TokenizerConfig
from tiger.tokenizers._residual import ResidualTokenizer
from tiger.training import TrainingConfig


class RQVAETraining(TrainingConfig):
    """How the autoencoder is trained."""

    epochs: int = Field(100, ge=0, description="passes over all items, at most")
    batch_size: int = Field(256, ge=1, description="items per step, over all workers")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's peak learning rate")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's weight decay")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up, before a cosine to zero")
    validate_every: float = Field(10.0, gt=0, description="epochs between two looks at usage and reconstruction")
    patience: int = Field(10, ge=1, description="looks without a better reconstruction before training stops")


class Config(TokenizerConfig):
    """Shape of the autoencoder, its loss, and its training."""

    kind: str = Field("rqvae", description="quantizer: residual-quantized autoencoder")
    hidden: tuple[int, ...] = Field((256, 128), description="widths of the encoder's layers; the decoder mirrors them")
    latent: int = Field(64, ge=2, description="dimension of the quantized vector")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout after every hidden layer")
    commitment: float = Field(0.25, ge=0, description="weight of the loss that draws the latent to its codes (beta)")
    lloyd: bool = Field(True, description="refit the codebooks by one k-means iteration before every epoch")
    training: RQVAETraining = RQVAETraining()


def _mlp(widths: list[int], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")  # He et al. 2015
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if index < len(widths) - 2:
            layers += [nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class RQVAE(ResidualTokenizer):
    def __init__(self, config: Config, dim: int) -> None:
        super().__init__(config, dim)
        widths = [dim, *config.hidden, config.latent]
        self.encoder = _mlp(widths, config.dropout)
        self.decoder = _mlp(widths[::-1], config.dropout)
        self.codebooks = nn.Parameter(torch.zeros(config.levels, config.codebook_size, config.latent))
        self.commitment, self.lloyd = config.commitment, config.lloyd

    @torch.no_grad()
    def refresh(self, sample: Tensor) -> None:
        """One Lloyd iteration per level on the residuals of the encoded vectors; a dead code gets an item again.

        The encoder moves faster than gradients can pull the codes after it: without this, seven of eight codes of the
        first level were dead after ten epochs on Beauty.
        """
        if self.lloyd:
            self._set_codebooks(sample, lambda residual, codebook: lloyd(residual, codebook)[0])

    def latent(self, batch: Tensor) -> Tensor:
        return self.encoder(self.standardize(batch))

    def from_latent(self, latent: Tensor) -> Tensor:
        return self.decoder(latent)

    def forward(self, batch: Tensor) -> Tensor:
        target_BD = self.standardize(batch)
        latent_BZ = self.encoder(target_BD)
        residual_BZ, quantized_BZ = latent_BZ, torch.zeros_like(latent_BZ)
        loss_B = torch.zeros_like(latent_BZ[:, 0])
        for codebook_KZ in self.codebooks:
            code_B, _ = nearest(residual_BZ.detach(), codebook_KZ.detach())
            chosen_BZ = codebook_KZ[code_B]
            # The codebook moves to the latent, and, beta times as strongly, the latent to the codebook.
            loss_B = loss_B + (residual_BZ.detach() - chosen_BZ).square().sum(1)
            loss_B = loss_B + self.commitment * (residual_BZ - chosen_BZ.detach()).square().sum(1)
            quantized_BZ = quantized_BZ + chosen_BZ
            residual_BZ = residual_BZ - chosen_BZ.detach()
        straight_through_BZ = latent_BZ + (quantized_BZ - latent_BZ).detach()
        reconstruction_BD = self.decoder(straight_through_BZ)
        return loss_B + (reconstruction_BD - target_BD).square().sum(1)


def build(config: Config, dim: int) -> RQVAE:
    return RQVAE(config, dim)
