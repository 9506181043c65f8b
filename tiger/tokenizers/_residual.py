"""Code shared by residual tokenizers: codebooks [L, K, Z] in which each level quantizes the residual of earlier levels.

Residual norms vary by cluster: in dense clusters residuals are small, and plain residual quantization assigns all of
them the one code near zero. So by default all levels quantize directions, and the norm of the residual is restored by a
scale per code, the mean norm of the residuals of that code: the perplexity of level 2 on Beauty is then 220 of 256
codes, not 83, at a lower reconstruction error (LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tiger.tokenizers.base import Tokenizer, TokenizerConfig
from tiger.tokenizers.kmeans import cluster_sums, kmeans, lloyd, nearest_centroid, row_sums, sinkhorn_potentials

Refit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


class ResidualConfig(TokenizerConfig):
    """Options of residual quantization."""

    distance: Literal["euclidean", "mixed", "cosine"] = Field(
        "cosine",
        description="what is compared with the codebooks: vectors, vectors and then directions of the residuals, or "
        "directions only",
    )
    sinkhorn_last_level: bool = Field(False, description="equalize the cluster sizes of the last level with Sinkhorn")


@dataclass(frozen=True)
class Level:
    """One level of a quantization.

    Attributes:
        rest: [B, Z], residual of the earlier levels, divided by `length`.
        point: [B, Z], query that is compared with the codebook: the residual or its direction.
        size: [B, 1], norm by which the residual was divided for it; 1 if the residual is the query.
        code: int64 [B].
        chosen: [B, Z], codewords.
        length: [B, 1], scale of `chosen` in the sum over levels.
    """

    rest: Tensor
    point: Tensor
    size: Tensor
    code: Tensor
    chosen: Tensor
    length: Tensor


class ResidualTokenizer(Tokenizer):
    """Base of residual tokenizers; subclasses define the latent (`latent`) and its decoder (`decode_latent`).

    A latent is quantized as the sum over levels of length x codebook[code]. The length at a level is the product of
    lengths[l, code of level l - 1] over all levels l up to it; lengths[0] is one value for all codes.
    """

    codebooks: Tensor
    lengths: Tensor
    prices: Tensor

    def __init__(self, config: ResidualConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.iterations, self.distance, self.balanced = (
            config.kmeans_iterations,
            config.distance,
            config.sinkhorn_last_level,
        )
        self.register_buffer("lengths", torch.ones(config.num_levels, config.codebook_size))
        self.register_buffer("prices", torch.zeros(config.codebook_size))

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Return the standardized embeddings [B, d] of latents [B, Z]; the identity unless there is a decoder."""
        return latent

    @torch.no_grad()
    def initialize(self, sample: Tensor, generator: torch.Generator) -> None:
        """Fit the codebooks by residual k-means; see `Tokenizer.initialize`."""
        self.refit(
            sample,
            lambda points, _: (
                kmeans(points, self.codebook_size, iterations=self.iterations, generator=generator),
                None,
            ),
        )

    @torch.no_grad()
    def refit(self, sample: Tensor, centroids: Refit) -> None:
        """Update the codebooks and lengths in place, level by level.

        Args:
            sample: float32 [N, d] standardized embeddings.
            centroids: (points that the level compares, its codebook) -> (its new codebook, codes of the points or
                None). Returning the codes, even those of before the update, saves computing them again.
        """
        was_training, _ = self.training, self.eval()
        rest = self.latent(sample)
        self.train(was_training)
        if self.distance == "cosine":
            self.lengths[0] = rest.norm(dim=1).mean().clamp_min(1e-6)
        rest = rest / self.lengths[0, 0]
        for level in range(self.levels):
            points, _ = self._compared(rest, level)
            self.codebooks[level], known = centroids(points, self.codebooks[level])
            if self.balanced and level == self.levels - 1:
                self._balance(points)
                known = None
            code = nearest_centroid(points, self.codebooks[level], self._prices(level)) if known is None else known
            rest = rest - self.codebooks[level][code]
            if level + 1 < self.levels:
                if self.distance != "euclidean":
                    sums, counts = cluster_sums(rest.norm(dim=1, keepdim=True), code, self.codebook_size)
                    self.lengths[level + 1] = (sums.squeeze(1) / counts.clamp_min(1)).clamp_min(1e-6)
                rest = rest / self.lengths[level + 1, code][:, None]

    def _balance(self, points: Tensor) -> None:
        for _ in range(5):
            prices = sinkhorn_potentials(points, self.codebooks[-1])
            self.codebooks[-1] = lloyd(points, self.codebooks[-1], prices)[0]
        self.prices.copy_(sinkhorn_potentials(points, self.codebooks[-1]))

    def _prices(self, level: int) -> Tensor | None:
        return self.prices if self.balanced and level == self.levels - 1 else None

    def _compared(self, rest: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Return the queries of a level, and the norms [B, 1] by which the residuals were divided for them."""
        if self.distance == "cosine" or (self.distance == "mixed" and level):
            size = rest.norm(dim=1, keepdim=True).clamp_min(1e-12)
            return rest / size, size
        return rest, rest.new_ones(len(rest), 1)

    @torch.no_grad()
    def quantize(self, latent: Tensor) -> Iterator[Level]:
        """Yield the levels of the quantization of latents [B, Z], first to last."""
        rest, length = latent, latent.new_ones(len(latent), 1)
        code, chosen = torch.zeros(len(latent), dtype=torch.int64, device=latent.device), None
        for level, codebook in enumerate(self.codebooks):
            relative = self.lengths[level, code][:, None]
            rest = (rest if chosen is None else rest - chosen) / relative
            length = length * relative
            point, size = self._compared(rest, level)
            code = nearest_centroid(point, codebook, self._prices(level))
            chosen = codebook[code]
            yield Level(rest, point, size, code, chosen, length)

    @torch.no_grad()
    def encode_normalized(self, batch: Tensor) -> Tensor:
        """Return codes; see `Tokenizer.encode_normalized`."""
        return torch.stack([level.code for level in self.quantize(self.latent(batch))], dim=1)

    @torch.no_grad()
    def last_level_costs(self, batch: Tensor) -> Tensor:
        """Return squared errors of the latents; see `Tokenizer.last_level_costs`."""
        latent = self.latent(self.standardize(batch))
        *_, last = self.quantize(latent)
        return torch.cdist(last.rest, self.codebooks[-1]).square() * last.length.square()

    @torch.no_grad()
    def decode_normalized(self, codes: Tensor) -> Tensor:
        """Reconstruct embeddings; see `Tokenizer.decode_normalized`."""
        length = self.lengths[0, :1].expand(len(codes))
        total = torch.zeros_like(self.codebooks[0, codes[:, 0]])
        for level, codebook in enumerate(self.codebooks):
            total = total + length[:, None] * codebook[codes[:, level]]
            if level + 1 < self.levels:
                length = length * self.lengths[level + 1, codes[:, level]]
        return self.decode_latent(total)


class QuantizeWithCommitment(torch.autograd.Function):
    """(latents, codebooks, levels, beta) -> codebook and commitment loss [B], quantized latents [B, Z].

    The loss is the sum over levels of length^2 x (|sg[point] - code|^2 + beta |point - sg[code]|^2), where sg is
    stop-gradient, and lengths, sizes and the codes of other levels are constant (TIGER, section 3.1). The gradient of
    the quantized latents is passed to the latents unchanged (straight-through estimator). The backward pass is written
    out: with autograd its many small operations took 20% of the training time.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, codebooks: Tensor, levels: list[Level], beta: float) -> tuple[Tensor, Tensor]:
        """Return the loss [B] and the quantized latents [B, Z].

        Args:
            ctx: context of autograd.
            latent: [B, Z].
            codebooks: [L, K, Z].
            levels: the quantization of `latent` by them.
            beta: weight of the commitment loss.
        """
        loss, to_latent, quantized = latent.new_zeros(len(latent)), torch.zeros_like(latent), torch.zeros_like(latent)
        saved = []
        for level in levels:
            error = level.point - level.chosen
            loss += (1 + beta) * (level.length.squeeze(1) * error.norm(dim=1)).square()
            to_latent.addcmul_(error, level.length / level.size, value=2 * beta)
            quantized.addcmul_(level.length, level.chosen)
            saved += [error, level.length, level.code]
        ctx.save_for_backward(to_latent, *saved)
        ctx.codes = codebooks.shape[1]
        return loss, quantized

    @staticmethod
    def backward(ctx: Any, loss: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Return the gradients of latents and codebooks, given those of the loss [B] and the quantized latents."""
        to_latent, *saved = ctx.saved_tensors
        to_codebooks = None
        if ctx.needs_input_grad[1]:
            levels = zip(saved[::3], saved[1::3], saved[2::3], strict=True)
            to_codebooks = torch.stack(
                [
                    row_sums(error * (-2 * loss[:, None] * length.square()), code, ctx.codes)
                    for error, length, code in levels
                ]
            )
        return torch.addcmul(quantized, loss[:, None], to_latent), to_codebooks, None, None


def rotation_trick(latent: Tensor, quantized: Tensor) -> Tensor:
    """Return `quantized` with the gradient of the rotation trick (Fifty et al. 2024): the latent rotated and scaled."""
    start, end = F.normalize(latent, dim=1).detach(), F.normalize(quantized, dim=1).detach()
    middle = F.normalize(start + end, dim=1)
    stretch = (quantized.norm(dim=1, keepdim=True) / latent.norm(dim=1, keepdim=True).clamp_min(1e-12)).detach()
    along = (latent * middle).sum(1, keepdim=True), (latent * start).sum(1, keepdim=True)
    rotated: Tensor = stretch * (latent - 2 * along[0] * middle + 2 * along[1] * end)
    return rotated
