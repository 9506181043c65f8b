"""The model learns what is there and does not learn what is not: one generated world, one knob."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tiger.core.config import build
from tiger.core.precision import Choice
from tiger.core.storage import Folder
from tiger.data.catalog import CatalogConfig, make
from tiger.data.histories import read_histories
from tiger.data.sources import synthetic
from tiger.data.sources.base import RowCounts
from tiger.metrics import ranking as metrics
from tiger.models.base import InMemoryData
from tiger.models.markov_chain import MarkovChain
from tiger.models.popularity import Popularity
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.recommender import TigerRecommender
from tiger.models.train import fit_model
from tiger.semantic_ids.assignment import SemanticIdsConfig, assign
from tiger.tokenizers import rkmeans
from tiger.tokenizers.train import encode_dataset, fit_tokenizer
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


def word_vectors(texts: list[str], dim: int = 64) -> torch.Tensor:
    """Sums of random vectors of words: what texts share is in them, as in embeddings of a text encoder."""
    words = {word: row for row, word in enumerate(sorted({word for text in texts for word in text.split()}))}
    table = np.random.default_rng(1).normal(size=(len(words), dim)).astype(np.float32)
    return torch.from_numpy(np.stack([table[[words[word] for word in text.split()]].sum(axis=0) for text in texts]))


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_recall_against_popularity_and_a_markov_chain(noise: float, tmp_path: Path) -> None:
    """Predictable: above both baselines, outside of the intervals. Pure noise: the interval of popularity overlaps."""
    config = build(synthetic.Config, {"items": 1000, "users": 2000, "noise": noise})
    files, ledger, folder = synthetic.locate(config, tmp_path), RowCounts("rows"), Folder(str(tmp_path))
    raw = synthetic.read_items(config, files, ledger), synthetic.read_interactions(config, files, ledger)
    n_items = make(build(CatalogConfig, {"k_core": 0}), *raw, folder)["items"]
    vectors = word_vectors(folder.read_table("items.parquet", ["title"])["title"].to_pylist())
    quantizer = build(rkmeans.Config, {"kind": "rkmeans", "codebook_size": 16})
    tokenizer, _ = fit_tokenizer(quantizer, vectors, device=torch.device("cpu"))
    codes = encode_dataset(tokenizer, vectors, torch.device("cpu")).numpy()
    ids = assign(codes, 16, SemanticIdsConfig(collision_policy="extra_code"))
    model_config = build(TigerConfig, {"d_model": 32, "training": TRAINING | {"validation_users": 1000}})
    data = InMemoryData(n_items, read_histories(folder), ids, vectors)
    model, _ = fit_model(model_config, data, device=torch.device("cpu"))
    users = data.histories.evaluation("test")
    recommenders = {
        "tiger": TigerRecommender(model, device="cpu"),
        "popularity": Popularity(data),
        "markov_chain": MarkovChain(data),
    }
    intervals = {}
    for name, recommender in recommenders.items():
        items = recommender.recommend(users.histories(), k=50, exclude_seen=False).items
        intervals[name] = metrics.confidence(metrics.target_ranks(items, users.targets))["recall@10"]
    if noise == 0:
        assert intervals["tiger"][0] > max(intervals["popularity"][1], intervals["markov_chain"][1])
    else:
        assert intervals["tiger"][0] <= intervals["popularity"][1]
        assert intervals["popularity"][0] <= intervals["tiger"][1]
