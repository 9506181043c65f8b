"""Residual k-means over a Ray Dataset against the same in memory, and embeddings from anywhere to semantic IDs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tiger.core.config import build
from tiger.core.errors import ConfigError
from tiger.core.storage import Folder
from tiger.on_ray import kmeans as quantize
from tiger.pipeline.item_vectors import ensure_item_vectors
from tiger.pipeline.semantic_ids import build_semantic_ids
from tiger.run import RunConfig
from tiger.semantic_ids.assignment import SemanticIds
from tiger.tokenizers.base import TokenizerConfig
from tiger.tokenizers.kmeans import cluster_sums, nearest
from tiger.tokenizers.rkmeans import Config

pytestmark = pytest.mark.usefixtures("local_ray")


def vectors(items: int = 900, dim: int = 12) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(30, dim)).repeat(items // 30, axis=0) + rng.normal(size=(items, dim)) / 2).astype(
        "float32"
    )


def embeddings(root: Path, array: np.ndarray, parts: int) -> Folder:
    folder, items = Folder(str(root)), np.arange(len(array), dtype=np.int32)
    for part, rows in enumerate(np.array_split(items, parts)):
        lists = pa.FixedSizeListArray.from_arrays(pa.array(array[rows].ravel()), array.shape[1])
        folder.write_table(f"vectors/part-{part:05d}.parquet", pa.table({"item_id": rows, "vector": lists}))
    return folder


def config(**changes: object) -> Config:
    found = TokenizerConfig.resolve(
        {"kind": "rkmeans", "codebook_size": 16, "streaming": True, "passes_per_level": 3, **changes}
    )
    assert isinstance(found, Config)
    return found


def test_passes_over_parts_equal_passes_in_memory(tmp_path: Path) -> None:
    """The truth: Lloyd's iterations of plain residual k-means, from the same start."""
    array = vectors()
    settings = config(distance="euclidean", kmeans_sample=256)
    tokenizer = quantize.fit(settings, embeddings(tmp_path, array, 7))
    start = quantize.fit(
        config(distance="euclidean", kmeans_sample=256, passes_per_level=1, num_levels=1),
        embeddings(tmp_path, array, 7),
    )
    standard = tokenizer.standardize(torch.from_numpy(array))
    codebook = start.codebooks[0]  # one pass made
    for _ in range(2):
        sums, counts = cluster_sums(standard, nearest(standard, codebook)[0], 16)
        codebook = sums / counts[:, None]
    torch.testing.assert_close(tokenizer.codebooks[0], codebook, atol=1e-4, rtol=1e-4)
    codes, error = quantize.encode(tokenizer, embeddings(tmp_path, array, 7))
    whole = torch.from_numpy(array)
    assert np.array_equal(codes, tokenizer.encode(whole).numpy())
    assert error == pytest.approx(float(tokenizer.errors(whole, torch.from_numpy(codes)).mean()) / 12, rel=1e-5)


@pytest.mark.slow
def test_the_number_of_parts_changes_nothing(tmp_path: Path) -> None:
    array = vectors()
    few, many = (quantize.fit(config(), embeddings(tmp_path / str(parts), array, parts)) for parts in (1, 6))
    for name, tensor in few.state_dict().items():
        torch.testing.assert_close(tensor, many.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_what_streaming_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sinkhorn_last_level needs all vectors in memory; set tokenizer.streaming"):
        quantize.fit(config(sinkhorn_last_level=True), embeddings(tmp_path, vectors(), 2))
    with pytest.raises(ConfigError, match=r"codebook_size = 16 is larger than the 10 items"):
        quantize.fit(config(), embeddings(tmp_path / "few", vectors()[:10], 2))


@pytest.mark.parametrize("streamed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_embeddings_from_anywhere_become_semantic_ids(streamed: bool, tmp_path: Path) -> None:
    """No catalog and no text: ids as text, vectors as lists, rows in any order."""
    array, path = vectors(), tmp_path / "mine.parquet"
    names = [f"sku-{n:04d}" for n in np.random.default_rng(1).permutation(900)]
    pq.write_table(pa.table({"item_id": names, "vector": array.tolist()}), path)
    tokenizer = {"kind": "rkmeans", "codebook_size": 32, "streaming": streamed, "passes_per_level": 1}
    run = build(
        RunConfig,
        {"root": str(tmp_path / "runs"), "embedding": {"import_path": str(path)}, "tokenizer": tokenizer}
        | {"semantic_ids": {"collision_policy": "extra_code" if streamed else "nearest_free"}},
    )
    artifact = build_semantic_ids(run, ensure_item_vectors(run))
    table = artifact.folder.read_table("ids.parquet")
    assert table["source_id"].to_pylist() == sorted(names)
    ids = SemanticIds.read(artifact.folder)
    assert len(np.unique(ids.codes, axis=0)) == 900
    assert artifact.metrics["codes_per_item"] == (4 if streamed else 3)
    assert artifact.metrics["usage@1"] == 1
    # Items of one cluster share their first code far more often than any two items do.
    order = np.argsort(names)
    first = ids.codes[np.argsort(order), 0].reshape(30, 30)
    assert np.mean([np.bincount(row).max() for row in first]) > 15
