from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiger import embedding
from tiger.artifacts import Folder
from tiger.embedding import (
    EncodeTexts,
    TextEncoder,
    adopt_vectors,
    count_vectors,
    cut_by_tokens,
    precision_figures,
    read_vectors,
    sample_vectors,
    unusable,
)
from tiger.errors import ArtifactError, DataError, HealthError, ResourceError
from tiger.precision import Choice


@given(lengths=st.lists(st.integers(1, 300), max_size=200), budget=st.integers(16, 2000))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    array = np.array(lengths, np.int64)
    batches = list(cut_by_tokens(array, budget))
    assert sorted(np.concatenate([*batches, np.zeros(0, int)]).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * array[batch].max() <= budget


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(max_tokens=32, batch_tokens=256, device="cpu", precision="float32")


TEXTS = ["soap", "lavender soap for dry skin. " * 3, " padded ", "</s> [PAD] <b>text</b>", "word " * 500, "é" * 40, ""]


def test_vectors_equal_those_of_sentence_transformers(encoder: TextEncoder) -> None:
    encoded = encoder.encode(TEXTS)
    encoder.model.max_seq_length = 32
    np.testing.assert_allclose(encoded.vectors, encoder.model.encode(TEXTS), atol=1e-5)
    assert encoded.truncated == 1 + int(encoded.tokens[5] > 32)
    assert encoded.tokens[4] == 502  # 500 words and two special tokens, counted before cutting


def test_a_vector_depends_on_its_text_alone(encoder: TextEncoder) -> None:
    together, alone = encoder.encode(TEXTS).vectors, [encoder.encode([text]).vectors[0] for text in TEXTS]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)


def test_the_order_of_the_texts_is_kept_over_many_batches(encoder: TextEncoder) -> None:
    """Batches are cut by length, and their vectors copied to the host at once."""
    texts = [f"{'word ' * (n % 17)}{n}" for n in range(60)]
    batches = cut_by_tokens(np.minimum(encoder.encode(texts).tokens, encoder.max_tokens), encoder.batch_tokens)
    assert len(list(batches)) > 3
    alone = np.stack([encoder.encode([text]).vectors[0] for text in texts])
    np.testing.assert_allclose(encoder.encode(texts).vectors, alone, atol=1e-5)
    with pytest.raises(ValueError, match="no texts"):
        encoder.encode([])


def test_the_caller_chooses_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor without a GPU may see the GPUs of its node."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cpu", torch.device("cpu")):
        worker = EncodeTexts("float32", device=device, max_tokens=16, precision="float32")
        assert worker.encoder.device == torch.device("cpu")
        assert next(worker.encoder.model.parameters()).device.type == "cpu"


TABLE = pa.table({"item_id": pa.array([7, 8], pa.int32()), "text": ["lavender soap", "a brush"]})


def test_auto_takes_the_faster_precision_and_every_shard_records_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def choose(precision: str, device: torch.device, shapes: object) -> Choice:
        asked.append((precision, device, shapes))
        return Choice("bfloat16", 1.83)

    monkeypatch.setattr(embedding, "choose", choose)
    worker = EncodeTexts("float16", device="cpu", max_tokens=16)
    assert next(worker.encoder.model.parameters()).dtype == torch.bfloat16
    ((precision, device, shapes),) = asked
    assert (precision, device) == ("auto", torch.device("cpu"))
    assert (shapes.rows, shapes.width, shapes.hidden, shapes.length, shapes.training) == (2048, 384, 1536, 16, False)
    shard, folder = worker(TABLE), Folder(str(tmp_path))
    folder.write_table("vectors/part-00000.parquet", shard)
    assert folder.read_table("vectors/part-00000.parquet").schema.metadata == {
        b"precision": b"bfloat16",
        b"precision_speedup": b"1.83",
    }
    assert precision_figures(folder) == {"precision": "bfloat16", "precision_speedup": 1.83}


def shard_of(**metadata: str) -> pa.Table:
    return pa.table({"item_id": pa.array([0], pa.int32())}, metadata=metadata or None)


