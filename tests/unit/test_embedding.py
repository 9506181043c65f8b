from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiger.pipeline.embed
import tiger.pipeline.item_vectors
import tiger.pipeline.prepare
from tiger.core.config import build
from tiger.core.errors import ArtifactError, DataError, HealthError, ResourceError
from tiger.core.precision import Choice
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog
from tiger.data.sources.base import RawFile
from tiger.embedding import encoder as embedding
from tiger.embedding import external
from tiger.embedding.encoder import EmbeddingConfig, EmbedShard, TextEncoder, batch_by_tokens
from tiger.embedding.external import VectorJoin, own_item_ids
from tiger.embedding.vectors import count_embeddings, load_embeddings, precision_figures, sample_embeddings, unusable
from tiger.on_ray import map as ray_map
from tiger.on_ray.map import plan_shards
from tiger.run import RunConfig


@given(lengths=st.lists(st.integers(1, 300), max_size=200), budget=st.integers(16, 2000))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    array = np.array(lengths, np.int64)
    batches = list(batch_by_tokens(array, budget))
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
    batches = batch_by_tokens(np.minimum(encoder.encode(texts).tokens, encoder.max_tokens), encoder.batch_tokens)
    assert len(list(batches)) > 3
    alone = np.stack([encoder.encode([text]).vectors[0] for text in texts])
    np.testing.assert_allclose(encoder.encode(texts).vectors, alone, atol=1e-5)
    with pytest.raises(ValueError, match="no texts"):
        encoder.encode([])


def test_the_caller_chooses_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor without a GPU may see the GPUs of its node."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cpu", torch.device("cpu")):
        worker = EmbedShard("float32", device=device, max_tokens=16, precision="float32")
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
    worker = EmbedShard("float16", device="cpu", max_tokens=16)
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
    worker = EmbedShard("float32", max_tokens=16)
    whole = worker.encoder.encode

    def with_nan(texts: list[str]) -> object:
        encoded = whole(texts)
        encoded.vectors[1] = np.nan
        return encoded

    monkeypatch.setattr(worker.encoder, "encode", with_nan)
    with pytest.raises(
        HealthError, match=r"embeddings of 1 items are NaN, infinite or zero, for example of items \[8\]"
    ):
        worker(pa.table({"item_id": pa.array([7, 8], pa.int32()), "text": ["a", "b"]}))


def test_a_model_that_is_not_there_names_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ResourceError, match=r"cannot be loaded.*embedding.model to a local path or to 'bundled'"):
        TextEncoder(f"{tmp_path}/no-such-model")


def test_a_sample_comes_from_all_over_and_doubled_items_are_refused(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for part in range(10):
        items = np.arange(10 * part, 10 * part + 10, dtype=np.int32)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(items, 2).astype(np.float32)), 2)
        folder.write_table(f"vectors/part-{part:05d}.parquet", pa.table({"item_id": items, "vector": vectors}))
    assert count_embeddings(folder) == 100
    assert torch.equal(sample_embeddings(folder, 100), load_embeddings(folder))
    assert sample_embeddings(folder, 20)[:, 0].tolist() == list(range(0, 100, 5))
    assert sample_embeddings(folder, 4)[:, 0].tolist() == [0, 25, 50, 75]
    folder.write_table("vectors/part-00010.parquet", folder.read_table("vectors/part-00003.parquet"))
    for read in (count_embeddings, load_embeddings):
        with pytest.raises(ArtifactError, match="missing or duplicated"):
            read(folder)


# --- own vectors --------------------------------------------------------------------------------------------------


def own(folder: Path, *tables: dict[str, object], items: list[str] | None = None, **config: str) -> list[dict]:
    """Join tables, a file each, to `items`, or to the items that they name: rows in the order of the item ids."""
    files = []
    for number, table in enumerate(tables):
        pq.write_table(pa.table(table), folder / f"{number}.parquet")
        files.append(RawFile.local(folder / f"{number}.parquet"))
    settings = build(EmbeddingConfig, config)
    join = VectorJoin(own_item_ids(files, settings) if items is None else items, settings)
    rows = pa.concat_tables(join.tables(files)).to_pylist()
    return sorted(rows, key=lambda row: row["item_id"])


