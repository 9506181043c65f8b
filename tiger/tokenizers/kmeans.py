"""k-means with matrix products, without an [N, K, d] tensor (which is 140 times slower at 256 centroids)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 8_192  # rows at a time: 8 MB of distances at 256 centroids, which fit the CPU cache


def nearest(points: Tensor, centroids: Tensor, prices: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the index of the nearest centroid (the lowest index on ties) and the squared distance to it.

    Args:
        points: [N, d].
        centroids: [K, d].
        prices: potentials [K], added to the squared distances: see `sinkhorn_potentials`.

    Returns:
        int64 [N], and float [N]: squared distance plus potential, clamped to at least 0.
    """
    found = [scores.min(dim=1) for scores in _scores(points, centroids, prices)]
    index = torch.cat([chunk.indices for chunk in found])
    return index, (torch.cat([chunk.values for chunk in found]) + points.square().sum(1)).clamp_min(0)


def nearest_centroid(points: Tensor, centroids: Tensor, prices: Tensor | None = None) -> Tensor:
    """Return only the index of the nearest centroid, int64 [N]; see `nearest`."""
    return torch.cat([scores.argmin(dim=1) for scores in _scores(points, centroids, prices)])


def _scores(points: Tensor, centroids: Tensor, prices: Tensor | None) -> Iterator[Tensor]:
    """Yield |c|^2 - 2 x.c plus potentials, [rows, K], per chunk of points: squared distances without |x|^2."""
    norms = centroids.square().sum(1)
    if prices is not None:
        norms = norms + prices
    for chunk in points.split(_CHUNK):
        yield torch.addmm(norms, chunk, centroids.T, alpha=-2)


def kmeans(points: Tensor, k: int, *, iterations: int, generator: torch.Generator) -> Tensor:
    """Run Lloyd's algorithm with k-means++ initialization (Arthur and Vassilvitskii, 2007) until convergence.

    Args:
        points: float32 [N, d], N >= 1; with N < k some centroids are duplicates.
        k: number of centroids.
        iterations: maximum number of iterations.
        generator: a CPU generator; the result is deterministic given it and the points.

    Returns:
        float32 [k, d].
    """
    centroids = _plus_plus(points, k, generator)
    previous = None
    for _ in range(iterations):
        centroids, index = lloyd(points, centroids)
        if previous is not None and torch.equal(index, previous):
            break
        previous = index
    return centroids


def lloyd(points: Tensor, centroids: Tensor, prices: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run one iteration: centroids move to the mean of their points, empty clusters to the farthest points.

    Returns:
        The new centroids [k, d], and the points' indices into the old ones, int64 [N].
    """
    index, distance = nearest(points, centroids, prices)
    sums, counts = cluster_sums(points, index, len(centroids))
    moved = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centroids)
    return revive(moved, counts, points, distance), index


def revive(centroids: Tensor, counts: Tensor, points: Tensor, distance: Tensor) -> Tensor:
    """Return centroids in which those of empty clusters are replaced by the points farthest from their centroids.

    Args:
        centroids: [k, d].
        counts: [k], number of points per cluster.
        points: [N, d].
        distance: [N], squared distance of each point to its centroid.
    """
    dead = (counts == 0).nonzero().squeeze(1)[: len(points)]
    if len(dead):
        centroids = centroids.clone()
        centroids[dead] = points[distance.argsort(descending=True, stable=True)[: len(dead)]]
    return centroids


def sinkhorn_potentials(points: Tensor, centroids: Tensor, *, softness: float = 0.1, iterations: int = 50) -> Tensor:
    """Return potentials [k] that equalize cluster sizes: the dual of balanced optimal transport.

    Sinkhorn's algorithm (Cuturi 2013) on squared distances. Stored with the centroids, the potentials let every point
    be assigned independently, while a transport plan would be valid for these points only.

    Args:
        points: float32 [N, d]; distances take N x k floats.
        centroids: float32 [k, d].
        softness: regularization relative to the mean squared distance to the nearest centroid.
        iterations: number of Sinkhorn iterations.
    """
    cost = points.square().sum(1, keepdim=True) - 2 * points @ centroids.T + centroids.square().sum(1)
    epsilon = float(softness * cost.min(dim=1).values.clamp_min(0).mean())
    prices = points.new_zeros(len(centroids))
    if epsilon == 0:
        return prices
    share = math.log(len(points) / len(centroids))
    for _ in range(iterations):
        of_points = -torch.logsumexp((-prices - cost) / epsilon, dim=1, keepdim=True)
        prices = epsilon * (torch.logsumexp(of_points - cost / epsilon, dim=0) - share)
        prices = prices - prices.mean()
    return prices


def cluster_sums(points: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return sums [k, d] and numbers [k] of the points of each cluster; deterministic on any device."""
    # Counted as integers, which is exact in any order; `bincount` would synchronize with a GPU.
    counts = index.new_zeros(k).index_add_(0, index, torch.ones_like(index))
    return row_sums(points, index, k), counts.to(points.dtype)


def row_sums(points: Tensor, index: Tensor, k: int) -> Tensor:
    """Return the sums [k, d] of the points of each cluster; deterministic on any device.

    On a CPU, `index_add_` sums in the order of the points, with any number of threads, and is 30 times as fast as a
    product with one-hot vectors; on a GPU its order is not deterministic, so the product is used.
    """
    sums = points.new_zeros(k, points.shape[1])
    if points.device.type == "cpu":
        return sums.index_add_(0, index, points)
    for chunk, chosen in zip(points.split(_CHUNK), index.split(_CHUNK), strict=True):
        sums += torch.nn.functional.one_hot(chosen, k).to(points.dtype).T @ chunk
    return sums


def _plus_plus(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    uniforms = torch.rand(k, generator=generator, dtype=torch.float64)
    chosen = [int(uniforms[0] * len(points))]
    _, distance = nearest(points, points[chosen])
    for uniform in uniforms[1:]:
        cumulative = distance.double().cumsum(0)
        total = float(cumulative[-1])
        if total > 0:
            target = torch.tensor(float(uniform) * total, dtype=torch.float64, device=points.device)
            pick = min(int(torch.searchsorted(cumulative, target, right=True)), len(points) - 1)
        else:  # fewer distinct points than centroids
            pick = int(uniform * len(points))
        chosen.append(pick)
        distance = torch.minimum(distance, nearest(points, points[pick : pick + 1])[1])
    return points[chosen].clone()