@pytest.mark.parametrize(("shards", "expected"), [
    ([{"precision": "float32"}] * 3, {"precision": "float32"}),
    ([{"precision": "float32", "precision_speedup": "0.5"}] * 2, {"precision": "float32", "precision_speedup": 0.5}),
    ([{"precision": "float32", "precision_speedup": s} for s in ("0.5", "0.6")], {"precision": "float32"}),
    ([{"precision": "float32"}, {"precision": "float32", "precision_speedup": "1.0"}], {"precision": "float32"}),
    ([{"precision": "float32"}, {"precision": "bfloat16", "precision_speedup": "2.0"}, {"precision": "bfloat16"}],
     {"precision": {"bfloat16": 2, "float32": 1}}),
    ([{}, {"precision": "float32"}], {"precision": {"float32": 1, "unknown": 1}}),  # of an earlier version
    ([{}], {"precision": "unknown"}),
])  # fmt: skip
def test_the_manifest_has_the_precision_of_all_shards(
    shards: list[dict[str, str]], expected: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(str(tmp_path))
    for index, metadata in enumerate(shards):
        folder.write_table(f"vectors/part-{index:05d}.parquet", shard_of(**metadata))
    assert precision_figures(folder) == expected
    assert len(caplog.records) == isinstance(expected["precision"], dict)


def test_unusable_vectors() -> None:
    vectors = np.ones((5, 3), np.float32)
    vectors[1], vectors[2, 1], vectors[3, 0] = 0, np.nan, np.inf
    assert unusable(vectors).tolist() == [1, 2, 3]


def test_a_nan_stops_with_the_item_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = EncodeTexts("float32", max_tokens=16)
    whole = worker.encoder.encode

    def with_nan(texts: list[str]) -> object:
        encoded = whole(texts)
        encoded.vectors[1] = np.nan
        return encoded

    monkeypatch.setattr(worker.encoder, "encode", with_nan)
    with pytest.raises(HealthError, match=r"embeddings of 1 items are NaN, infinite or zero, of items \[8\]"):
        worker(pa.table({"item_id": pa.array([7, 8], pa.int32()), "text": ["a", "b"]}))


def test_a_model_that_is_not_there_names_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ResourceError, match=r"cannot be loaded.*embedding.model to a local path or to 'packaged'"):
        TextEncoder(f"{tmp_path}/no-such-model")


def test_vectors_from_elsewhere_are_numbered_by_their_names() -> None:
    table = pa.table({"item_id": ["b", "a"], "vector": [[1.0, 2.0], [3.0, 4.0]]})
    vectors, items = adopt_vectors(table, "x.parquet", "float16")
    assert vectors.to_pylist() == [{"item_id": 0, "vector": [3.0, 4.0]}, {"item_id": 1, "vector": [1.0, 2.0]}]
    assert items.to_pylist() == [{"item_id": 0, "source_id": "a"}, {"item_id": 1, "source_id": "b"}]


BAD_TABLES = {
    "no column vector; found: item_id, emb": {"item_id": [1], "emb": [[1.0]]},
    "1 items stand twice, 'a' among them": {"item_id": ["a", "b", "a"], "vector": [[1.0]] * 3},
    "vectors have 2 different lengths": {"item_id": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]},
    "1 rows without item_id, 0 without vector": {"item_id": ["a", None], "vector": [[1.0], [2.0]]},
    "vectors of 1 items are NaN, infinite or zero, of ['b'] among them": {
        "item_id": ["a", "b"],
        "vector": [[1.0], [0.0]],
    },
}


def test_a_sample_comes_from_all_over_and_doubled_items_are_refused(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for part in range(10):
        items = np.arange(10 * part, 10 * part + 10, dtype=np.int32)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(items, 2).astype(np.float32)), 2)
        folder.write_table(f"vectors/part-{part:05d}.parquet", pa.table({"item_id": items, "vector": vectors}))
    assert count_vectors(folder) == 100
    assert torch.equal(sample_vectors(folder, 100), read_vectors(folder))
    assert sample_vectors(folder, 20)[:, 0].tolist() == list(range(0, 100, 5))
    assert sample_vectors(folder, 4)[:, 0].tolist() == [0, 25, 50, 75]
    folder.write_table("vectors/part-00010.parquet", folder.read_table("vectors/part-00003.parquet"))
    for read in (count_vectors, read_vectors):
        with pytest.raises(ArtifactError, match="missing or doubled"):
            read(folder)


@pytest.mark.parametrize("message", BAD_TABLES)
def test_unusable_vectors_from_elsewhere_are_refused(message: str) -> None:
    with pytest.raises((DataError, HealthError), match=re.escape(f"x.parquet: {message}")):
        adopt_vectors(pa.table(BAD_TABLES[message]), "x.parquet", "float32")
