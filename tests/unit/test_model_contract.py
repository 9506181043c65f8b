"""The contract of a model family, held over every family in tiger/models and the example families of tests/plugins."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.factories import SMALL, random_ids, toy_histories
from tests.paths import CONFIGS
from tiger.core.config import load, shipped_plugins
from tiger.core.errors import ConfigError
from tiger.core.storage import Folder
from tiger.metrics.ranking import ranking, target_ranks
from tiger.models.base import InMemoryData, ModelConfig, load_family
from tiger.models.recommender import Recommender
from tiger.models.train import fit_model
from tiger.run import RunConfig
from tiger.training.loop import FitResult
from tiger.training.weights import load_weights, write_weights

SHIPPED = shipped_plugins("tiger.models")
KINDS = [*SHIPPED, "tests.plugins.toy_model", "tests.plugins.toy_counting_model"]
OPTIONS: dict[str, dict[str, Any]] = {
    "tiger": SMALL | {"max_history_items": 5, "training": {"epochs": 2, "batch_size": 64, "precision": "float32"}},
    "sasrec": {"embedding_dim": 8, "max_history_items": 5, "training": {"epochs": 2, "batch_size": 64}},
    "tests.plugins.toy_model": {"training": {"epochs": 2}},
}
"""Small sizes of the families that are trained."""

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ITEMS = 40
EXACT = {"beam": ITEMS, "exclude_seen": False}
"""Options with which a beam search finds what scoring every item finds."""


@cache
def data() -> InMemoryData:
    rng = np.random.default_rng(0)
    vectors = torch.from_numpy(rng.normal(size=(ITEMS, 6)).astype(np.float32))
    return InMemoryData(ITEMS, toy_histories(rng, 150, ITEMS), random_ids(rng, ITEMS, (4, 5, 3)), vectors)


@cache
def histories() -> list[np.ndarray]:
    """Histories of 1 to 12 items, many of them of equal lengths."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, ITEMS, length) for length in rng.integers(1, 13, 50)]


def config(kind: str, seed: int = 0) -> ModelConfig:
    return ModelConfig.resolve({"kind": kind, "seed": seed, **OPTIONS.get(kind, {})})


def train(kind: str) -> tuple[nn.Module, FitResult | None]:
    if not hasattr(load_family(config(kind)), "train"):
        return nn.Module(), None
    return fit_model(config(kind), data(), device=CPU)


trained = cache(train)


def ready(kind: str, module: nn.Module) -> Recommender:
    found: Recommender = load_family(config(kind)).recommender(module, config(kind), data(), CPU)
    return found


@cache
def recommender(kind: str) -> Recommender:
    return ready(kind, trained(kind)[0])


def filled(items: np.ndarray) -> list[list[int]]:
    """Lists without padding, which has to come last."""
    lengths = (items >= 0).sum(axis=1)
    assert (items[np.arange(items.shape[1]) >= lengths[:, None]] == -1).all()
    return [row[:length] for row, length in zip(items.tolist(), lengths, strict=True)]


def assert_equal_lists(one: Recommender, other: Recommender) -> None:
    found, again = (each.recommend(histories(), k=10) for each in (one, other))
    assert np.array_equal(found.items, again.items)
    assert np.array_equal(found.scores, again.scores)


def test_the_shipped_families() -> None:
    assert {"tiger", "sasrec", "popularity", "markov_chain", "nearest_neighbors"} <= set(SHIPPED)


@pytest.mark.parametrize("kind", KINDS)
def test_lists_are_distinct_items_with_descending_scores(kind: str) -> None:
    found = recommender(kind).recommend(histories(), k=10, **EXACT)
    assert (found.items.dtype, found.scores.dtype) == (np.int64, np.float32)
    assert found.items.shape == found.scores.shape == (50, 10)
    assert ((found.items >= 0) & (found.items < ITEMS)).all()
    assert all(len(set(row)) == 10 for row in found.items.tolist())
    assert np.isfinite(found.scores).all()
    assert (np.diff(found.scores) <= 0).all()
    assert not found.by_popularity.any()


