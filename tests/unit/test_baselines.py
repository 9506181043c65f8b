from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import toy_histories
from tiger.data.histories import add_counts, most_popular
from tiger.models.base import InMemoryData, ModelConfig, load_family
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


@settings(max_examples=200, deadline=None)
@given(counts=st.lists(st.integers(0, 4), max_size=30), k=st.integers(1, 40))
def test_most_popular_items_are_the_first_of_all_sorted(counts: list[int], k: int) -> None:
    truth = sorted(range(len(counts)), key=lambda item: (-counts[item], item))[:k]
    assert most_popular(np.array(counts, np.int64), k).tolist() == truth


def test_counts_grow_with_the_items() -> None:
    counts = add_counts(np.array([1, 0]), np.array([1, 1, 4], np.int32))
    assert counts.tolist() == [1, 2, 0, 0, 1]
    assert add_counts(counts, np.zeros(0, np.int32)).tolist() == [1, 2, 0, 0, 1]


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


def dense_lists(scores: np.ndarray, k: int) -> list[list[int]]:
    """The items of the highest finite scores, ties by index, padded with -1."""
    rows = []
    for row in scores:
        order = sorted(np.flatnonzero(np.isfinite(row)).tolist(), key=lambda item, row=row: (-row[item], item))[:k]
        rows.append(order + [-1] * (min(k, len(row)) - len(order)))
    return rows


@pytest.mark.parametrize("kind", ["popularity", "markov_chain", "nearest_neighbors"])
@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("filtered", [True, False])
def test_against_scores_of_all_items(
    kind: str, exclude_seen: bool, filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rankings from sparse rows and in blocks of items equal those of a dense table of scores."""
    monkeypatch.setattr("tiger.models.nearest_neighbors._BLOCK_ITEMS", 7)
    monkeypatch.setattr("tiger.models.nearest_neighbors._MERGED", 0 if filtered else 8)  # all blocks; the first one
    rng = np.random.default_rng(2)
    items = 30
    past = toy_histories(rng, 40, items)
    vectors = rng.integers(-1, 2, (items, 3)).astype(np.float32)  # many equal cosines
    data = InMemoryData(items, past, text_embeddings=torch.from_numpy(vectors))
    histories = [rng.integers(0, items, length) for length in rng.integers(1, 25, 60)]
    allowed = rng.random(items) < 0.4 if filtered else np.ones(items, bool)
    popularity = past.training_counts(items)
    scores = np.tile(popularity.astype(float), (len(histories), 1))
    if kind == "markov_chain":
        scores /= popularity.max() + 1.0
        for user in range(40):
            for before, after in pairwise(past.of(user)[:-2].tolist()):
                scores[[row for row, history in enumerate(histories) if history[-1] == before], after] += 1
    elif kind == "nearest_neighbors":
        last = np.array([history[-1] for history in histories])
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        scores = unit[last] @ unit.T
        scores[np.arange(len(last)), last] = -np.inf
    scores[:, ~allowed] = -np.inf
    for row, history in enumerate(histories):
        if exclude_seen:
            scores[row, history] = -np.inf
    recommender = load_family(ModelConfig.resolve({"kind": kind})).recommender(None, None, data, torch.device("cpu"))
    for k in (5, 30):
        found = recommender.recommend(histories, k=k, beam=k, exclude_seen=exclude_seen, allowed_items=allowed)
        assert found.items.tolist() == dense_lists(scores, k)
        taken = np.take_along_axis(scores, found.items.clip(0), axis=1)
        np.testing.assert_allclose(found.scores, np.where(found.items < 0, -np.inf, taken), rtol=1e-6)
