from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import torch

from tests.factories import toy_histories
from tiger.models.base import InMemoryData
from tiger.models.markov_chain import MarkovChain
from tiger.models.nearest_neighbors import NearestNeighbors
from tiger.models.popularity import Popularity
from tiger.models.scoring import top_items


def test_popularity_counts_training_items_only() -> None:
    histories = toy_histories(np.random.default_rng(0), 200, 15)
    counts = np.zeros(15, int)
    for user in range(200):
        np.add.at(counts, histories.of(user)[:-2], 1)
    expected = sorted(range(15), key=lambda item: (-counts[item], item))
    popularity = Popularity(InMemoryData(15, histories))
    assert popularity.training_counts().tolist() == counts.tolist()
    assert popularity.recommend([[3]], k=10, exclude_seen=False).items[0].tolist() == expected[:10]
    assert popularity.recommend([[]], k=10).items[0].tolist() == expected[:10]


def test_markov_chain_against_counting_pairs() -> None:
    histories = toy_histories(np.random.default_rng(0), 300, 12)
    pairs: Counter[tuple[int, int]] = Counter()
    for user in range(300):
        training = histories.of(user)[:-2].tolist()
        pairs.update(pairwise(training))
    popular = histories.training_counts(12)
    found = MarkovChain(InMemoryData(12, histories)).recommend(
        [[5, item] for item in range(12)], k=8, exclude_seen=False
    )
    for item in range(12):
        truth = sorted(range(12), key=lambda other: (-pairs[item, other], -popular[other], other))
        assert found.items[item].tolist() == truth[:8]


def test_nearest_neighbors_leave_the_item_itself_out() -> None:
    vectors = torch.tensor([[1, 0], [1, 0.1], [0, 1], [0, 0.5], [-1, 0]])
    data = InMemoryData(5, toy_histories(np.random.default_rng(0), 20, 5), text_embeddings=vectors)
    nearest = NearestNeighbors(data)
    found = nearest.recommend([[4, 0], [3]], k=3, exclude_seen=False).items
    assert found[:, 0].tolist() == [1, 2]
    assert 0 not in found[0]
    assert nearest.recommend([[0]], k=9).items[0, 4:].tolist() == [-1] * 5  # the catalog has no more


def test_top_items_of_equal_scores_are_the_lower_ones() -> None:
    rng = np.random.default_rng(1)
    for width in (1, 7, 20, 30):
        scores = rng.integers(0, 4, (50, 20)).astype(float)
        truth = [sorted(range(20), key=lambda item, row=row: (-row[item], item))[:width] for row in scores]
        assert top_items(scores, width).tolist() == truth
