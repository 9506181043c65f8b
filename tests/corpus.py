"""Overrides, vectors and artifacts that the corpus of bad input and the fuzzers share."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tiger.core.artifacts import Draft
from tiger.core.config import Config
from tiger.data.sources.base import RawFile
from tiger.embedding.encoder import EmbeddingConfig
from tiger.embedding.external import VectorJoin, own_item_ids

OVERRIDES: list[tuple[str, str]] = [
    ("", "an override is written"), ("x", "an override is written"), ("=1", "an override is written"),
    ("rot=1", "unknown key rot; did you mean root"), ("root=", "root = ''"), ("root=[1]", "root = [1]"),
    ("root.a=1", "root"), ("model=1", "model = 1"), ("model.num_layers=0", "greater than or equal to 1"),
    ("model.num_layers=1.5", "model.num_layers = 1.5"), ("model.num_layers=many", "model.num_layers = 'many'"),
("model.dropout=1", "less than 1"), ("model.dropout=-0.1", "greater than"),
    ("model.dropout=nan", "model.dropout"), ("model.preset=huge", "model.preset = 'huge'"),
    ("model.training.learning_rate=0", "greater than 0"), ("model.training.learning_rate=-1", "greater than 0"),
    ("model.training.learning_rate=inf", "learning_rate"), ("model.training.batch_size=0", "batch_size = 0"),
    ("model.training.epochs=-1", "epochs = -1"), ("model.training.precision=fp8", "precision = 'fp8'"),
    ("model.num_user_tokens=5", "encoder = causal has no user token"), ("model.item_dropout=1", "less than 1"),
    ("model.softmax=best", "softmax = 'best'"), ("collaborative.weight=1", "less than 1"),
    ("tokenizer.kind=rqave", "there is no module tiger.tokenizers.rqave; shipped: opq, rkmeans, rqvae"),
    ("tokenizer.num_levels=0", "num_levels = 0"), ("tokenizer.num_levels=9", "num_levels = 9"), ("tokenizer.codebook_size=1", "codebook_size = 1"),
    ("tokenizer.codebook_size=40000", "codebook_size = 40000"), ("tokenizer.distance=manhattan", "distance = 'manhattan'"),
    ("tokenizer.num_levls=3", "unknown key tokenizer.num_levls; did you mean tokenizer.num_levels"), ("tokenizer.gradient_estimator=gumbel", "gradient_estimator = 'gumbel'"),
    ("data.kind=movielens", "there is no module"), ("data.kind=os.path", "Config"), ("data=1", "data"),
    ("decoding.beam=0", "decoding.beam = 0"), ("decoding.k=0", "decoding.k = 0"), ("decoding.temperature=-1", "temperature = -1"),
    ("decoding.beam=5", "less than decoding.k = 10"),
    ("decoding.max_per_first_code=0", "per_first_code = 0"), ("scale.training.max_workers=0", "max_workers = 0"), ("scale.gpus=-1", "scale.gpus = -1"),
    ("scale.max_failures=-1", "max_failures = -1"), ("semantic_ids.collision_policy=ignore", "collision_policy = 'ignore'"),
    ("embedding.storage_dtype=int8", "storage_dtype = 'int8'"), ("catalog.k_core=-1", "k_core = -1"),
]  # fmt: skip


def joined(table: pa.Table, folder: Path) -> pa.Table:
    pq.write_table(table, folder / "mine.parquet")
    files = [RawFile.local(folder / "mine.parquet")]
    return pa.concat_tables(VectorJoin(own_item_ids(files, EmbeddingConfig()), EmbeddingConfig()).tables(files))


class Knobs(Config):
    size: int = 1


def _fill(draft: Draft) -> None:
    draft.folder.write_table("table.parquet", pa.table({"x": [1, 2]}))
