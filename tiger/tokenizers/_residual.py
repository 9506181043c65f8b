"""What residual tokenizers share: codebooks [L, K, Z] where each level quantizes what the levels before left over.

What is left over differs in length from cluster to cluster: where items lie close together it is short, and plain
residual quantization gives all of them the one code near zero. So by default the levels after the first compare
directions, and the length comes back as the mean that the code before has seen: level 2 of Beauty then uses codes as
if it had 220 of 256, and not 83, at a lower reconstruction error (LOG.md).
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
    """Knobs of residual quantization."""

    distance: Literal["euclidean", "mixed", "cosine"] = Field(
        "cosine", description="what is compared: vectors, vectors and then directions of the rest, or directions alone"
    )
    sinkhorn_last_level: bool = Field(
        False, description="Sinkhorn prices make the codes of the last level equally used"
    )


@dataclass(frozen=True)
class Level:
    """One level of a quantization.

    Attributes:
        rest: [B, Z] what the levels before left over, divided by `length`.
        point: [B, Z] what was compared with the codebook: the rest or its direction.
        size: [B, 1] by which the rest was divided for it.
        code: int64 [B].
        chosen: [B, Z] codebook vectors.
        length: [B, 1] by which `chosen` is multiplied in the sum over levels.
    """

    rest: Tensor
    point: Tensor
    size: Tensor
    code: Tensor
    chosen: Tensor
    length: Tensor


class ResidualTokenizer(Tokenizer):
    """Subclasses say what is quantized (`latent`) and how it becomes an embedding again (`decode_latent`).

    A latent is quantized as the sum over levels of length x codebook[code], with length 1 at the first level and at
    every further one the product of lengths[level, code of the level before].
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
        """Standardized embeddings [B, d] of latents [B, Z]; here they are the same."""
        return latent

    @torch.no_grad()
    def initialize(self, sample: Tensor, generator: torch.Generator) -> None:
        self.refit(
            sample,
            lambda points, _: (
                kmeans(points, self.codebook_size, iterations=self.iterations, generator=generator),
                None,
            ),
        )

    @torch.no_grad()
    def refit(self, sample: Tensor, centroids: Refit) -> None:
        """Level by level: (points that the level compares, its codebook) -> its new codebook; then its lengths.

        Args:
            sample: float32 [N, d] standardized embeddings.
            centroids: returns the codes of the points, too, where it knows them: k-means does, from before the
                centroids moved, and asking again would take as long as the iteration itself.
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
        """What a level compares, and by what the rest was divided for it."""
        if self.distance == "cosine" or (self.distance == "mixed" and level):
            size = rest.norm(dim=1, keepdim=True).clamp_min(1e-12)
            return rest / size, size
        return rest, rest.new_ones(len(rest), 1)

    @torch.no_grad()
    def quantize(self, latent: Tensor) -> Iterator[Level]:
        """The levels of latents [B, Z], one after the other."""
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
        return torch.stack([level.code for level in self.quantize(self.latent(batch))], dim=1)

    @torch.no_grad()
    def last_level_costs(self, batch: Tensor) -> Tensor:
        latent = self.latent(self.standardize(batch))
        *_, last = self.quantize(latent)
        return torch.cdist(last.rest, self.codebooks[-1]).square() * last.length.square()

    @torch.no_grad()
    def decode_normalized(self, codes: Tensor) -> Tensor:
        length = self.lengths[0, :1].expand(len(codes))
        total = torch.zeros_like(self.codebooks[0, codes[:, 0]])
        for level, codebook in enumerate(self.codebooks):
            total = total + length[:, None] * codebook[codes[:, level]]
            if level + 1 < self.levels:
                length = length * self.lengths[level + 1, codes[:, level]]
        return self.decode_latent(total)


class QuantizeWithCommitment(torch.autograd.Function):
    """(latents, codebooks, levels, beta) -> the loss that draws both to each other [B], the quantized latents [B, Z].

    The loss is the sum over levels of length^2 x (|sg[point] - code|^2 + beta |point - sg[code]|^2), sg stopping the
    gradient, and lengths, sizes and what lower levels chose being constant (TIGER, section 3.1). What arrives at the
    quantized latents goes on to the latents as it is (straight-through). The gradients are written out: autograd's many
    small steps took a fifth of the training time.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, codebooks: Tensor, levels: list[Level], beta: float) -> tuple[Tensor, Tensor]:
        """
        Args:
            latent: [B, Z].
            codebooks: [L, K, Z].
            levels: the quantization of `latent` by them.
        """
        loss, to_latent, quantized = latent.new_zeros(len(latent)), torch.zeros_like(latent), torch.zeros_like(latent)
        saved = []
        for level in levels:
            off = level.point - level.chosen
            loss += (1 + beta) * (level.length.squeeze(1) * off.norm(dim=1)).square()
            to_latent.addcmul_(off, level.length / level.size, value=2 * beta)
            quantized.addcmul_(level.length, level.chosen)
            saved += [off, level.length, level.code]
        ctx.save_for_backward(to_latent, *saved)
        ctx.codes = codebooks.shape[1]
        return loss, quantized

    @staticmethod
    def backward(ctx: Any, loss: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        to_latent, *saved = ctx.saved_tensors
        to_codebooks = None
        if ctx.needs_input_grad[1]:
            levels = zip(saved[::3], saved[1::3], saved[2::3], strict=True)
            to_codebooks = torch.stack(
                [
                    row_sums(off * (-2 * loss[:, None] * length.square()), code, ctx.codes)
                    for off, length, code in levels
                ]
            )
        return torch.addcmul(quantized, loss[:, None], to_latent), to_codebooks, None, None


def rotation_trick(latent: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, with the gradient that a rotation and stretch of the latent onto it gives (Fifty et al. 2024)."""
    start, end = F.normalize(latent, dim=1).detach(), F.normalize(quantized, dim=1).detach()
    middle = F.normalize(start + end, dim=1)
    stretch = (quantized.norm(dim=1, keepdim=True) / latent.norm(dim=1, keepdim=True).clamp_min(1e-12)).detach()
    along = (latent * middle).sum(1, keepdim=True), (latent * start).sum(1, keepdim=True)
    return stretch * (latent - 2 * along[0] * middle + 2 * along[1] * end)