def test_own_vectors_are_joined_by_source_id_over_files_batches_and_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(external, "_JOINED_ROWS", 2)
    first = {"sku": pa.array([17.0, 3.0]), "image": pa.array([[1, 2], [3, 4]], pa.large_list(pa.int64())), "x": [1, 2]}
    second = {"sku": [" 5 ", "017", "9", "17.0x"], "image": pa.array([[5.0, 6.0]] * 4, pa.list_(pa.float16(), 2))}
    rows = own(tmp_path, first, second, items=["017", "17", "3", "5"], vectors_id="sku", vectors_column="image")
    assert [row["vector"] for row in rows] == [[5.0, 6.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert [row["item_id"] for row in rows] == [0, 1, 2, 3]
    assert "left out 2 vectors of items that are not in the catalog, such as '9'" in caplog.text


@pytest.mark.parametrize("ids", [
    pa.array([20, 3], pa.int32()), pa.array([20.0, 3.0]), pa.array(["20", "3"], pa.large_string()),
    pa.array(["20.0", "3"]), pa.array(["20", "3"]).dictionary_encode(), pa.array([20, 3], pa.decimal128(4, 1)),
])  # fmt: skip
def test_an_own_id_of_any_type_is_the_same_text(ids: pa.Array, tmp_path: Path) -> None:
    table = {"item_id": ids, "vector": [[1.0], [2.0]]}
    assert [row["vector"] for row in own(tmp_path, table, items=["20", "3"])] == [[1.0], [2.0]]
    assert [row["vector"] for row in own(tmp_path, table)] == [[1.0], [2.0]]


def test_vectors_without_a_catalog_are_numbered_by_their_ids(tmp_path: Path) -> None:
    table = {"item_id": ["b", "a"], "vector": [[1.0, 2.0], [3.0, 4.0]]}
    rows = own(tmp_path, table, storage_dtype="float16")
    assert rows == [{"item_id": 0, "vector": [3.0, 4.0]}, {"item_id": 1, "vector": [1.0, 2.0]}]


MANY = [f"i{n:02d}" for n in range(14)]
BAD_JOINS: dict[str, tuple[dict[str, object], type[Exception]]] = {
    "0.parquet: no column vector; columns found: item_id, emb. Set embedding.vectors_column": (
        {"item_id": MANY, "emb": [[1.0]] * 14}, DataError),
    "0.parquet: no column item_id; columns found: sku, vector. Set embedding.vectors_id": (
        {"sku": MANY, "vector": [[1.0]] * 14}, DataError),
    "0.parquet: 12 of 14 items of the catalog have no vector: i02, i03, i04, i05, i06, i07, i08, i09, i10, i11 and 2 "
    "more; ids in the file that are not in the catalog: 1, such as 'x'. Check embedding.vectors_id": (
        {"item_id": ["i00", "x", "i01"], "vector": [[1.0]] * 3}, DataError),
    "0.parquet: 2 duplicate items: i01, i00; keep one": (
        {"item_id": [*MANY, "i01", "i00"], "vector": [[1.0]] * 16}, DataError),
    "0.parquet: a vector has 2 dimensions, the previous ones (from": (
        {"item_id": MANY, "vector": [[1.0]] * 13 + [[1.0, 2.0]]}, DataError),
    "0.parquet: 1 rows without item_id": ({"item_id": [*MANY, None], "vector": [[1.0]] * 15}, DataError),
    "0.parquet: 1 rows without vector, for items i13": ({"item_id": MANY, "vector": [[1.0]] * 13 + [None]}, DataError),
    "0.parquet: vectors of 2 items are NaN, infinite or zero: i12, i13": (
        {"item_id": MANY, "vector": [[1.0]] * 12 + [[float("nan")], [0.0]]}, HealthError),
    "0.parquet: column item_id has type list": ({"item_id": [[1]] * 14, "vector": [[1.0]] * 14}, DataError),
    "0.parquet: column vector has type list": ({"item_id": MANY, "vector": [["a"]] * 14}, DataError),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_JOINS)
def test_own_vectors_that_do_not_fit_the_catalog_are_named(message: str, tmp_path: Path) -> None:
    table, kind = BAD_JOINS[message]
    with pytest.raises(kind, match=re.escape(message)):
        own(tmp_path, table, items=MANY)


def test_a_second_vector_in_another_file_and_an_overflow_are_named(tmp_path: Path) -> None:
    one = {"item_id": ["a"], "vector": [[1.0]]}
    with pytest.raises(DataError, match=r"1\.parquet: 1 duplicate items: a, a also in .*0\.parquet"):
        own(tmp_path, one, one, items=["a"])
    with pytest.raises(HealthError, match="cannot be stored as float16: a: .*embedding.storage_dtype = float32"):
        own(tmp_path, {"item_id": ["a"], "vector": [[1e6]]}, storage_dtype="float16")
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="bad.parquet: not a readable Parquet file .*correct embedding.import_path"):
        own_item_ids([RawFile.local(tmp_path / "bad.parquet")], EmbeddingConfig())


def test_vectors_of_unknown_items_may_be_anything(tmp_path: Path) -> None:
    table = {"item_id": ["a", "x", "x", "y"], "vector": [[1.0], [0.0], None, [1.0, 2.0]]}
    assert own(tmp_path, table, items=["a"]) == [{"item_id": 0, "vector": [1.0]}]


def shop(folder: Path, vectors: int = 20, **embedding: str) -> RunConfig:
    """Own items, histories and vectors, in two files of a folder: every item but the last one has a vector."""
    rng = np.random.default_rng(0)
    ids = [f"{n:03d}" for n in range(20)]
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"{each},Soap {each}\n" for each in ids))
    events = (f"u{user},{ids[item]},{1_500_000_000 + place}\n"
              for user in range(30) for place, item in enumerate(rng.permutation(20)[:8]))  # fmt: skip
    (folder / "events.csv").write_text("user_id,item_id,timestamp\n" + "".join(events))
    (folder / "vectors").mkdir()
    table = pa.table({"item_id": ids[:vectors][::-1], "vector": rng.normal(size=(vectors, 16)).tolist()})
    for number, part in enumerate((table[:8], table[8:])):
        pq.write_table(part, folder / f"vectors/{number}.parquet")
    values = {
        "root": str(folder / "runs"), "embedding": {"import_path": str(folder / "vectors")},
        "data": {"kind": "tables", "items": str(folder / "items.csv"), "interactions": str(folder / "events.csv")},
        "catalog": {"text_fields": ["title"], "k_core": 0},
    }  # fmt: skip
    return build(RunConfig, values)


