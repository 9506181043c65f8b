"""Each leak that makes published numbers wrong, planted: what must not matter does not, and what must is caught."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.factories import PAPER, random_ids, toy_histories
from tiger.core.config import build
from tiger.core.errors import HealthError
from tiger.data.histories import Histories
from tiger.metrics import ranking as metrics
from tiger.models.base import InMemoryData
from tiger.models.markov_chain import MarkovChain
from tiger.models.popularity import Popularity
from tiger.models.tiger.batches import SequenceExamples, TargetExamples
from tiger.models.tiger.config import TigerConfig
from tiger.models.train import fit_model

CPU = torch.device("cpu")
MODEL = {
    "d_model": 16, "num_heads": 2, "head_dim": 8, "d_ff": 32, "num_layers": 1, "max_history_items": 5,
    "training": {"epochs": 2, "batch_size": 64, "warmup_steps": 2, "precision": "float32"},
}  # fmt: skip


def world() -> Histories:
    return toy_histories(np.random.default_rng(0), 150, 40)


def with_other(histories: Histories, positions: np.ndarray) -> Histories:
    """The same histories with other items at these positions."""
    items = histories.items.copy()
    items[positions] = (items[positions] + 17) % 40
    return replace(histories, items=items)


def learn(histories: Histories, kind: str) -> tuple[dict[str, torch.Tensor], Any]:
    ids = random_ids(np.random.default_rng(1), 40, (4, 4, 4))
    vectors = torch.from_numpy(np.random.default_rng(2).normal(size=(40, 7)).astype(np.float32))
    config = build(TigerConfig, MODEL | (PAPER if kind == "paper" else {}))
    model, result = fit_model(config, InMemoryData(40, histories, ids, vectors), device=CPU)
    return model.state_dict(), result


@pytest.mark.parametrize("kind", ["paper", "trie"])
def test_test_items_change_neither_training_nor_the_choice_of_the_checkpoint(kind: str) -> None:
    histories = world()
    weights, result = learn(histories, kind)
    other_weights, other = learn(with_other(histories, histories.valid_end), kind)
    assert other.best_step == result.best_step
    assert other.log == result.log
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("kind", ["paper", "trie"])
def test_validation_items_change_the_choice_but_no_loss(kind: str) -> None:
    histories = world()
    _, result = learn(histories, kind)
    _, other = learn(with_other(histories, histories.train_end), kind)
    losses = [[look.get("losses") for look in found.log] for found in (result, other)]
    assert losses[0] == losses[1]
    assert [look["ndcg@10"] for look in result.log] != [look["ndcg@10"] for look in other.log]


@pytest.mark.parametrize("kind", ["paper", "trie"])
def test_training_on_the_validation_item_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = TargetExamples if kind == "paper" else SequenceExamples
    original = examples.__init__

    def leaking(self: Any, histories: Histories, *rest: Any) -> None:
        original(self, replace(histories, train_end=histories.valid_end), *rest)

    monkeypatch.setattr(examples, "__init__", leaking)
    with pytest.raises(HealthError, match=r"would train on \d+ targets, the training parts have \d+: targets"):
        learn(world(), kind)


def test_baselines_do_not_see_what_comes_later() -> None:
    histories = world()
    later = np.concatenate([histories.train_end, histories.valid_end])
    changed = with_other(histories, later)
    taken = [histories.of(user)[:-2] for user in range(150)]
    for family in (Popularity, MarkovChain):
        recommenders = [family(InMemoryData(40, given)) for given in (histories, changed)]
        first, second = (one.recommend(taken, k=40, exclude_seen=False) for one in recommenders)
        assert np.array_equal(first.items, second.items)


def test_an_item_that_shares_the_targets_codes_is_no_hit() -> None:
    """Items 3 and 4 collide; a list with 4 does not hold 3, whatever their codes."""
    assert metrics.target_ranks(np.array([[4, 9]]), np.array([3])).tolist() == [0]
