from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.factories import model_of_random_ids
from tiger.core.errors import ConfigError, DataError
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Search
from tiger.models.tiger.beam_search import score_all_items
from tiger.models.tiger.recommender import TigerRecommender


@pytest.fixture(scope="module")
def recommender() -> TigerRecommender:
    return TigerRecommender(model_of_random_ids(40), device="cpu")


def test_against_exact_scores_for_histories_of_all_lengths(recommender: TigerRecommender) -> None:
    rng = np.random.default_rng(1)
    histories = [rng.integers(0, 40, rng.integers(1, 30)).tolist() for _ in range(100)]
    found = recommender.recommend(histories, k=10, beam=40, exclude_seen=False)
    for row, history in enumerate(histories):
        truth = score_all_items(recommender.model, torch.tensor([history]))[0].sort(descending=True)
        np.testing.assert_allclose(found.scores[row], truth.values[:10], atol=1e-5)
        assert set(found.items[row]) <= set(range(40))
        assert len(set(found.items[row])) == 10


def test_more_than_the_catalog_holds(recommender: TigerRecommender) -> None:
    found = recommender.recommend([[0]], k=60, exclude_seen=False)
    assert sorted(found.items[0, :40]) == list(range(40))
    assert (found.items[0, 40:] == -1).all()
    assert np.isneginf(found.scores[0, 40:]).all()


def test_the_history_can_be_left_out(recommender: TigerRecommender) -> None:
    history = list(range(20)) + list(range(20))
    found = recommender.recommend([history, [3]], k=40, exclude_seen=True)
    assert sorted(found.items[0, :20]) == list(range(20, 40))
    assert 3 not in found.items[1]


