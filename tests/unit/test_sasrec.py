from __future__ import annotations

import numpy as np
import torch

from tests.factories import toy_histories
from tiger.core.config import build
from tiger.data.histories import Histories
from tiger.models.base import InMemoryData
from tiger.models.sasrec import Config as SASRecConfig
from tiger.models.sasrec import SASRec, SASRecRecommender
from tiger.models.train import fit_model

CPU = torch.device("cpu")
SMALL = {
    "embedding_dim": 16,
    "max_history_items": 6,
    "dropout": 0.0,
    "training": {"epochs": 12, "batch_size": 32, "validate_every_epochs": 2},
}


def test_a_place_knows_nothing_of_later_items() -> None:
    torch.manual_seed(0)
    model = SASRec(build(SASRecConfig, SMALL), 20).eval()
    history = torch.tensor([[1, 2, 3, 4]])
    changed = torch.tensor([[1, 2, 3, 9]])
    assert torch.equal(model.states(history)[:, :3], model.states(changed)[:, :3])


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = SASRec(build(SASRecConfig, SMALL), 20).eval()
    alone = model(torch.tensor([[1, 2, 3]]))
    padded = model(torch.tensor([[1, 2, 3, -1, -1], [5, 6, 7, 8, 9]]))
    torch.testing.assert_close(alone[0], padded[0])
    histories = [np.array([3, 4]), np.array([1, 2, 3, 4, 5, 6, 7, 8])]
    both = model.next_item_scores(histories)
    torch.testing.assert_close(both, torch.cat([model.next_item_scores([history]) for history in histories]))


def test_it_learns_a_rule_and_is_a_function_of_its_seed() -> None:
    """Every item is followed by the next one of a ring: the target is always predictable."""
    rng = np.random.default_rng(0)
    histories = toy_histories(rng, 300, 30)
    position = np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], np.diff(histories.offsets))
    start = np.repeat(rng.integers(0, 30, 300), np.diff(histories.offsets))
    ring = Histories(
        histories.source_ids,
        histories.offsets,
        ((start + position) % 30).astype(np.int32),
        histories.train_end,
        histories.valid_end,
    )
    data = InMemoryData(30, ring)
    model, result = fit_model(build(SASRecConfig, SMALL), data, device=CPU)
    assert result.best["recall@10"] > 0.95
    again, _ = fit_model(build(SASRecConfig, SMALL), data, device=CPU)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    test = ring.evaluation("test")
    found = SASRecRecommender(model, data, CPU).recommend(test.histories(), k=10, exclude_seen=False).items
    assert (found == test.targets[:, None]).any(axis=1).mean() > 0.9  # by chance: 1 in 3
