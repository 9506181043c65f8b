"""Tasks on Ray against the same in one process, and embeddings from anywhere to semantic IDs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.vector_shards import rkmeans_config, write_vectors
from tiger.core.config import build
from tiger.core.runner import InProcess
from tiger.on_ray.tasks import RayTasks
from tiger.pipeline.item_vectors import ensure_item_vectors
from tiger.pipeline.semantic_ids import build_semantic_ids
from tiger.run import RunConfig
from tiger.semantic_ids.assignment import SemanticIds
from tiger.tokenizers import shards
from tiger.tokenizers.streaming import fit_streamed

pytestmark = pytest.mark.usefixtures("local_ray")


def vectors(items: int = 900, dim: int = 12) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(30, dim)).repeat(items // 30, axis=0) + rng.normal(size=(items, dim)) / 2).astype(
        "float32"
    )


def test_tasks_on_ray_fit_the_tokenizer_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.group_shards, "__defaults__", (200,))
    folder = write_vectors(tmp_path, vectors(), 7)
    one, other = (fit_streamed(rkmeans_config(), folder, runner) for runner in (InProcess(), RayTasks(folder)))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


@pytest.mark.parametrize(("streamed", "megabytes"), [
    (True, 512), (False, 0), pytest.param(False, 512, marks=pytest.mark.slow),
])  # fmt: skip
def test_embeddings_from_anywhere_become_semantic_ids(streamed: bool, megabytes: int, tmp_path: Path) -> None:
    """No catalog and no text: ids as text, vectors as lists, rows in any order."""
    array, path = vectors(), tmp_path / "mine.parquet"
    names = [f"sku-{n:04d}" for n in np.random.default_rng(1).permutation(900)]
    pq.write_table(pa.table({"item_id": names, "vector": array.tolist()}), path)
    tokenizer = {"kind": "rkmeans", "codebook_size": 32, "streaming": streamed, "passes_per_level": 1}
    values = {
        "root": str(tmp_path / "runs"),
        "embedding": {"import_path": str(path)},
        "tokenizer": tokenizer,
        "semantic_ids": {"collision_policy": "nearest_free"},
        "scale": {"in_process_megabytes": megabytes},
    }
    run = build(RunConfig, values)
    artifact = build_semantic_ids(run, ensure_item_vectors(run))
    table = artifact.folder.read_table("ids.parquet")
    assert table["source_id"].to_pylist() == sorted(names)
    ids = SemanticIds.read(artifact.folder)
    assert len(np.unique(ids.codes, axis=0)) == 900
    assert artifact.metrics["codes_per_item"] == 3
    assert artifact.metrics["usage@1"] == 1
    # Items of one cluster share their first code far more often than any two items do.
    order = np.argsort(names)
    first = ids.codes[np.argsort(order), 0].reshape(30, 30)
    assert np.mean([np.bincount(row).max() for row in first]) > 15
    if not streamed:  # the same IDs, whether this process makes them or tasks do
        other = build(RunConfig, values | {"root": str(tmp_path / "other"), "scale": {"in_process_megabytes": 512}})
        again = build_semantic_ids(other, ensure_item_vectors(other))
        assert again.manifest["files"] == artifact.manifest["files"]


def test_one_more_code_for_many_prefixes_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tiger.pipeline.semantic_ids._MANY", 500)
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"item_id": [f"{n:04d}" for n in range(900)], "vector": vectors().tolist()}), path)
    values = {"root": str(tmp_path / "runs"), "embedding": {"import_path": str(path)}}
    for policy, is_told in (("nearest_free", False), ("extra_code", True)):
        own = {"tokenizer": {"kind": "rkmeans", "codebook_size": 32}, "semantic_ids": {"collision_policy": policy}}
        run = build(RunConfig, values | own)
        caplog.clear()
        artifact = build_semantic_ids(run, ensure_item_vectors(run))
        assert ("items share their codes" in caplog.text) == is_told, artifact.metrics
