"""Read, sample, check and import embeddings."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tiger.core.errors import ArtifactError
from tiger.core.precision import Choice
from tiger.core.storage import Folder

log = logging.getLogger(__name__)


_SAMPLED_FILES = 64  # files from which `sample_embeddings` reads rows; more if they are small


_RECORDED = ("precision", "precision_speedup")


def precision_figures(folder: Folder) -> dict[str, Any]:
    """Return `precision` of all shards, read from their footers, for the manifest.

    Returns:
        {"precision": "bfloat16", "precision_speedup": 1.83}, the latter if it was measured and is equal in all shards;
        {"precision": {"bfloat16": 11, "float32": 1}} if shards differ. Shards without a record count as "unknown".
    """
    shards = [pq.read_metadata(folder.join(name), filesystem=folder.filesystem).metadata for name in _files(folder)]
    records = [{name: (shard or {}).get(name.encode(), b"").decode() for name in _RECORDED} for shard in shards]
    counts = Counter(record["precision"] or "unknown" for record in records)
    if len(counts) > 1:
        log.warning("embed: shards were computed in different precisions: %s; set embedding.precision", dict(counts))
        return {"precision": dict(sorted(counts.items()))}
    measured = {record["precision_speedup"] for record in records}
    speedup = float(measured.pop() or 0) if len(measured) == 1 else 0.0
    return Choice(next(iter(counts)), speedup or None).figures()


def unusable(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the indices of rows that contain NaN or infinity, or only zeros, int64."""
    return np.flatnonzero(~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1))


def load_embeddings(folder: Folder) -> Tensor:
    """Read embeddings float32 [N, d], row = item_id; one file at a time, to bound memory to about one copy.

    Raises:
        ArtifactError: a column is missing, the item ids are not 0 .. N-1, each once, or a file is not what its
            artifact has recorded.
    """
    vectors, found = None, None
    for name in _files(folder):
        part = _columns(folder, name, "item_id", "vector")
        rows, ids = matrix(part), np.asarray(part["item_id"]).astype(np.int64)
        if vectors is None or found is None:
            count = _rows(folder)
            vectors, found = torch.empty(count, rows.shape[1]), np.zeros(count, bool)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(found)):
            raise _ids_missing(folder)
        found[ids] = True
        vectors[torch.from_numpy(ids)] = rows
    assert vectors is not None and found is not None, "_files has found a file"
    if not found.all():
        raise _ids_missing(folder)
    return vectors


def _rows(folder: Folder) -> int:
    """Return the number of rows of all shards, from their footers."""
    rows = 0
    for name in _files(folder):
        try:
            rows += pq.read_metadata(folder.join(name), filesystem=folder.filesystem).num_rows
        except (pa.ArrowException, OSError):
            rows += len(_columns(folder, name, "item_id"))  # its error names the file and the reason
    return rows


def _ids_missing(folder: Folder) -> ArtifactError:
    return ArtifactError(f"{folder.uri}/vectors: item ids are missing or duplicated; delete the folder")


def vector_column(vectors: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """Return vectors [n, d] as the column `vector` of a shard."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])


def vector_shards(folder: Folder) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Yield item ids [n] and embeddings float32 [n, d] of every shard.

    Raises:
        ArtifactError: a column is missing, or there is no shard.
    """
    for name in _files(folder):
        shard = _columns(folder, name, "item_id", "vector")
        yield np.asarray(shard["item_id"]).astype(np.int64), matrix(shard).numpy()


def count_embeddings(folder: Folder) -> int:
    """Return the number of embeddings, reading only the item ids.

    Raises:
        ArtifactError: there are none, a column is missing, or the item ids are not 0 .. N-1, each once.
    """
    items = np.sort(
        np.concatenate([np.asarray(_columns(folder, name, "item_id")["item_id"]) for name in _files(folder)])
    )
    if not np.array_equal(items, np.arange(len(items))):
        raise _ids_missing(folder)
    return len(items)


def sample_embeddings(folder: Folder, at_most: int) -> Tensor:
    """Return at most `at_most` embeddings float32 [n, d], evenly spaced over the catalog.

    Every n-th row of up to 64 evenly spaced files, including the first and the last, is read; of more files if these do
    not contain enough rows. Memory does not grow with the catalog.
    """
    files = _files(folder)
    first = _columns(folder, files[0], "vector")
    needed = min(len(files), max(_SAMPLED_FILES, -(-at_most // max(1, len(first)))))
    step = max(1, -(-len(first) * needed // at_most))
    begin, parts = 0, []
    for index in np.linspace(0, len(files) - 1, needed).round().astype(int):
        table = _columns(folder, files[index], "vector") if index else first
        if begin < len(table):
            parts.append(matrix(table.take(np.arange(begin, len(table), step))))
        begin = (begin - len(table)) % step
    vectors = torch.cat(parts)
    return vectors[:: max(1, -(-len(vectors) // at_most))]  # files may be longer than the first


def _files(folder: Folder) -> list[str]:
    files = [name for name in folder.files() if name.startswith("vectors/") and name.endswith(".parquet")]
    if not files:
        raise ArtifactError(f"{folder.uri}/vectors contains no file; delete the folder")
    return files


def _columns(folder: Folder, file: str, *names: str) -> pa.Table:
    table = folder.read_table(file, list(names))
    if missing := set(names) - set(table.column_names):
        raise ArtifactError(f"{folder.uri}/{file}: no column {', '.join(sorted(missing))}; delete the folder")
    return table


def matrix(table: pa.Table) -> Tensor:
    """Return the column `vector`, lists of equal length, as float32 [rows, d]."""
    lists = table["vector"].combine_chunks()
    return torch.from_numpy(np.asarray(lists.flatten()).reshape(len(table), -1).astype(np.float32))
