"""Small data that the code of large catalogs works on: a shop as raw files, and IDs of vectors in shards."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tests.vector_shards import rkmeans_config, write_vectors
from tiger.core.config import build
from tiger.core.external_sort import FolderStore
from tiger.core.runner import Runner
from tiger.core.storage import Folder
from tiger.evaluation.shard import EvaluateShard
from tiger.pipeline.evaluate import evaluate
from tiger.pipeline.prepare import prepare
from tiger.pipeline.train import train_model
from tiger.run import RunConfig
from tiger.semantic_ids.assignment import SemanticIds, SemanticIdsConfig, assign
from tiger.tokenizers.base import Tokenizer
from tiger.tokenizers.shards import assign_shards, encode_shards
from tiger.tokenizers.train import fit_tokenizer

POLICY = SemanticIdsConfig(collision_policy="nearest_free", collision_codes=32_767)


def shop(folder: Path, megabytes: int) -> dict[str, Any]:
    """Write 60,000 interactions and 2,000 items; return the configuration that prepares them below `folder`."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    items, events = folder / "items.csv", folder / "events.csv"
    if not events.exists():
        items.write_text("item_id,title\n" + "".join(f"i{n},title of {n * n}\n" for n in range(2_000)))
        columns = rng.integers(0, [5_000, 2_000, 90_000], (60_000, 3)).tolist()
        lines = (f"u{user},i{item},{1_500_000_000 + time}\n" for user, item, time in columns)
        events.write_text("user_id,item_id,timestamp\n" + "".join(lines))
    return {
        "root": str(folder / "runs" if megabytes == 0 else folder / "truth"),
        "data": {"kind": "tables", "items": [str(items)], "interactions": [str(events)]},
        "catalog": {"text_fields": ["title"], "k_core": 5},
        "scale": {"in_process_megabytes": megabytes},
    }


class SlowEvaluation(EvaluateShard):
    """Ranks after a rest."""

    def __call__(self, part: pa.Table) -> dict[str, pa.Table | bytes]:
        time.sleep(0.2)
        return super().__call__(part)


def evaluate_shop(folder: Path) -> dict[str, Any]:
    """Return evaluation.json of two families without training on the shop, in shards of 200 users, in `folder/runs`."""
    values = shop(folder, megabytes=512) | {
        "root": str(folder / "runs"),
        "model": {"kind": "markov_chain"},
        "evaluation": {"baselines": ["popularity"]},
        "decoding": {"resources": {"min_workers": 3, "max_workers": 3}},
    }
    run = build(RunConfig, values)
    found: dict[str, Any] = evaluate(run, train_model(run, prepare(run))).folder.read_json("evaluation.json")
    return found


def _vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6_000, 16)).astype(np.float32)


def _tokenizer() -> Tokenizer:
    config = rkmeans_config(streaming=False, codebook_size=16, kmeans_iterations=3)
    return fit_tokenizer(config, torch.from_numpy(_vectors()), device=torch.device("cpu"))[0]


def ids_of_shards(folder: Path, runner: Runner) -> list[list[int]]:
    """Return the IDs of 6,000 vectors in 60 shards."""
    vectors = write_vectors(folder / "vectors", _vectors(), 60)
    store, tokenizer = FolderStore(Folder(str(folder / "scratch"))), _tokenizer()
    encoded = encode_shards(tokenizer, vectors, runner, store, with_vectors=True)
    ids = assign_shards(tokenizer, encoded, POLICY, runner, store).ids
    codes: list[list[int]] = ids.codes.tolist()
    return codes


def ids_in_memory() -> SemanticIds:
    """Return the IDs of the same vectors, all of them in memory."""
    vectors, tokenizer = torch.from_numpy(_vectors()), _tokenizer()
    return assign(tokenizer.encode(vectors).numpy(), 16, POLICY, tokenizer.assignment_costs(vectors))
