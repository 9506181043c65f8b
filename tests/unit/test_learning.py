"""The model learns what is there and does not learn what is not: one generated world, one knob."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.factories import random_ids
from tiger.core.config import build
from tiger.core.precision import Choice
from tiger.core.storage import Folder
from tiger.data.catalog import CatalogConfig, make
from tiger.data.histories import read_histories
from tiger.data.sources import synthetic
from tiger.data.sources.base import RowCounts
from tiger.metrics import ranking as metrics
from tiger.models.base import InMemoryData
from tiger.models.popularity import Popularity
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.recommender import TigerRecommender
from tiger.models.train import fit_model
from tiger.training.loop import FitResult
from tiger.training.weights import save_training_result

TRAINING = {"epochs": 8, "batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 50, "validate_every_epochs": 4}


@pytest.mark.parametrize(("choice", "recorded"), [
    (Choice("float32"), {"precision": "float32"}),
    (Choice("bfloat16", 1.83), {"precision": "bfloat16", "precision_speedup": 1.83}),
])  # fmt: skip
def test_figures_of_a_training_record_its_precision(
    choice: Choice, recorded: dict[str, object], tmp_path: Path
) -> None:
    result = FitResult({"ndcg@10": 0.1}, 20, 30, False, [{"step": 0, "ndcg@10": 0.1}], choice)
    figures = save_training_result(torch.nn.Linear(2, 2), result, Folder(str(tmp_path)))
    assert figures == {"ndcg@10": 0.1, "best_step": 20, "steps": 30, "stopped_early": False} | recorded


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_recall_against_popularity(noise: float, tmp_path: Path) -> None:
    """Predictable: at least three times popularity's Recall@10. Pure noise: 95 % intervals overlap."""
    config = build(synthetic.Config, {"items": 300, "users": 1000, "noise": noise})
    files, ledger, folder = synthetic.locate(config, tmp_path), RowCounts("rows"), Folder(str(tmp_path))
    raw = synthetic.read_items(config, files, ledger), synthetic.read_interactions(config, files, ledger)
    n_items = make(CatalogConfig(), *raw, folder)["items"]
    histories = read_histories(folder)
    ids = random_ids(np.random.default_rng(0), n_items, (32, 32, 2))
    model_config = build(TigerConfig, {"d_model": 32, "training": TRAINING | {"validation_users": 1000}})
    vectors = torch.from_numpy(np.random.default_rng(1).normal(size=(n_items, 8)).astype(np.float32))
    data = InMemoryData(n_items, histories, ids, vectors)
    model, _ = fit_model(model_config, data, device=torch.device("cpu"))
    users = histories.evaluation("test")
    found = TigerRecommender(model, device="cpu").recommend(users.histories(), k=50, exclude_seen=False).items
    popular = Popularity(data).recommend(users.histories(), k=50, exclude_seen=False).items
    ranks, other = (metrics.target_ranks(items, users.targets) for items in (found, popular))
    if noise == 0:
        assert metrics.ranking(ranks)["recall@10"] > 3 * metrics.ranking(other)["recall@10"]
    else:
        low, high = metrics.confidence(ranks)["recall@10"]
        other_low, other_high = metrics.confidence(other)["recall@10"]
        assert low <= other_high
        assert other_low <= high
