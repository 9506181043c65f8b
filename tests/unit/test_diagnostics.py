"""Planted collapses: each is caught at its stage, with the figure and the likely cause upstream."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tests.factories import toy_histories
from tiger.core.errors import HealthError
from tiger.evaluation import health as d
from tiger.metrics.lists import ListSums

RNG = np.random.default_rng(0)
PROFILE = {
    "items": 100,
    "training_examples": 500,
    "validation_users": 90,
    "test_users": 90,
    "text_fields": ["title"],
    "columns": {"title": {"distinct": 99, "missing": 1}, "text": {"distinct": 99, "missing": 1}},
    "text_characters": {"50%": 80.0},
}


def test_healthy_stages_pass() -> None:
    vectors = RNG.normal(size=(500, 16)).astype(np.float32)
    codes = RNG.integers(0, 16, (500, 3))
    items = np.stack([RNG.permutation(500)[:10] for _ in range(50)])
    checks = [
        *d.check_catalog(PROFILE),
        *d.check_embeddings(vectors),
        *d.check_tokenizer(vectors, codes, 16),
        *d.check_semantic_ids(np.zeros(500)),
        *d.check_model(0.1, 0.02),
        *d.check_model(0.1, 0.02, popularity=0.09, users=50),
        *d.check_recommendations(ListSums.of(items, 500)),
    ]
    assert all(record["healthy"] for record in d.require(checks))


COLLAPSES = {
    "identical texts": (
        lambda: d.check_catalog(PROFILE | {"columns": PROFILE["columns"] | {"text": {"distinct": 1, "missing": 0}}}),
        r"share of distinct texts is 0.01, at least 0.5 is required; likely cause: the reader found none",
    ),
    "empty texts": (
        lambda: d.check_catalog(PROFILE | {"columns": PROFILE["columns"] | {"text": {"distinct": 60, "missing": 40}}}),
        r"share of empty texts is 0.4, at most 0.05",
    ),
    "identical titles": (
        lambda: d.check_catalog(PROFILE | {"columns": PROFILE["columns"] | {"title": {"distinct": 2, "missing": 0}}}),
        r"share of distinct titles is 0.02",
    ),
    "identical embeddings": (
        lambda: d.check_embeddings(np.ones((100, 8), np.float32)),
        r"embeddings is unhealthy: mean pairwise distance is 0, at least 0.01.*the texts are alike",
    ),
    "half of the embeddings identical": (
        lambda: d.check_embeddings(np.concatenate([RNG.normal(size=(40, 8)), np.zeros((60, 8))]).astype(np.float32)),
        r"share of distinct vectors is 0.41",
    ),
    "encoded vectors on one point": (
        lambda: d.check_tokenizer(np.ones((100, 8), np.float32), RNG.integers(0, 8, (100, 3)), 8),
        r"distance of encoded vectors is 0, at least 0.1.*maps all items to one point",
    ),
    "one code for all": (
        lambda: d.check_tokenizer(RNG.normal(size=(100, 8)).astype(np.float32), np.zeros((100, 3), int), 8),
        r"share of distinct code tuples is 0.01.*codebook collapsed",
    ),
    "a dead level": (
        lambda: d.check_tokenizer(
            RNG.normal(size=(100, 8)).astype(np.float32),
            np.stack([RNG.integers(0, 32, 100), np.zeros(100, int), RNG.integers(0, 32, 100)], axis=1),
            32,
        ),
        r"usage of level 2 is 0.03125",
    ),
    "most items collide": (lambda: d.check_semantic_ids(np.arange(100)), r"moved by the collision level is 0.99"),
    "a model worse than guessing": (lambda: d.check_model(0.001, 0.01), r"Recall@10 / that of guessing is 0.1"),
    "a model that guesses": (
        lambda: d.check_model(10 / 12_101, 10 / 12_101),
        r"Recall@10 / that of guessing is 1, at least 1.5",
    ),
    "a model below popularity": (
        lambda: d.check_model(0.01, 10 / 12_101, popularity=0.02, users=4000),
        r"model is unhealthy: validation Recall@10 \(popularity's, minus twice its error\) is 0.01, at least 0.0155",
    ),
    "no validation users": (
        lambda: d.check_catalog(PROFILE | {"validation_users": 0}),
        r"validation users is 0, at least 1 is required; .*temporal, both split times are equal.*valid_fraction",
    ),
    "items outside of the catalog": (
        lambda: d.check_recommendations(ListSums.of(np.array([[0, 1, 99]]), 50)),
        r"invalid items is 1, at most 0",
    ),
    "a list that repeats an item": (
        lambda: d.check_recommendations(ListSums.of(np.tile([[0, 1, 1]], (4, 1)), 50, cutoff=3)),
        r"repeated items is 4",
    ),
    "a list that repeats an item, of one split": (
        lambda: d.check_recommendations(ListSums.of(np.tile([[0, 1, 1]], (4, 1)), 50, cutoff=3), split="test"),
        r"repeated items \(test\) is 4",
    ),
    "one list for all users": (
        lambda: d.check_recommendations(ListSums.of(np.tile(np.arange(10), (99, 1)), 50)),
        r"distinct items is 10, at least 11",
    ),
}


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_collapse_stops_the_stage(name: str) -> None:
    checks, message = COLLAPSES[name]
    with pytest.raises(HealthError, match=message):
        d.require(checks())


def test_code_figures_against_the_definition() -> None:
    codes = np.array([[0, 1], [0, 1], [1, 1], [2, 1]])
    figures = d.code_metrics(codes, 4)
    assert figures["unique_ratio"] == 0.75
    assert (figures["usage@1"], figures["usage@2"]) == (0.75, 0.25)
    shares = np.array([0.5, 0.25, 0.25])
    assert figures["perplexity@1"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert figures["perplexity@2"] == pytest.approx(1)
    sizes = d.code_metrics(codes, (3, 2))
    assert (sizes["usage@1"], sizes["usage@2"]) == (1, 0.5)


def test_a_small_catalog_or_few_users_are_judged_mildly() -> None:
    """Twelve users and twenty items: guessing and learning cannot be told apart."""
    assert all(check.healthy for check in d.check_model(0.4, 0.5, popularity=0.5, users=12))
    assert not all(check.healthy for check in d.check_model(0.4, 0.5, popularity=0.5, users=4000))


def test_popularity_is_counted_on_the_users_that_choose_the_model() -> None:
    histories = toy_histories(RNG, users=300, items=40)
    recall, users = d.popularity_recall(histories, 50, seed=3)
    counts = Counter(
        item
        for user in range(300)
        for item in histories.items[histories.offsets[user] : histories.train_end[user]].tolist()
    )
    popular = sorted(range(40), key=lambda item: (-counts[item], item))[:10]
    chosen = np.random.default_rng(3).permutation(300)[:50]
    assert users == 50
    assert recall == np.mean([histories.items[histories.train_end[user]] in popular for user in chosen])
    assert d.popularity_recall(histories, 10**6, seed=0)[1] == 300


@pytest.mark.parametrize("scale", [1.0, 5e-4, 1e-6, 30.0])
def test_embeddings_are_judged_whatever_their_scale(scale: float) -> None:
    vectors = RNG.normal(size=(500, 64)).astype(np.float32)
    assert d.require(d.check_embeddings(vectors * np.float32(scale)))
    alike = (np.ones((500, 64)) + 1e-4 * vectors).astype(np.float32) * np.float32(min(scale, 1.0))
    with pytest.raises(HealthError, match="embeddings is unhealthy"):
        d.require(d.check_embeddings(alike))


def test_the_command_explains_itself_and_its_errors(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    assert d.main(["--help"]) == 0
    assert d.main([str(tmp_path)]) == 4
    assert "contains no finished" in capsys.readouterr().err
