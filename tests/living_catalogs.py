"""A small shop whose model is trained in this process, and files of items that come later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import tiger.pipeline.semantic_ids
import tiger.pipeline.train
from tests.paths import CONFIGS
from tiger.core.artifacts import Artifact
from tiger.core.config import load
from tiger.pipeline.append import append
from tiger.run import RunConfig
from tiger.training.job import TrainingJob
from tiger.training.loop import Callbacks

GROUPS, PER_GROUP, DIM = 12, 10, 16
"""Items are in groups of similar texts; a customer buys within a group, in the order of the ids."""

TRAINED = list(range(GROUPS * PER_GROUP))
"""Numbers of the items that the model of the shop is trained on."""

Shop = tuple[Path, Artifact]
"""Folder with the runs, and the model."""


def train_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train tokenizers and models without Ray."""

    def train(job: TrainingJob, *_: Any, **__: Any) -> dict[str, Any]:
        return job.run(torch.device("cpu"), Callbacks())

    monkeypatch.setattr(tiger.pipeline.semantic_ids, "train", train)
    monkeypatch.setattr(tiger.pipeline.train, "train", train)


def item(number: int) -> dict[str, Any]:
    """An item of the shop; those of numbers beyond `GROUPS * PER_GROUP` come later, a few to every group."""
    return {
        "sku": f"s{number:04d}",
        "name": f"thing {number}",
        "maker": f"maker {number % GROUPS}",
        "category": f"group {number % GROUPS}",
        "price": 1.0 + number,
    }


def vector(number: int, shift: float = 0.0) -> list[float]:
    """Return the embedding of an item: near the center of its group; with a shift, of another kind of things."""
    center = np.random.default_rng(number % GROUPS).normal(size=DIM)
    noise = 0.3 * np.random.default_rng(1000 + number).normal(size=DIM)
    other = np.random.default_rng(99).normal(size=DIM) if shift else 0.0
    return [float(x) for x in center + noise + shift * np.asarray(other)]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as Parquet."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_vectors(path: Path, numbers: list[int], shift: float = 0.0) -> Path:
    """Write the embeddings of items."""
    return write_table(path, [{"sku": item(number)["sku"], "vector": vector(number, shift)} for number in numbers])


def write_clicks(path: Path, numbers: list[int], users: int = 240, seed: int = 0, prefix: str = "c") -> Path:
    """Write what customers buy: each in one group, seven things in a row."""
    rng = np.random.default_rng(seed)
    groups = [[number for number in numbers if number % GROUPS == group] for group in range(GROUPS)]
    rows = []
    for user in range(users):
        own = groups[user % GROUPS]
        begin = int(rng.integers(len(own)))
        rows += [
            {"customer": f"{prefix}{user}", "sku": item(own[(begin + step) % len(own)])["sku"], "at": 100 * user + step}
            for step in range(7)
        ]
    return write_table(path, rows)


def shop_run(folder: Path, numbers: list[int], *more: str, clicks_seed: int = 0) -> RunConfig:
    """Return the configuration of a shop of given items, whose files are written."""
    folder.mkdir(parents=True, exist_ok=True)
    items = write_table(folder / "items.parquet", [item(number) for number in numbers])
    clicks = write_clicks(folder / "clicks.parquet", numbers, seed=clicks_seed)
    vectors = write_vectors(folder / "vectors.parquet", numbers)
    overrides = [
        "data.kind=tables", f"data.items={json.dumps([str(items)])}", f"data.interactions={json.dumps([str(clicks)])}",
        "data.item_id=sku", "data.user_id=customer", "data.time=at", "data.time_unit=order",
        'catalog.text_fields=["name", "maker"]', "catalog.k_core=0", f"embedding.import_path={vectors}",
        "embedding.vectors_id=sku", "collaborative.rank=8", "tokenizer.codebook_size=32", "tokenizer.num_levels=2",
        "tokenizer.training.epochs=10", "model.d_model=16", "model.num_heads=2", "model.head_dim=8", "model.d_ff=32",
        "model.num_layers=1", "model.training.epochs=6", "model.training.batch_size=64",
        "model.training.warmup_steps=10", "model.training.learning_rate=1e-2", "model.training.precision=float32",
    ]  # fmt: skip
    return load(RunConfig, None, [*overrides, *more], CONFIGS)


def train_shop(run: RunConfig) -> Artifact:
    """Run all stages up to the model."""
    model = tiger.pipeline.train.ensure_model(run)
    assert model.kind == "model"
    return model


def append_to(shop: Shop, rows: list[dict[str, Any]], folder: Path, *more: str, **given: Any) -> Artifact:
    """Append items of a file, with the vectors of those of a number."""
    root, model = shop
    numbers = list(dict.fromkeys(int(row["sku"][1:]) for row in rows if row["sku"] not in given.get("without", ())))
    vectors = write_vectors(folder / "new-vectors.parquet", numbers, given.get("shift", 0.0))
    overrides = [
        f"root={root}/runs", "data.kind=tables", 'data.items=["-"]', 'data.interactions=["-"]', "data.item_id=sku",
        "data.user_id=customer", "data.time=at", "data.time_unit=order", f"embedding.import_path={vectors}",
        "embedding.vectors_id=sku", *more,
    ]  # fmt: skip
    if rows:
        file = write_table(folder / "new-items.parquet", rows)
        overrides.append(f"append.items={json.dumps([str(file)])}")
    return append(load(RunConfig, None, overrides, CONFIGS), model)
