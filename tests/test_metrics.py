from __future__ import annotations

import math

import numpy as np
import pytest

from tiger.metrics import confidence, coverage, ranking, target_ranks


def test_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    items = np.stack([rng.permutation(80)[:60] for _ in range(300)])
    targets = rng.integers(0, 80, 300)
    found = ranking(target_ranks(items, targets))
    for cutoff in (1, 5, 10, 50):
        recall = ndcg = mrr = 0.0
        for row, target in zip(items.tolist(), targets.tolist(), strict=True):
            if target in row[:cutoff]:
                rank = row.index(target) + 1
                recall, ndcg, mrr = recall + 1, ndcg + 1 / math.log2(rank + 1), mrr + 1 / rank
        assert found[f"recall@{cutoff}"] == pytest.approx(recall / 300)
        assert found[f"ndcg@{cutoff}"] == pytest.approx(ndcg / 300)
        assert found[f"mrr@{cutoff}"] == pytest.approx(mrr / 300)


def test_padding_is_never_a_hit() -> None:
    assert target_ranks(np.array([[3, -1, -1]]), np.array([0])).tolist() == [0]


def test_intervals_cover_a_known_rate() -> None:
    """95 % intervals for a recall of 0.2: in 200 experiments nearly all hold the truth."""
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        ranks = (rng.random(500) < 0.2).astype(np.int64)
        low, high = confidence(ranks, seed=seed)["recall@10"]
        inside += low <= 0.2 <= high
    assert 180 <= inside <= 200


def test_no_users_is_an_error_and_not_zero() -> None:
    with pytest.raises(ValueError, match="no users"):
        ranking(np.zeros(0, np.int64))


def test_coverage_counts_items_not_padding() -> None:
    assert coverage(np.array([[0, 1, -1], [1, 2, -1]]), 6) == {"distinct@10": 3, "coverage@10": 0.5}
