"""Encoding and unique IDs of catalogs whose vectors are larger than memory, in tasks of many shards each.

Every task encodes its shards, and writes the items sorted by their first codes. Other tasks then merge the items of a
range of first codes and resolve their collisions, with their vectors, as `assignment.assign` does for all at once. The
process that calls this holds the codes of all items, 2 bytes per code, and checks them with 5 or 9 bytes per item.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from tiger.core.external_sort import KeyRange, Run, TableStore, choose_ranges, read_range, write_run
from tiger.core.progress import Progress
from tiger.core.runner import Runner
from tiger.core.storage import Folder
from tiger.embedding.vectors import VectorShard, list_shards, matrix, read_shard, vector_column
from tiger.metrics.codes import unique_ratio
from tiger.semantic_ids.assignment import SemanticIds, SemanticIdsConfig, Sharing, make_ids, packed, resolve
from tiger.tokenizers.base import Tokenizer

TASK_ROWS = 1 << 17
"""Items that a task encodes or adds up: its result takes as much as that of a single shard."""

_RANGE_ROWS = 1 << 16  # items whose collisions a task resolves, with their vectors
_GROUP_ROWS = 1 << 11  # items per row group of a run

_KEY = "prefix"


def group_shards(shards: Sequence[VectorShard], rows: int = TASK_ROWS) -> list[list[VectorShard]]:
    """Return the shards in groups of consecutive ones with at least `rows` rows, a function of the shards alone."""
    groups: list[list[VectorShard]] = []
    held = rows
    for shard in shards:
        if held >= rows:
            groups.append([])
            held = 0
        groups[-1].append(shard)
        held += shard.rows
    return groups


@dataclass(frozen=True)
class Encoded:
    """Codes of all items.

    Attributes:
        codes: int16 [N, L], those nearest to the vectors.
        error: normalized mean squared reconstruction error.
        runs: items with their codes, sorted by their first codes; empty unless they were asked for.
    """

    codes: npt.NDArray[np.int16]
    error: float
    runs: list[Run]


def encode_shards(
    tokenizer: Tokenizer,
    embeddings: Folder,
    runner: Runner,
    store: TableStore | None = None,
    with_vectors: bool = False,
) -> Encoded:
    """Encode all vectors of a folder.

    Args:
        tokenizer: the tokenizer, in eval mode.
        embeddings: the folder.
        runner: where tasks run.
        store: where to write the items sorted by their first codes, for `assign_shards`; None: nowhere.
        with_vectors: whether to write their vectors, too.
    """
    shards = list_shards(embeddings)
    rows = sum(shard.rows for shard in shards)
    codes, error, runs, done = np.zeros((rows, tokenizer.levels), np.int16), 0.0, list[Run](), 0
    shared = runner.share(_as_is, tokenizer)
    progress = Progress("encode", rows, "rows")
    tasks = [
        (shared, embeddings, [shard.name for shard in group], number, store, with_vectors)
        for number, group in enumerate(group_shards(shards))
    ]
    for items, own, own_error, own_runs in runner.map(_encode_group, tasks, what="encode"):
        codes[items] = own
        error += own_error
        runs += own_runs
        done += len(items)
        progress.add(len(items))
    progress.close()
    assert done == rows, f"{rows} input rows, {done} output rows"
    return Encoded(codes, error / (rows * tokenizer.dim), runs)


def _as_is(value: Any) -> Any:
    return value


@torch.no_grad()
def _encode_group(
    tokenizer: Tokenizer, embeddings: Folder, names: list[str], number: int, store: TableStore | None, vectors: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int16], float, list[Run]]:
    """Encode some shards; return items, codes, the sum of squared errors, and the runs that were written."""
    items, codes, kept, error = [], [], [], 0.0
    for name in names:
        own, batch = read_shard(embeddings, name)
        tensor = torch.from_numpy(batch)
        found = tokenizer.encode(tensor)
        error += float(tokenizer.errors(tensor, found).double().sum())
        items.append(own)
        codes.append(found.numpy().astype(np.int16))
        if store is not None and vectors:
            kept.append(batch)
    all_items, all_codes = np.concatenate(items), np.concatenate(codes)
    if store is None:
        return all_items, all_codes, error, []
    prefix = _prefixes(all_codes, tokenizer.codebook_size)
    order = np.argsort(prefix, kind="stable")
    columns = {_KEY: pa.array(prefix[order]), "item": pa.array(all_items[order])}
    columns["codes"] = pa.FixedSizeListArray.from_arrays(pa.array(all_codes[order].ravel()), all_codes.shape[1])
    if vectors:
        columns["vector"] = vector_column(np.concatenate(kept)[order])
    run = write_run(store, f"codes-{number:05d}", pa.table(columns), _KEY, _GROUP_ROWS)
    return all_items, all_codes, error, [run]


def _prefixes(codes: npt.NDArray[np.int16], codebook_size: int) -> npt.NDArray[np.int64]:
    """Return the first L - 1 codes as one number, in their order."""
    levels = codes.shape[1] - 1
    return packed(codes[:, :levels], (codebook_size,) * levels) if levels else np.zeros(len(codes), np.int64)


@dataclass(frozen=True)
class Assigned:
    """Unique IDs of all items, and how they differ from the codes nearest to the vectors.

    Attributes:
        ids: the IDs.
        moved: number of items whose codes are not the nearest ones.
        error: normalized mean squared reconstruction error of the IDs' codes from the tokenizer.
        unique_ratio_of_nearest_codes: see `tiger.metrics.codes.unique_ratio`.
    """

    ids: SemanticIds
    moved: int
    error: float
    unique_ratio_of_nearest_codes: float


def assign_shards(
    tokenizer: Tokenizer, encoded: Encoded, config: SemanticIdsConfig, runner: Runner, store: TableStore
) -> Assigned:
    """Return unique IDs of encoded items: those that `assignment.assign` returns for all of them at once.

    Args:
        tokenizer: the tokenizer, in eval mode.
        encoded: with runs, and for the policy `nearest_free` with vectors. Its codes are replaced by those of the IDs:
            at 100 million items a second array takes 600 MB.
        config: the collision policy.
        runner: where tasks run.
        store: holds the runs.

    Raises:
        DataError: see `assignment.assign`.
    """
    codes, rows, ratio = encoded.codes, len(encoded.codes), unique_ratio(encoded.codes)
    collisions = np.empty(rows, np.int16)  # a number that does not fit is of a group that make_ids refuses
    sharing: list[Sharing] = []
    error, moved = 0.0, 0
    shared = runner.share(_as_is, tokenizer)
    ranges = choose_ranges(encoded.runs, _RANGE_ROWS)
    tasks = [(shared, store, encoded.runs, keys, config) for keys in ranges]
    progress = Progress("unique IDs", rows, "items")
    for items, own, numbers, own_sharing, own_error in runner.map(_resolve_range, tasks, what="unique IDs"):
        moved += int((codes[items] != own).any(axis=1).sum())
        codes[items], collisions[items] = own, numbers
        sharing += own_sharing
        error += own_error
        progress.add(len(items))
    progress.close()
    store.delete(run.name for run in encoded.runs)
    if config.collision_policy == "nearest_free":
        error /= rows * tokenizer.dim
    else:
        error = encoded.error
    return Assigned(make_ids(codes, collisions, sharing, tokenizer.codebook_size, config), moved, error, ratio)


@torch.no_grad()
def _resolve_range(
    tokenizer: Tokenizer, store: TableStore, runs: Sequence[Run], keys: KeyRange, config: SemanticIdsConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int16], npt.NDArray[np.int32], list[Sharing], float]:
    """Resolve the collisions of the items of one range of first codes.

    Returns:
        Items int64 [n], codes int16 [n, L], numbers of items with equal codes int32 [n], the groups, and with
        `nearest_free` the sum of squared errors of the codes.
    """
    tables = [table for _, table in read_range(store, runs, keys, _KEY)]
    if not tables:
        return np.empty(0, np.int64), np.empty((0, tokenizer.levels), np.int16), np.empty(0, np.int32), [], 0.0
    table = pa.concat_tables(tables)
    items = np.asarray(table["item"])
    order = np.argsort(items)
    items = items[order]
    codes = np.asarray(table["codes"].combine_chunks().flatten()).reshape(len(items), -1)[order]
    vectors = matrix(table)[torch.from_numpy(order)] if config.collision_policy == "nearest_free" else None
    costs = None if vectors is None else tokenizer.assignment_costs(vectors)
    resolved = resolve(codes, tokenizer.codebook_size, config, costs, items)
    error = 0.0
    if vectors is not None:
        assigned = torch.from_numpy(resolved.codes.astype(np.int64))
        for rows in _chunks(len(items)):
            error += float(tokenizer.errors(vectors[rows], assigned[rows]).double().sum())
    return items, resolved.codes, resolved.collisions, [resolved.sharing], error


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(begin, begin + _GROUP_ROWS) for begin in range(0, rows, _GROUP_ROWS))
