"""The protocol of benchmarks/new_items.py: what is removed, what is inserted, and how samples are weighted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tiger.data.histories import Histories


@pytest.fixture(scope="module")
def new_items() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "new_items.py"
    spec = importlib.util.spec_from_file_location("new_items", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["new_items"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_removed_items_leave_the_training_parts_alone(new_items: ModuleType) -> None:
    items = np.array([0, 1, 2, 1, 2, 2, 1, 0, 2], np.int32)
    histories = Histories(["a", "b"], np.array([0, 5, 9]), items, np.array([3, 7]), np.array([4, 8]))
    reduced = new_items.remove_from_training(histories, np.array([False, True, False]))
    assert reduced.of(0).tolist() == [0, 2, 1, 2]  # the validation target of user a is removed item 1
    assert reduced.of(1).tolist() == [2, 0, 2]
    assert reduced.training_counts(3).tolist() == [1, 0, 2]
    for split in ("valid", "test"):
        before, after = histories.evaluation(split), reduced.evaluation(split)
        assert after.targets.tolist() == before.targets.tolist()
    assert [history.tolist() for history in reduced.evaluation("test").histories()] == [[0, 2, 1], [2, 0]]


def test_items_are_chosen_by_the_seed(new_items: ModuleType) -> None:
    chosen = new_items.choose_items(1000, 0.05, 1)
    assert chosen.sum() == 50
    assert (chosen == new_items.choose_items(1000, 0.05, 1)).all()
    assert (chosen != new_items.choose_items(1000, 0.05, 2)).any()


def test_inserts_at_most_epsilon_behind_the_generated_prefix(new_items: ModuleType) -> None:
    prefixes = np.array([7, 7, 8, 8, 8, 9, 9])
    removed = np.array([False, True, False, True, True, False, False])
    lists = np.array([[5, 2, 0, 6], [5, 6, -1, -1], [0, 5, 6, 2]])
    inserted = new_items.insert_by_prefix(lists, prefixes, removed, 0.25)  # one item of four
    assert inserted.tolist() == [[5, 2, 3, 0], [5, 6, -1, -1], [0, 1, 5, 6]]
    assert new_items.insert_by_prefix(lists, prefixes, removed, 0.5).tolist()[0] == [5, 2, 3, 4]
    assert new_items.insert_by_prefix(lists, prefixes, removed, 0.0).tolist() == lists.tolist()


def test_recall_of_all_users_weights_the_sample(new_items: ModuleType) -> None:
    measured = new_items.Measured(np.array([1, 0]), np.array([3, 0, 0, 0]), weight=10.0)
    assert measured.all_users() == pytest.approx((1 + 10) / (2 + 40))
