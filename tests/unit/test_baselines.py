from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np

from tests.factories import toy_histories
from tiger.models.baselines import markov_chain, nearest_by_embedding, popularity


def test_popularity_counts_training_items_only() -> None:
    histories = toy_histories(np.random.default_rng(0), 200, 15)
    counts = np.zeros(15, int)
    for user in range(200):
        np.add.at(counts, histories.of(user)[:-2], 1)
    expected = sorted(range(15), key=lambda item: (-counts[item], item))
    assert histories.training_counts(15).tolist() == counts.tolist()
    assert popularity(histories, 15, 10).tolist() == expected[:10]


def test_co_occurrence_against_counting_pairs() -> None:
    histories = toy_histories(np.random.default_rng(0), 300, 12)
    pairs: Counter[tuple[int, int]] = Counter()
    for user in range(300):
        training = histories.of(user)[:-2].tolist()
        pairs.update(pairwise(training))
    popular = histories.training_counts(12)
    taken = [np.array([5, item]) for item in range(12)]
    found = markov_chain(histories, 12, taken, 8)
    for item in range(12):
        truth = sorted(range(12), key=lambda other: (-pairs[item, other], -popular[other], other))
        assert found[item].tolist() == truth[:8]


def test_nearest_embeddings_leave_the_item_itself_out() -> None:
    vectors = np.array([[1, 0], [1, 0.1], [0, 1], [0, 0.5], [-1, 0]], np.float32)
    found = nearest_by_embedding(vectors, [np.array([4, 0]), np.array([3])], 3)
    assert found[:, 0].tolist() == [1, 2]
    assert 0 not in found[0]
    assert nearest_by_embedding(vectors, [np.array([0])], 9)[0, 5:].tolist() == [-1] * 4  # the catalog has no more
