"""Read, sample, check and import embeddings."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tiger.core import node_cache
from tiger.core.errors import ArtifactError
from tiger.core.precision import Choice
from tiger.core.storage import Folder
from tiger.core.threads import in_threads

log = logging.getLogger(__name__)


_SAMPLED_FILES = 64  # files from which `sample_embeddings` reads rows; more if they are small


_RECORDED = ("precision", "precision_speedup")


def precision_figures(folder: Folder) -> dict[str, Any]:
    """Return `precision` of all shards, read from their footers, for the manifest.

    Returns:
        {"precision": "bfloat16", "precision_speedup": 1.83}, the latter if it was measured and is equal in all shards;
        {"precision": {"bfloat16": 11, "float32": 1}} if shards differ. Shards without a record count as "unknown".
    """
    shards = [footer.metadata for footer in in_threads(lambda name: _footer(folder, name), _files(folder))]
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
            count = sum(shard.rows for shard in list_shards(folder))
            vectors, found = torch.empty(count, rows.shape[1]), np.zeros(count, bool)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(found)):
            raise _ids_missing(folder)
        found[ids] = True
        vectors[torch.from_numpy(ids)] = rows
    assert vectors is not None and found is not None, "_files has found a file"
    if not found.all():
        raise _ids_missing(folder)
    return vectors


@dataclass(frozen=True)
class VectorShard:
    """One file of embeddings, and the number of its rows."""

    name: str
    rows: int


def list_shards(folder: Folder) -> list[VectorShard]:
    """Return all shards with their numbers of rows, from their footers, each of which is read once.

    Raises:
        ArtifactError: there is no shard, or one is not a Parquet file.
    """

    def shard(name: str) -> VectorShard:
        try:
            return VectorShard(name, _footer(folder, name).num_rows)
        except (pa.ArrowException, OSError):
            return VectorShard(name, len(_columns(folder, name, "item_id")))  # its error names the file and the reason

    return list(in_threads(shard, _files(folder)))


def _footer(folder: Folder, name: str) -> pq.FileMetaData:
    return pq.read_metadata(folder.join(name), filesystem=folder.filesystem)


def read_shard(folder: Folder, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return item ids [n] and embeddings float32 [n, d] of a shard.

    Raises:
        ArtifactError: a column is missing, or the file is not a table.
    """
    shard = _columns(folder, name, "item_id", "vector")
    return np.asarray(shard["item_id"]).astype(np.int64), matrix(shard).numpy()


def map_embeddings(folder: Folder) -> Tensor:
    """Return embeddings float32 [N, d], row = item_id: in memory, or of a large catalog mapped from a file per machine.

    Raises:
        ArtifactError: see `load_embeddings`.
    """
    shards = list_shards(folder)
    dimension = read_shard(folder, shards[0].name)[1].shape[1]
    rows = sum(shard.rows for shard in shards)
    size = 4 * rows * dimension
    if size < node_cache.MAPPED_BYTES:
        return load_embeddings(folder)
    content = json.dumps([folder.uri, sorted(folder.files().items()), "vectors"])

    def build(path: Path) -> None:
        vectors = np.lib.format.open_memmap(path / "vectors.npy", "w+", np.float32, (rows, dimension))
        found = np.zeros(rows, bool)
        for items, part in vector_shards(folder):
            if len(items) and (items.min() < 0 or items.max() >= rows):
                raise _ids_missing(folder)
            found[items] = True
            vectors[items] = part
        if not found.all():
            raise _ids_missing(folder)
        vectors.flush()

    path = node_cache.mapped_folder(content, size, build)
    return load_embeddings(folder) if path is None else torch.from_numpy(node_cache.load_mapped(path / "vectors.npy"))


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
    yield from in_threads(lambda name: read_shard(folder, name), _files(folder), ahead=2)


def count_embeddings(folder: Folder) -> int:
    """Return the number of embeddings, reading only the item ids.

    Raises:
        ArtifactError: there are none, a column is missing, or the item ids are not 0 .. N-1, each once.
    """
    items = in_threads(lambda name: np.asarray(_columns(folder, name, "item_id")["item_id"]), _files(folder))
    found = np.zeros(sum(shard.rows for shard in list_shards(folder)), bool)
    for own in items:
        if len(own) and (own.min() < 0 or own.max() >= len(found)):
            raise _ids_missing(folder)
        found[own] = True
    if not found.all():
        raise _ids_missing(folder)
    return len(found)


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
    chosen = np.linspace(0, len(files) - 1, needed).round().astype(int)
    tables = in_threads(lambda index: _columns(folder, files[index], "vector") if index else first, chosen, ahead=4)
    for table in tables:
        if begin < len(table):
            parts.append(matrix(table.take(np.arange(begin, len(table), step))))
        begin = (begin - len(table)) % step
    vectors = torch.cat(parts)
    return vectors[:: max(1, -(-len(vectors) // at_most))]  # files may be longer than the first


def read_tokens(folder: Folder) -> npt.NDArray[np.int32]:
    """Return the numbers of tokens of all texts, in the order of the shards."""
    shards = in_threads(lambda name: np.asarray(_columns(folder, name, "tokens")["tokens"]), _files(folder))
    return np.concatenate(list(shards))


def _files(folder: Folder) -> list[str]:
    """Return the names of all shards, in the order of their numbers."""
    files = [name for name in folder.files() if name.startswith("vectors/") and name.endswith(".parquet")]
    if not files:
        raise ArtifactError(f"{folder.uri}/vectors contains no file; delete the folder")
    return sorted(files, key=lambda name: (len(name), name))  # part-100000 comes after part-99999


def _columns(folder: Folder, file: str, *names: str) -> pa.Table:
    table = folder.read_table(file, list(names))
    if missing := set(names) - set(table.column_names):
        raise ArtifactError(f"{folder.uri}/{file}: no column {', '.join(sorted(missing))}; delete the folder")
    return table


def matrix(table: pa.Table) -> Tensor:
    """Return the column `vector`, lists of equal length, as float32 [rows, d]."""
    lists = table["vector"].combine_chunks()
    return torch.from_numpy(np.asarray(lists.flatten()).reshape(len(table), -1).astype(np.float32))