def test_own_vectors_and_own_histories_are_one_catalog(tmp_path: Path) -> None:
    run = shop(tmp_path)
    catalog = tiger.pipeline.prepare.prepare(run)
    made = tiger.pipeline.embed.embed(run, catalog)
    assert (made.metrics["items"], made.metrics["dimension"]) == (20, 16)
    assert made.folder.read_bytes("items.parquet") == catalog.folder.read_bytes("items.parquet")
    given = pa.concat_tables([pq.read_table(tmp_path / f"vectors/{n}.parquet") for n in (0, 1)]).to_pylist()
    vector_of = {row["item_id"]: row["vector"] for row in given}
    expected = np.array([vector_of[name] for name in Catalog(catalog).source_ids], np.float32)
    np.testing.assert_array_equal(load_embeddings(made.folder).numpy(), expected)
    vectors = tiger.pipeline.item_vectors.ensure_item_vectors(run)  # what jobs.semantic_ids and jobs.tune read
    assert vectors.inputs["embeddings"].fingerprint == made.fingerprint
    alone = build(RunConfig, {"root": run.root, "embedding": {"import_path": str(tmp_path / "vectors")}})
    adopted = tiger.pipeline.item_vectors.ensure_item_vectors(alone)
    assert adopted.fingerprint != made.fingerprint
    assert adopted.folder.read_table("items.parquet")["source_id"].to_pylist() == sorted(vector_of)


@pytest.mark.parametrize("job", ["embed", "train", "evaluate", "serve"])
def test_every_job_refuses_vectors_that_are_not_there_before_its_first_stage(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", [job, "embedding.import_path=/no/such/file.parquet", f"root={tmp_path}/runs"])
    monkeypatch.delitem(sys.modules, f"jobs.{job}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"jobs.{job}", run_name="__main__")
    assert ended.value.code == 3
    assert "/no/such/file.parquet does not exist; correct embedding.import_path" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/catalog-*"))


# --- shards -------------------------------------------------------------------------------------------------------


def test_small_row_groups_are_joined_in_large_tables_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes of text and by rows, whatever machine plans them; every row group is in one shard, in order."""
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 200)))) for _ in range(600)]
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": range(600), "text": texts}), path, row_group_size=3)
    metadata = pq.read_metadata(path)
    single = [[group] for group in range(200)]
    assert plan_shards(metadata) == plan_shards(metadata, "text") == single
    monkeypatch.setattr(ray_map, "_SHARDS", 20)
    assert plan_shards(metadata) == single
    joined = plan_shards(metadata, "text")
    assert [group for shard in joined for group in shard] == list(range(200))
    assert 20 <= len(joined) <= 30
    monkeypatch.setattr(ray_map, "_SHARD_ROWS", 6)
    assert max(map(len, plan_shards(metadata, "text"))) == 2
    monkeypatch.setattr(ray_map, "_SHARD_BYTES", 1)
    assert plan_shards(metadata, "text") == single
