"""Catalogs in shards against the same in memory: k-means, codes, unique IDs; and vectors mapped from a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.factories import toy_histories
from tests.paths import ROOT
from tests.vector_shards import rkmeans_config, write_vectors
from tiger.core import node_cache
from tiger.core.config import build
from tiger.core.errors import ArtifactError, ConfigError, DataError
from tiger.core.external_sort import FolderStore, MemoryStore
from tiger.core.runner import InProcess
from tiger.core.storage import Folder
from tiger.data import histories as histories_module
from tiger.data.histories import Histories, history_table, read_histories, write_histories
from tiger.embedding import collaborative, collaborative_shards
from tiger.embedding.collaborative import CollaborativeConfig, KnownFactors, fit_fusion, write_fused
from tiger.embedding.collaborative_shards import fuse_shards
from tiger.embedding.vectors import load_embeddings, map_embeddings
from tiger.semantic_ids.assignment import SemanticIdsConfig, assign
from tiger.tokenizers import shards
from tiger.tokenizers.base import Tokenizer, TokenizerConfig
from tiger.tokenizers.kmeans import cluster_sums, nearest
from tiger.tokenizers.shards import assign_shards, encode_shards
from tiger.tokenizers.streaming import fit_streamed
from tiger.tokenizers.train import encode_dataset, fit_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def clusters(items: int = 900, dim: int = 12) -> np.ndarray:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(30, dim)).repeat(items // 30, axis=0)
    return (centers + rng.normal(size=(items, dim)) / 2).astype("float32")


# --- k-means ------------------------------------------------------------------------------------------------------


def test_passes_over_shards_equal_passes_in_memory(tmp_path: Path) -> None:
    """The truth: Lloyd's iterations of plain residual k-means, from the same start."""
    array, run = clusters(), InProcess()
    folder = write_vectors(tmp_path, array, 7)
    tokenizer = fit_streamed(rkmeans_config(distance="euclidean", kmeans_sample=256), folder, run)
    one_pass = rkmeans_config(distance="euclidean", kmeans_sample=256, passes_per_level=1, num_levels=1)
    standard = tokenizer.standardize(torch.from_numpy(array))
    codebook = fit_streamed(one_pass, folder, run).codebooks[0]
    for _ in range(2):
        sums, counts = cluster_sums(standard, nearest(standard, codebook)[0], 16)
        codebook = sums / counts[:, None]
    torch.testing.assert_close(tokenizer.codebooks[0], codebook, atol=1e-4, rtol=1e-4)
    encoded = encode_shards(tokenizer, folder, run)
    whole = torch.from_numpy(array)
    assert np.array_equal(encoded.codes, tokenizer.encode(whole).numpy())
    errors = tokenizer.errors(whole, torch.from_numpy(encoded.codes.astype(np.int64)))
    assert encoded.error == pytest.approx(float(errors.mean()) / 12, rel=1e-5)


