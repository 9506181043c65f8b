from __future__ import annotations

import torch

from tiger.tokenizers.kmeans import cluster_sums, kmeans, lloyd, nearest


def test_nearest_equals_the_difference_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    points, centroids = torch.randn(500, 7, generator=generator), torch.randn(20, 7, generator=generator)
    truth = (points[:, None] - centroids).square().sum(-1)
    index, distance = nearest(points, centroids)
    assert torch.equal(index, truth.argmin(1))
    torch.testing.assert_close(distance, truth.min(1).values, atol=1e-4, rtol=1e-4)


def test_kmeans_finds_separated_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(16, 5, generator=generator) * 20
    points = (centers[:, None] + torch.randn(16, 50, 5, generator=generator) * 0.1).flatten(0, 1)
    found = kmeans(points, 16, iterations=50, generator=generator)
    assert nearest(centers, found)[1].max() < 0.1


def test_kmeans_is_a_function_of_its_generator() -> None:
    points = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    first, second = (kmeans(points, 9, iterations=9, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, second)


def test_a_dead_centroid_comes_back_to_life() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0]])
    moved, _ = lloyd(points, torch.tensor([[0.0], [1000.0]]))
    assert sorted(moved.flatten().tolist()) == [points.mean().item(), 10.0]


def test_fewer_distinct_points_than_centroids() -> None:
    found = kmeans(torch.ones(10, 3), 4, iterations=5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found, torch.ones(4, 3))


def test_cluster_sums() -> None:
    sums, counts = cluster_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([1, 0, 1]), 3)
    assert sums.tolist() == [[3, 4], [6, 8], [0, 0]]
    assert counts.tolist() == [1, 2, 0]
