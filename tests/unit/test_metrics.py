from __future__ import annotations

import math

import numpy as np
import pytest

from tiger.metrics import lists
from tiger.metrics.lists import ListSums, coverage, distinct_items, popular_item_fraction, sum_lists
from tiger.metrics.ranking import by_group, confidence, paired_difference, ranking, target_ranks


def test_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    items = np.stack([rng.permutation(80)[:60] for _ in range(300)])
    targets = rng.integers(0, 80, 300)
    found = ranking(target_ranks(items, targets))
    for cutoff in (1, 5, 10, 20, 50):
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
    shown, counts = ListSums.of(np.array([[0, 1, -1], [1, 2, -1]]), 6).shown, np.ones(6, int)
    assert (distinct_items(shown, counts), coverage(shown, counts)) == (3, 0.5)


def test_a_paired_interval_is_narrower_than_those_of_the_runs() -> None:
    """Two runs that agree on most users: the difference is certain where each figure is not."""
    rng = np.random.default_rng(0)
    ranks = np.where(rng.random(4000) < 0.3, rng.integers(1, 11, 4000), 0)
    better = ranks.copy()
    better[np.flatnonzero(ranks == 0)[:60]] = 1
    difference, low, high = paired_difference(better, ranks)["recall@10"]
    own_low, own_high = confidence(better)["recall@10"]
    assert difference == pytest.approx(60 / 4000)
    assert 0 < low < difference < high
    assert high - low < (own_high - own_low) / 2
    assert paired_difference(ranks, ranks)["ndcg@10"] == (0, 0, 0)
    with pytest.raises(ValueError, match="same users: 3 and 2"):
        paired_difference(np.ones(3, int), np.ones(2, int))


def test_paired_intervals_cover_a_known_difference() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(200):
        first, second = (rng.random(400) < 0.25).astype(int), (rng.random(400) < 0.2).astype(int)
        _, low, high = paired_difference(first, second, seed=seed)["recall@1"]
        inside += low <= 0.05 <= high
    assert 180 <= inside <= 200


def test_groups_of_users() -> None:
    ranks, values = np.array([1, 0, 11, 5, 0]), np.array([0, 3, 4, 9, 10])
    assert by_group(ranks, values, (0, 4, 9)) == {
        "0 to 0": {"users": 1, "recall": 1.0},
        "1 to 4": {"users": 2, "recall": 0.0},
        "5 to 9": {"users": 1, "recall": 1.0},
        "over 9": {"users": 1, "recall": 0.0},
    }


def test_the_share_of_popular_items() -> None:
    counts = np.array([5, 1, 9, 1, 1, 1, 1, 1, 1, 1])
    shown = ListSums.of(np.array([[2, 0], [2, -1]]), 10).shown
    assert popular_item_fraction(shown, counts) == pytest.approx(2 / 3)
    assert popular_item_fraction(shown, counts, share=0.2) == 1


@pytest.mark.parametrize("at_once", [1, 50, 1 << 20])
def test_sums_of_lists_add_up_over_shards(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "_ROWS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    items = rng.integers(-1, 21, (500, 12))  # 20 is not an item
    whole, parts = ListSums(20, 5), ListSums(20, 5)
    whole.add(sum_lists(items, 20, 5))
    for part in np.array_split(items, 7):
        parts.add(sum_lists(part, 20, 5))
    assert np.array_equal(whole.shown, parts.shown)
    for name in ("lists", "invalid", "invalid_top", "repeated", "filled"):
        assert getattr(whole, name) == getattr(parts, name)
    top = items[:, :5].tolist()
    assert whole.shown.tolist() == [sum(row.count(item) for row in top) for item in range(20)]
    assert whole.distinct == parts.distinct == len({item for row in top for item in row if 0 <= item < 20})
    assert whole.lists == 500
    assert whole.invalid == int((items == 20).sum())
    assert whole.invalid_top == sum(row.count(20) for row in top)
    assert whole.repeated == sum(len(row) - len(set(row)) for row in ([x for x in row if x >= 0] for row in top))
    assert whole.filled == sum(x >= 0 for row in top for x in row)
