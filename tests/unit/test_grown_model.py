"""A trained model with appended items: what it has learned stays, and new items are scored by their texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.factories import PAPER, SMALL, random_ids
from tiger.core.config import build
from tiger.models.decoding import DecodingConfig
from tiger.models.tiger.beam_search import score_all_items
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.growth import grow, known_nodes
from tiger.models.tiger.model import TigerModel
from tiger.models.tiger.recommender import TigerRecommender
from tiger.models.tiger.softmax import TrieSoftmax
from tiger.semantic_ids.assignment import SemanticIds
from tiger.semantic_ids.trie import Trie

ALL, TRAINED = 50, 30
KINDS: list[dict[str, object]] = [{}, {"encoder": "bidirectional"}, {"item_vectors": False}, PAPER]


def ids_of(count: int) -> SemanticIds:
    """IDs of the first of fifty items; those of fewer items are the same."""
    every = random_ids(np.random.default_rng(3), ALL, (4, 5, 6))
    return SemanticIds(every.codes[:count], every.level_sizes)


def vectors(count: int) -> torch.Tensor:
    return torch.randn(ALL, 6, generator=torch.Generator().manual_seed(4))[:count]


def trained(changes: dict[str, object]) -> TigerModel:
    torch.manual_seed(0)
    model = TigerModel(build(TigerConfig, SMALL | changes), Trie(ids_of(TRAINED)), vectors(TRAINED)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    counts = torch.arange(TRAINED)  # the first item was never bought
    model.set_training_counts(counts)
    return model


def grown(model: TigerModel, count: int, before: int = TRAINED) -> TigerModel:
    larger = TigerModel(model.config, Trie(ids_of(count)), vectors(count)).eval()
    grow(larger, model.state_dict(), Trie(ids_of(before)), vectors(before))
    return larger


def histories(items: int) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, items, rng.integers(1, 9)) for _ in range(12)]


@pytest.mark.parametrize("changes", KINDS)
def test_without_new_items_nothing_changes(changes: dict[str, object]) -> None:
    model = trained(changes)
    one, other = (
        TigerRecommender(each).recommend(histories(TRAINED), k=10, users=["u"] * 12)
        for each in (model, grown(model, TRAINED))
    )
    assert np.array_equal(one.items, other.items)
    assert np.array_equal(one.scores, other.scores)


@pytest.mark.parametrize("changes", KINDS[:3])
def test_vectors_of_trained_nodes_stay_and_new_nodes_speak_by_their_texts(changes: dict[str, Any]) -> None:
    model = trained(changes)
    larger = grown(model, ALL)
    before, after = model.node_vectors(), larger.node_vectors()
    assert isinstance(larger.softmax, TrieSoftmax)
    for level, (old, new) in enumerate(zip(before, after, strict=True)):
        where = known_nodes(model.trie, larger.trie, level)
        np.testing.assert_allclose(new[where].detach(), old.detach(), rtol=1e-6, atol=1e-6)
        others = np.setdiff1d(np.arange(len(new)), where)
        assert len(others) or level == 0
        if level < larger.trie.depth - 1:
            assert not larger.softmax.inner[level].weight[others].any()
            for node in others.tolist():
                below = np.flatnonzero(larger.trie.paths[:, level].numpy() == node)
                assert below.min() >= TRAINED
                text = larger.softmax.get_buffer(f"node_text_{level}")[node]
                np.testing.assert_allclose(text, vectors(ALL)[below].mean(0), atol=1e-6)
    if larger.items.learned is not None:
        assert not larger.items.learned.weight[TRAINED:].any()
    assert larger.items.known.tolist() == [False] + [True] * (TRAINED - 1) + [False] * (ALL - TRAINED)


@pytest.mark.parametrize("changes", KINDS)
def test_every_item_is_reached_with_its_exact_score(changes: dict[str, object]) -> None:
    """New items also occur in the histories."""
    larger = grown(trained(changes), ALL)
    recommender = TigerRecommender(larger)
    given = histories(ALL)
    found = recommender.recommend(given, k=ALL, beam=ALL, exclude_seen=False, users=["u"] * 12)
    assert (np.sort(found.items, axis=1) == np.arange(ALL)).all()
    for row, history in enumerate(given):
        truth = score_all_items(larger, torch.from_numpy(history)[None])[0].detach()
        np.testing.assert_allclose(found.scores[row], truth[found.items[row]], atol=1e-4)
    new = np.arange(ALL) >= TRAINED
    only = recommender.recommend(
        given, k=ALL - TRAINED, beam=ALL, allowed_items=new, exclude_seen=False, users=["u"] * 12
    )
    assert (np.sort(only.items, axis=1) == np.arange(TRAINED, ALL)).all()


def test_deleted_items_are_in_no_list_but_may_be_in_histories() -> None:
    recommender = TigerRecommender(grown(trained({}), ALL))
    recommender.available = np.ones(ALL, bool)
    recommender.available[[2, 7, 40]] = False
    found = recommender.recommend([*histories(ALL), [], [2, 7, 40]], k=ALL, beam=ALL, exclude_seen=False)
    assert not np.isin(found.items, [2, 7, 40]).any()
    assert ((found.items >= 0).sum(axis=1) == ALL - 3).all()
    some = recommender.recommend([[3]], k=5, beam=ALL, exclude_seen=False, allowed_items=[2, 3, 40, 41])
    assert set(some.items[0].tolist()) == {3, 41, -1}
    both = recommender.recommend_with_and_without_seen([np.array([3, 2])], DecodingConfig(k=ALL, beam=ALL))
    assert all(not np.isin(each.items, [2, 7, 40]).any() for each in both)