@pytest.mark.parametrize("kind", KINDS)
def test_more_items_than_the_catalog_has_are_padding(kind: str) -> None:
    found = recommender(kind).recommend(histories(), k=60, beam=60, exclude_seen=False)
    assert found.items.shape == (50, 60)
    for row in filled(found.items):
        assert len(row) == len(set(row)) >= ITEMS - 1  # nearest neighbors leave the last item out
    assert np.array_equal(np.isneginf(found.scores), found.items == -1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_leaves_only_allowed_items_and_full_lists(kind: str) -> None:
    allowed = np.arange(ITEMS) % 2 == 0
    found = recommender(kind).recommend(histories(), k=10, beam=10, exclude_seen=False, allowed_items=allowed)
    assert (found.items >= 0).all()
    assert allowed[found.items].all()
    everything = recommender(kind).recommend(histories(), k=ITEMS, **EXACT)
    exact = recommender(kind).recommend(histories(), k=10, allowed_items=allowed, **EXACT)
    for filtered, unfiltered in zip(exact.items.tolist(), everything.items.tolist(), strict=True):
        assert filtered == [item for item in unfiltered if item >= 0 and allowed[item]][:10]
    few = recommender(kind).recommend(histories(), k=10, allowed_items=[3, 17, 29], exclude_seen=False)
    for row, history in zip(filled(few.items), histories(), strict=True):
        assert {3, 17, 29} - {int(history[-1])} <= set(row) <= {3, 17, 29}


@pytest.mark.parametrize("kind", KINDS)
def test_seen_items_are_excluded_also_those_that_the_model_does_not_read(kind: str) -> None:
    found = recommender(kind).recommend(histories(), k=10, beam=ITEMS, exclude_seen=True)
    assert (found.items >= 0).all()
    assert not any(np.isin(history, row).any() for history, row in zip(histories(), found.items, strict=True))
    long = [item for item in range(ITEMS) if item not in (3, 17, 29)]
    rest = recommender(kind).recommend([long, [5]], k=10, beam=ITEMS, exclude_seen=True)
    assert set(filled(rest.items)[0]) == {3, 17, 29}


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_history_gets_the_most_popular_items(kind: str) -> None:
    counts = data().histories.training_counts(ITEMS)
    assert np.array_equal(recommender(kind).training_counts(), counts)
    found = recommender(kind).recommend([[3], [], [5, 6]], k=5, **EXACT)
    assert found.by_popularity.tolist() == [False, True, False]
    assert found.items[1].tolist() == sorted(range(ITEMS), key=lambda item: (-counts[item], item))[:5]
    assert (np.diff(found.scores[1]) <= 0).all()
    allowed = np.arange(ITEMS) < 7
    some = recommender(kind).recommend([[]], k=10, allowed_items=allowed)
    assert set(filled(some.items)[0]) == set(range(7))


@pytest.mark.parametrize("kind", KINDS)
def test_no_histories_give_no_lists(kind: str) -> None:
    found = recommender(kind).recommend([], k=5)
    assert found.items.shape == found.scores.shape == (0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_weights_and_lists(kind: str) -> None:
    module, again = trained(kind)[0], train(kind)[0]
    first, second = module.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert_equal_lists(recommender(kind), ready(kind, again))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_give_equal_lists(kind: str, tmp_path: Path) -> None:
    write_weights(trained(kind)[0], Folder(str(tmp_path)))
    torch.manual_seed(9)
    family = load_family(config(kind))
    loaded = family.build(config(kind), data()) if hasattr(family, "build") else nn.Module()
    load_weights(loaded, Folder(str(tmp_path)))
    assert_equal_lists(recommender(kind), ready(kind, loaded))


@pytest.mark.parametrize("kind", KINDS)
def test_training_reports_the_recall_at_10_that_the_trained_model_has(kind: str) -> None:
    """The pipeline checks this metric; so no dropout, of items or other parts, is left in a validation."""
    result = trained(kind)[1]
    if result is None:
        assert not hasattr(load_family(config(kind)), "build"), "weights that are never trained"
        return
    assert result.steps > 0
    users = data().histories.evaluation("valid")
    found = recommender(kind).recommend(users.histories(), k=10, beam=20, exclude_seen=False)
    assert ranking(target_ranks(found.items, users.targets), cutoffs=(10,)) == pytest.approx(
        {name: result.best[name] for name in ("recall@10", "ndcg@10", "mrr@10")}
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_a_longer_history_in_the_batch_changes_no_other_list(kind: str, exclude_seen: bool) -> None:
    longest = np.random.default_rng(2).integers(0, ITEMS, 100)
    options = {"k": 10, "beam": 20, "exclude_seen": exclude_seen}
    alone = recommender(kind).recommend(histories(), **options)
    beside = recommender(kind).recommend([longest, *histories()], **options)
    assert np.array_equal(alone.items, beside.items[1:])
    np.testing.assert_allclose(alone.scores, beside.scores[1:], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_and_the_batches_of_users_change_no_list(kind: str) -> None:
    order = np.random.default_rng(3).permutation(50)
    found = recommender(kind).recommend(histories(), k=10)
    shuffled = recommender(kind).recommend([histories()[row] for row in order], k=10, batch_size=7)
    assert np.array_equal(found.items[order], shuffled.items)
    np.testing.assert_allclose(found.scores[order], shuffled.scores, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_recommending_twice_gives_equal_lists(kind: str) -> None:
    """Excluded items are excluded from one call, not from what the model keeps."""
    before = recommender(kind).recommend(histories(), k=10, **EXACT)
    recommender(kind).recommend(histories(), k=10, exclude_seen=True)
    after = recommender(kind).recommend(histories(), k=10, **EXACT)
    assert np.array_equal(before.items, after.items)
    assert np.array_equal(before.scores, after.scores)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_option_is_an_error(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown key model.no_such_option"):
        load(RunConfig, None, [f"model.kind={kind}", "model.no_such_option=1"], CONFIGS)
    with pytest.raises(ConfigError, match=r"unknown key decoding.no_such_option"):
        recommender(kind).recommend([[1]], no_such_option=1)
