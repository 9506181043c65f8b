"""What residual tokenizers share: codebooks [L, K, Z] where each level quantizes what the levels before left over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tiger.kmeans import kmeans, nearest
from tiger.tokenizers import Tokenizer, TokenizerConfig


class ResidualTokenizer(Tokenizer):
    """Subclasses say what is quantized (`latent`) and how it becomes an embedding again (`from_latent`)."""

    codebooks: Tensor

    def __init__(self, config: TokenizerConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.iterations = config.kmeans_iterations

    def from_latent(self, latent: Tensor) -> Tensor:
        """Standardised embeddings [B, d] of latents [B, Z]; here they are the same."""
        return latent

    @torch.no_grad()
    def initialize(self, sample: Tensor, generator: torch.Generator) -> None:
        self.fit_statistics(sample)
        self._set_codebooks(
            sample,
            lambda residual, _: kmeans(residual, self.codebook_size, iterations=self.iterations, generator=generator),
        )

    def _set_codebooks(self, sample: Tensor, centroids: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Level by level: (what the levels before left over, the level's codebook) -> the level's new codebook."""
        was_training, _ = self.training, self.eval()
        residual = self.latent(sample)
        self.train(was_training)
        for level in range(self.levels):
            self.codebooks[level] = centroids(residual, self.codebooks[level])
            residual = residual - self.codebooks[level][nearest(residual, self.codebooks[level])[0]]

    @torch.no_grad()
    def encode(self, batch: Tensor) -> Tensor:
        residual, codes = self.latent(batch), []
        for codebook in self.codebooks:
            code, _ = nearest(residual, codebook)
            residual = residual - codebook[code]
            codes.append(code)
        return torch.stack(codes, dim=1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        vectors = [codebook[codes[:, level]] for level, codebook in enumerate(self.codebooks)]
        return self.unstandardize(self.from_latent(torch.stack(vectors).sum(0)))
