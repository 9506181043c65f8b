"""Vectors in shards, as the embedding stage leaves them, and a small streamed tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from tiger.core.storage import Folder
from tiger.embedding.vectors import vector_column
from tiger.tokenizers.base import TokenizerConfig
from tiger.tokenizers.rkmeans import Config


def write_vectors(root: Path, array: np.ndarray, parts: int, order: np.ndarray | None = None) -> Folder:
    """Write array[item] of every item, in `parts` shards; `order` is that of the items in them."""
    folder, items = Folder(str(root)), np.arange(len(array)) if order is None else order
    for part, own in enumerate(np.array_split(items, parts)):
        table = pa.table({"item_id": own.astype(np.int32), "vector": vector_column(array[own])})
        folder.write_table(f"vectors/part-{part:05d}.parquet", table)
    return folder


def rkmeans_config(**changes: object) -> Config:
    found = TokenizerConfig.resolve(
        {"kind": "rkmeans", "codebook_size": 16, "streaming": True, "passes_per_level": 3, **changes}
    )
    assert isinstance(found, Config)
    return found
