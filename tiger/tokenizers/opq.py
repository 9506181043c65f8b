"""Optimized product quantization: a rotation, then k-means on each of `levels` subspaces of equal dimension.

Codebooks and rotation are optimized alternately (Ge et al. 2013, section 3.1, "OPQ-NP"), starting from the rotation
that balances the variance of the subspaces (section 3.2). Codes are independent per subspace, not coarse-to-fine as
residual codes are, so prefixes carry less information: VQ-Rec and RPG use it with many more levels.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from tiger.tokenizers.base import NoTrainingConfig, Tokenizer, TokenizerConfig
from tiger.tokenizers.kmeans import kmeans, lloyd, nearest_centroid


class Config(TokenizerConfig):
    """Options of optimized product quantization."""

    kind: str = Field("opq", description="quantizer: optimized product quantization")
    num_iterations: int = Field(30, ge=0, description="number of alternating updates of codebooks and rotation")
    training: NoTrainingConfig = NoTrainingConfig()


class OptimizedProductQuantizer(Tokenizer):
    """Rotation [D, D] and codebooks [L, K, D / L], with D the dimension padded to a multiple of the levels."""

    rotation: Tensor
    codebooks: Tensor

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__(config, dim)
        self.rotations, self.iterations = config.num_iterations, config.kmeans_iterations
        self.part = -(-dim // config.num_levels)  # the last subspace is padded with zeros
        self.register_buffer("rotation", torch.eye(self.part * config.num_levels))
        self.register_buffer("codebooks", torch.zeros(config.num_levels, config.codebook_size, self.part))

    @torch.no_grad()
    def initialize(self, sample: Tensor, generator: torch.Generator) -> None:
        """Fit rotation and codebooks; see `Tokenizer.initialize`."""
        points = self._padded(sample)
        self.rotation.copy_(_balanced_rotation(points, self.levels))
        for level, part in enumerate(self._parts(points)):
            self.codebooks[level] = kmeans(part, self.codebook_size, iterations=self.iterations, generator=generator)
        for _ in range(self.rotations):
            for level, part in enumerate(self._parts(points)):
                self.codebooks[level] = lloyd(part, self.codebooks[level])[0]
            codes = self._nearest(points)
            # The rotation that minimizes the distances of points to their codewords: orthogonal Procrustes.
            left, _, right = torch.linalg.svd(points.T @ self._vectors(codes))
            self.rotation.copy_(left @ right)

    @torch.no_grad()
    def encode_normalized(self, batch: Tensor) -> Tensor:
        """Return codes; see `Tokenizer.encode_normalized`."""
        return self._nearest(self._padded(batch))

    def _nearest(self, points: Tensor) -> Tensor:
        parts = self._parts(points)
        return torch.stack([nearest_centroid(p, c) for p, c in zip(parts, self.codebooks, strict=True)], dim=1)

    @torch.no_grad()
    def last_level_costs(self, batch: Tensor) -> Tensor:
        """Return squared errors in the last subspace; see `Tokenizer.last_level_costs`."""
        parts = self._parts(self._padded(self.standardize(batch)))
        return torch.cdist(parts[-1], self.codebooks[-1]).square()

    @torch.no_grad()
    def decode_normalized(self, codes: Tensor) -> Tensor:
        """Reconstruct embeddings; see `Tokenizer.decode_normalized`."""
        return (self._vectors(codes) @ self.rotation.T)[:, : self.dim]

    def _padded(self, points: Tensor) -> Tensor:
        return torch.nn.functional.pad(points, (0, len(self.rotation) - self.dim))

    def _parts(self, points: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = (points @ self.rotation).split(self.part, dim=1)
        return parts

    def _vectors(self, codes: Tensor) -> Tensor:
        return torch.cat([codebook[codes[:, level]] for level, codebook in enumerate(self.codebooks)], dim=1)


def _balanced_rotation(points: Tensor, parts: int) -> Tensor:
    """Assign principal directions to subspaces so that the products of their variances are about equal; [D, D]."""
    variances, directions = torch.linalg.eigh(points.T @ points / len(points))
    size = len(variances) // parts
    share: list[list[int]] = [[] for _ in range(parts)]
    logs = [0.0] * parts
    for index in range(len(variances) - 1, -1, -1):  # largest first, to the subspace with the smallest product so far
        open_parts = [part for part in range(parts) if len(share[part]) < size]
        part = min(open_parts, key=lambda candidate: (logs[candidate], candidate))
        share[part].append(index)
        logs[part] += float(variances[index].clamp_min(1e-12).log())
    rotation: Tensor = directions[:, [index for part in share for index in part]]
    return rotation


def build(config: Config, dim: int) -> OptimizedProductQuantizer:
    """Return an unfitted quantizer for embeddings of dimension `dim`."""
    return OptimizedProductQuantizer(config, dim)