def test_the_number_of_shards_changes_nothing_but_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = clusters()
    fitted = []
    for parts, rows in ((1, 1 << 17), (6, 1 << 17), (6, 200)):
        monkeypatch.setattr(shards.group_shards, "__defaults__", (rows,))
        fitted.append(
            fit_streamed(rkmeans_config(), write_vectors(tmp_path / f"{parts}-{rows}", array, parts), InProcess())
        )
    for other in fitted[1:]:
        for name, tensor in fitted[0].state_dict().items():
            torch.testing.assert_close(tensor, other.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_what_streaming_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sinkhorn_last_level needs all vectors in memory; set tokenizer.streaming"):
        fit_streamed(rkmeans_config(sinkhorn_last_level=True), write_vectors(tmp_path, clusters(), 2), InProcess())
    with pytest.raises(ConfigError, match=r"codebook_size = 16 is larger than the 10 items"):
        fit_streamed(rkmeans_config(), write_vectors(tmp_path / "few", clusters()[:10], 2), InProcess())


# --- unique IDs ---------------------------------------------------------------------------------------------------


def trained(kind: str, array: np.ndarray, size: int, levels: int) -> Tokenizer:
    training = {"training": {"epochs": 1}} if kind == "rqvae" else {}
    values = {"kind": kind, "codebook_size": size, "num_levels": levels, "kmeans_iterations": 2, **training}
    return fit_tokenizer(TokenizerConfig.resolve(values), torch.from_numpy(array), device=CPU)[0]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    items=st.integers(20, 300),
    parts=st.integers(1, 6),
    levels=st.integers(1, 3),
    policy=st.sampled_from(["nearest_free", "extra_code", "error"]),
    capacity=st.integers(1, 2),
    kind=st.sampled_from(["rkmeans", "opq", "rqvae"]),
    collision_codes=st.sampled_from([2, 32_767]),
)
@example(0, 53, 1, 2, "nearest_free", 1, "opq", 2)  # equal items, whose costs differed in the last bit
@example(0, 46, 1, 2, "nearest_free", 1, "opq", 2)
def test_ids_of_shards_equal_those_in_memory(
    seed: int, items: int, parts: int, levels: int, policy: Any, capacity: int, kind: str, collision_codes: int
) -> None:
    rng = np.random.default_rng(seed)
    array = rng.normal(size=(items, 6)).astype(np.float32)
    array[rng.integers(0, items, items // 4)] = array[0]  # equal items
    tokenizer = trained(kind, array, 8, levels)
    config = SemanticIdsConfig(collision_policy=policy, items_per_id=capacity, collision_codes=collision_codes)
    vectors = torch.from_numpy(array)
    codes = encode_dataset(tokenizer, vectors, CPU).numpy()
    expected: Any
    try:
        expected = assign(codes, 8, config, tokenizer.assignment_costs(vectors))
    except DataError as error:
        expected = str(error)
    with pytest.MonkeyPatch.context() as patch:
        import tempfile

        patch.setattr(shards.group_shards, "__defaults__", (int(rng.integers(1, 200)),))
        patch.setattr(shards, "_RANGE_ROWS", int(rng.integers(1, 100)))
        patch.setattr(shards, "_GROUP_ROWS", int(rng.integers(1, 30)))
        with tempfile.TemporaryDirectory() as path:
            store = FolderStore(Folder(f"{path}/scratch")) if seed % 2 else MemoryStore()
            folder = write_vectors(Path(path), array, parts, rng.permutation(items))
            encoded = encode_shards(tokenizer, folder, InProcess(), store, policy == "nearest_free")
            assert np.array_equal(encoded.codes, codes)
            try:
                assigned = assign_shards(tokenizer, encoded, config, InProcess(), store)
            except DataError as error:
                assert str(error) == expected
                return
    assert np.array_equal(assigned.ids.codes, expected.codes)
    assert assigned.ids.level_sizes == expected.level_sizes
    assert assigned.moved == (expected.codes[:, :levels] != codes).any(axis=1).sum()
    own = torch.from_numpy(assigned.ids.codes[:, :levels].astype(np.int64))
    assert assigned.error == pytest.approx(
        float(tokenizer.errors(vectors, own).double().mean()) / 6, rel=1e-5, abs=1e-9
    )


# --- mapped vectors -----------------------------------------------------------------------------------------------


def test_mapped_vectors_equal_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(node_cache, "_held", {})
    array = clusters()
    folder = write_vectors(tmp_path / "vectors", array, 5, np.random.default_rng(0).permutation(900))
    truth = load_embeddings(folder)
    monkeypatch.setattr(node_cache, "MAPPED_BYTES", 0)
    mapped = map_embeddings(folder)
    assert torch.equal(mapped, truth)
    (home,) = tmp_path.glob("tiger-mapped-*")
    script = [sys.executable, "-m", "tests.scripts.map_vectors", folder.uri]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    said = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == [float(truth.double().sum()), False]  # no process writes them again
    assert len(list(home.glob("*.lock"))) == 1  # in use here
    node_cache._release()
    assert not list(home.iterdir())
    folder.write_table("vectors/part-00009.parquet", folder.read_table("vectors/part-00003.parquet"))
    with pytest.raises(ArtifactError, match="missing or duplicated"):
        map_embeddings(folder)


def test_a_tokenizer_of_mapped_vectors_equals_one_of_vectors_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = clusters()
    folder = write_vectors(tmp_path, array, 3)
    config = TokenizerConfig.resolve({"codebook_size": 16, "training": {"epochs": 2, "validate_every_epochs": 1.0}})
    monkeypatch.setattr(node_cache, "MAPPED_BYTES", 0)
    results = [
        fit_tokenizer(config, vectors, device=CPU) for vectors in (load_embeddings(folder), map_embeddings(folder))
    ]
    (one, of_one), (other, of_other) = results
    assert of_one.log == of_other.log
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


# --- mapped histories ---------------------------------------------------------------------------------------------


def test_mapped_histories_equal_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histories_module, "GROUP_USERS", 7)
    truth = toy_histories(np.random.default_rng(0), 60, 40)
    folder = Folder(str(tmp_path))
    times = np.arange(len(truth.items))
    write_histories(folder, [history_table(truth, times)])
    monkeypatch.setattr(node_cache, "MAPPED_BYTES", 0)
    mapped = read_histories(folder)
    assert isinstance(mapped.items, np.memmap)
    assert list(mapped.source_ids) == list(truth.source_ids)
    for name in ("offsets", "items", "train_end", "valid_end"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(truth, name))
    blocks = list(mapped.blocks(50))
    assert len(blocks) > 5
    assert [block.source_ids[0] for block in blocks[:2]] == [truth.source_ids[0], truth.source_ids[len(blocks[0])]]
    monkeypatch.setattr(Histories.blocks, "__defaults__", (50,))
    np.testing.assert_array_equal(
        mapped.training_counts(40), np.bincount(truth.items[truth._in_training()], minlength=40)
    )
    expected = np.bincount(truth.training_targets(), minlength=40)
    np.testing.assert_array_equal(mapped.training_target_counts(40), expected)


# --- co-occurrence ------------------------------------------------------------------------------------------------


def exact_svd(matrix: Any, rank: int, **_: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    left, values, right = np.linalg.svd(matrix.toarray().astype(np.float64))
    return left[:, :rank], values[:rank], right[:rank]


def test_item_vectors_of_shards_equal_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth is a whole decomposition; vectors are compared by their products, because factors have no sign."""
    rng = np.random.default_rng(0)
    items, dim = 90, 10
    lengths, starts = rng.integers(3, 20, 300), rng.integers(0, items, 300)
    walks = [(start + rng.integers(0, 9, n)) % (items - 5) for start, n in zip(starts, lengths, strict=True)]
    own, offsets = np.concatenate(walks).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)])
    histories = Histories([f"u{n}" for n in range(300)], offsets, own, offsets[1:] - 2, offsets[1:] - 1)
    catalog = Folder(str(tmp_path / "catalog"))
    write_histories(catalog, [history_table(histories, np.arange(len(own)))])
    text = rng.normal(size=(items, dim)).astype(np.float32)
    embeddings = write_vectors(tmp_path / "text", text, 4, rng.permutation(items))
    config = build(CollaborativeConfig, {"rank": 12})
    monkeypatch.setattr(collaborative, "randomized_svd", exact_svd)
    fusion = fit_fusion(config, embeddings, histories)
    one = Folder(str(tmp_path / "one"))
    write_fused(fusion, embeddings, one)
    truth = load_embeddings(one).numpy()
    before = fusion.cooccurrence @ np.linalg.qr(rng.normal(size=(12, 12)))[0].astype(np.float32)
    write_fused(fit_fusion(config, embeddings, histories, KnownFactors(np.arange(40), before[:40])), embeddings, one)
    aligned = load_embeddings(one).numpy()
    monkeypatch.setattr(collaborative_shards, "_ITERATIONS", 60)
    for number, (block, entries) in enumerate(((1 << 20, 1 << 24), (100, 300), (700, 100))):
        monkeypatch.setattr(Histories.blocks, "__defaults__", (block,))
        sizes = {"_BLOCK_EVENTS": block, "_RANGE_ENTRIES": entries, "_GROUP_ENTRIES": 50, "_SHARDS": 3}
        for name, value in sizes.items():
            monkeypatch.setattr(collaborative_shards, name, value)
        target = Folder(str(tmp_path / f"other-{number}"))
        store = FolderStore(Folder(str(tmp_path / f"scratch-{number}")))
        other, num_known = fuse_shards(config, embeddings, catalog, target, InProcess(), store)
        assert num_known == int(fusion.cooccurrence.any(axis=1).sum()) <= items - 5
        np.testing.assert_allclose(other.text_mean, fusion.text_mean, atol=1e-6)
        np.testing.assert_array_equal(other.rotation, fusion.rotation)
        found = load_embeddings(target).numpy()
        np.testing.assert_allclose(found @ found.T, truth @ truth.T, atol=1e-4)
        fuse_shards(config, embeddings, catalog, target, InProcess(), store, KnownFactors(np.arange(40), before[:40]))
        np.testing.assert_allclose(load_embeddings(target).numpy(), aligned, atol=1e-4)