@pytest.mark.parametrize(("history", "message"), [([40], "outside of 0 .. 39"), ([-1], "outside")])
def test_impossible_histories_name_their_row(recommender: TigerRecommender, history: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        recommender.recommend([[0], history], k=3)


def test_k_must_be_positive(recommender: TigerRecommender) -> None:
    with pytest.raises(ConfigError, match="decoding.k"):
        recommender.recommend([[0]], k=0)


def test_an_empty_history_gets_what_is_most_popular_and_says_so() -> None:
    model = model_of_random_ids(40)
    counts = np.random.default_rng(9).integers(0, 100, 40)
    model.set_training_counts(torch.from_numpy(counts))
    recommender = TigerRecommender(model, device="cpu")
    found = recommender.recommend([[3], [], [5, 6]], k=5, exclude_seen=False)
    assert found.by_popularity.tolist() == [False, True, False]
    assert counts[found.items[1]].tolist() == sorted(counts.tolist(), reverse=True)[:5]
    without = recommender.recommend([[3], [5, 6]], k=5, exclude_seen=False)
    assert np.array_equal(found.items[[0, 2]], without.items)
    allowed = np.arange(40) % 2 == 0
    assert set(recommender.recommend([[]], k=20, allowed_items=allowed).items[0]) == set(range(0, 40, 2))


def test_one_search_gives_lists_with_and_without_the_history(recommender: TigerRecommender) -> None:
    rng = np.random.default_rng(4)
    histories = [rng.integers(0, 40, rng.integers(1, 30)) for _ in range(50)]
    both, unseen = recommender.recommend_with_and_without_seen(histories, DecodingConfig(k=7, beam=12))
    alone = recommender.recommend(histories, k=7, beam=12, exclude_seen=False)
    excluded = recommender.recommend(histories, k=7, beam=12, exclude_seen=True)
    assert np.array_equal(both.items, alone.items)
    assert np.array_equal(unseen.items, excluded.items)
    np.testing.assert_allclose(unseen.scores, excluded.scores, atol=1e-6)


@pytest.mark.parametrize("both", [True, False])
def test_a_long_history_widens_no_other_list(
    recommender: TigerRecommender, both: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among short histories, one of 5,000 items has a search of its own, of its own length."""
    monkeypatch.setattr("tiger.models.recommender._ITEMS_AT_ONCE", 1000)
    monkeypatch.setattr("tiger.models.recommender._WIDE", 10)
    rng = np.random.default_rng(7)
    histories = [rng.integers(0, 40, rng.integers(1, 30)) for _ in range(30)]
    histories.insert(11, rng.integers(0, 40, 5000))
    searched: list[tuple[int, int]] = []
    search = TigerRecommender.search

    def noted(self: TigerRecommender, options: DecodingConfig, allowed: np.ndarray | None) -> Search:
        inner = search(self, options, allowed)

        def run(batch: list[np.ndarray], users: object, results: int, exclude: bool) -> tuple[torch.Tensor, ...]:
            searched.append((len(batch), results))
            return inner(batch, None, results, exclude)

        return run

    monkeypatch.setattr(TigerRecommender, "search", noted)
    alone = recommender.recommend(histories[11:12], k=7, exclude_seen=True)
    searched.clear()
    if both:
        _, found = recommender.recommend_with_and_without_seen(histories, DecodingConfig(k=7))
        assert max(results for batch, results in searched if batch > 1) <= 7 + 30
        assert max(searched, key=lambda pair: pair[1]) == (1, 7 + 40)  # 5,000 items of 40
    else:
        found = recommender.recommend(histories, k=7, exclude_seen=True)
        assert {results for _, results in searched} == {7}
    assert [batch for batch, _ in searched].count(1) == 1
    assert np.array_equal(found.items[11], alone.items[0])


def test_a_batch_column_of_lists_keeps_its_histories(recommender: TigerRecommender) -> None:
    """The way through Arrow that evaluation takes."""
    histories = [np.array([1, 2, 3]), np.array([4])]
    column = pa.array(histories, pa.list_(pa.int32()))
    direct = recommender.recommend(histories, k=5)
    through = recommender.recommend([np.array(row) for row in column.to_pylist()], k=5)
    assert np.array_equal(direct.items, through.items)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_filter_leaves_the_list_full_of_allowed_items(recommender: TigerRecommender, share: float) -> None:
    """A narrow beam under a filter equals a wide one from which the other items are taken."""
    rng = np.random.default_rng(5)
    allowed = rng.random(40) < share
    allowed[7] = True
    histories = [rng.integers(0, 40, rng.integers(1, 9)) for _ in range(20)]
    found = recommender.recommend(histories, k=40, beam=int(allowed.sum()), allowed_items=allowed, exclude_seen=False)
    everything = recommender.recommend(histories, k=40, beam=40, exclude_seen=False)
    for row in range(20):
        expected = [item for item in everything.items[row] if allowed[item]]
        assert found.items[row, : len(expected)].tolist() == expected
        assert (found.items[row, len(expected) :] == -1).all()


def test_a_filter_of_another_catalog_is_refused(recommender: TigerRecommender) -> None:
    with pytest.raises(DataError, match="40 items"):
        recommender.recommend([[0]], k=3, allowed_items=np.ones(39, bool))


def test_draws_are_of_the_user_and_the_seed_and_first_codes_are_spread(recommender: TigerRecommender) -> None:
    rng = np.random.default_rng(6)
    histories = [rng.integers(0, 40, rng.integers(1, 9)) for _ in range(30)]
    users = [f"user {row}" for row in range(30)]
    ranked = recommender.recommend(histories, k=5).items
    drawn = recommender.recommend(histories, k=5, users=users, temperature=1.0, seed=1).items
    assert not np.array_equal(ranked, drawn)
    backwards = recommender.recommend(histories[::-1], k=5, users=users[::-1], temperature=1.0, seed=1).items
    assert np.array_equal(drawn, backwards[::-1])
    assert not np.array_equal(drawn, recommender.recommend(histories, k=5, users=users, temperature=1.0, seed=2).items)
    spread = recommender.recommend(histories, k=6, max_per_first_code=2, exclude_seen=False).items
    first = np.where(spread >= 0, recommender.trie.codes.numpy()[spread, 0], -1)
    assert max(np.bincount(row[row >= 0]).max() for row in first) == 2
    assert (spread >= 0).all()  # four first codes: six items are there
