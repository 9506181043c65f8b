"""Item vectors of large catalogs: what `collaborative` computes in memory, in tasks over rows of the co-occurrences.

The pairs of items are counted per block of users and merged by an external sort into ranges of rows. Every range is
multiplied with a thin matrix by a task of its own, which is all that a randomized singular value decomposition needs
(Halko, Martinsson and Tropp 2011): the counts are symmetric, so that a range also has those rows of the transposed
matrix, and an orthonormal basis of a product follows from its Gram matrix. The result is that of
`collaborative.fit_fusion` up to rounding, and does not depend on where tasks run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse

from tiger.core.external_sort import KeyRange, Run, TableStore, choose_ranges, read_range, write_run
from tiger.core.progress import Progress
from tiger.core.runner import Runner
from tiger.core.storage import Folder
from tiger.data.histories import Histories, read_histories
from tiger.embedding.collaborative import (
    CollaborativeConfig,
    Fusion,
    KnownFactors,
    Matrix,
    pairs_within,
    random_rotation,
    regression_sums,
    rotation_onto,
    unit_rows,
)
from tiger.embedding.vectors import list_shards, matrix, read_shard, vector_column

_BLOCK_EVENTS = 1 << 20  # whose pairs a task counts
_RANGE_ENTRIES = 1 << 24  # of the matrix that a task multiplies
_GROUP_ENTRIES = 1 << 17  # per row group of a run
_SHARDS = 64  # of text vectors that a task fuses
_OVERSAMPLED, _ITERATIONS = 10, 8  # as in `collaborative`

_KEY = "row"
_VALUES = ("value", "transposed")


@dataclass(frozen=True)
class _Rows:
    """A range of rows [begin, end) of the matrix; `index` names its tables in the store."""

    index: int
    begin: int
    end: int


def fuse_shards(
    config: CollaborativeConfig,
    embeddings: Folder,
    catalog: Folder,
    target: Folder,
    runner: Runner,
    store: TableStore,
    known: KnownFactors | None = None,
) -> tuple[Fusion, int]:
    """Write the item vectors of all items, shard by shard.

    Args:
        config: weight, rank, window and penalties.
        embeddings: folder of the text embeddings.
        catalog: folder of the histories, of which the training parts are read.
        target: where to write `vectors/part-N.parquet` (item_id, vector).
        runner: where tasks run.
        store: for tables between tasks.
        known: co-occurrence vectors of an earlier training to align with.

    Returns:
        How text embeddings become item vectors, without the co-occurrence vectors; and the number of items with one.
    """
    histories = read_histories(catalog)
    names = [shard.name for shard in list_shards(embeddings)]
    num_items = sum(shard.rows for shard in list_shards(embeddings))
    groups = [names[begin : begin + _SHARDS] for begin in range(0, len(names), _SHARDS)]
    factors, num_known, rank = _factors(config, histories, catalog, num_items, runner, store)
    if known is not None:
        (rotation,) = runner.map(rotation_onto, [(factors, known)], what="item vectors")
        factors = runner.share(np.matmul, factors, rotation)
    counts = histories.training_counts(num_items)
    given = runner.share(_pair, factors, counts)
    sums = list(runner.map(_sum_texts, [(embeddings, group) for group in groups], what="item vectors"))
    mean = (np.sum(sums, axis=0) / num_items).astype(np.float32)
    size = len(mean) + 1
    gram, product = config.ridge * np.eye(size), np.zeros((size, rank))
    tasks = [(embeddings, group, mean, given) for group in groups]
    for own_gram, own_product in runner.map(_regress, tasks, what="item vectors"):
        gram += own_gram
        product += own_product
    prediction = np.linalg.solve(gram, product).astype(np.float32)
    rotation = random_rotation(len(mean) + rank, config.seed)
    empty = np.empty((0, rank), np.float32), np.empty(0, np.int64)
    fusion = Fusion(config, mean, prediction, rotation, *empty)
    progress = Progress("item vectors", num_items, "items")
    numbered = [(embeddings, group, index * _SHARDS, fusion, given, target) for index, group in enumerate(groups)]
    for rows in runner.map(_fuse, numbered, what="item vectors"):
        progress.add(rows)
    progress.close()
    return fusion, num_known


def _pair(one: Any, other: Any) -> tuple[Any, Any]:
    return one, other


# --- the matrix ---------------------------------------------------------------------------------------------------


def _factors(
    config: CollaborativeConfig,
    histories: Histories,
    catalog: Folder,
    num_items: int,
    runner: Runner,
    store: TableStore,
) -> tuple[Any, int, int]:
    """Return a handle of the co-occurrence vectors float32 [items, r], the number of nonzero ones, and r."""
    runs = _count(config, histories, catalog, runner, store)
    if not runs:
        return runner.share(np.zeros, (num_items, 1), np.float32), 0, 1
    keys = choose_ranges(runs, _RANGE_ENTRIES)
    begins = [0 if key.begin is None else key.begin for key in keys]
    ranges = [_Rows(index, *ends) for index, ends in enumerate(itertools.pairwise([*begins, num_items]))]
    tasks: list[tuple[Any, ...]] = [(store, runs, key, rows) for key, rows in zip(keys, ranges, strict=True)]
    sums = np.zeros(num_items)
    for rows, own in zip(ranges, runner.map(_merge, tasks, what="co-occurrence"), strict=True):
        sums[rows.begin : rows.end] = own
    store.delete(run.name for run in runs)
    measured = runner.share(_with_context, sums)
    known = sums > 0
    del sums
    list(runner.map(_inform, [(store, rows, measured) for rows in ranges], what="co-occurrence"))
    store.delete(map(_sums_name, ranges))
    rank = min(config.rank, num_items - 1)
    width = min(rank + _OVERSAMPLED, num_items)
    basis = runner.share(_random, num_items, width, config.seed)
    steps = 2 * _ITERATIONS + 1
    progress = Progress("co-occurrence", steps + 1, "products")
    for step in range(steps + 1):
        tasks = [(store, rows, basis, step) for rows in ranges]
        gram = np.asarray(sum(runner.map(_multiply, tasks, what="co-occurrence")))
        if step:  # nothing depends on the products of the step before any more
            store.delete(_product_name(rows, step - 1) for rows in ranges)
        if step < steps:
            basis = runner.share(_gather, store, ranges, step, _orthonormal(gram))
        progress.add(1)
    progress.close()
    squares, vectors = np.linalg.eigh(gram)
    order = np.argsort(-squares)[:rank]
    left = vectors[:, order] * np.sign(vectors[np.abs(vectors[:, order]).argmax(0), order])
    scales = np.maximum(squares[order], 0) ** 0.25  # the square root of the singular values
    return runner.share(_unit_factors, basis, (left * scales).astype(np.float32), known), int(known.sum()), len(order)


def _count(
    config: CollaborativeConfig, histories: Histories, catalog: Folder, runner: Runner, store: TableStore
) -> list[Run]:
    first, tasks = 0, []
    for number, block in enumerate(histories.blocks(_BLOCK_EVENTS)):
        tasks.append((store, catalog, number, first, first + len(block), config.window))
        first += len(block)
    progress = Progress("count pairs of items", first, "users")
    runs: list[Run] = []
    for task, found in zip(tasks, runner.map(_count_block, tasks, what="co-occurrence"), strict=True):
        runs += found
        progress.add(task[4] - task[3])
    progress.close()
    return runs


def _count_block(store: TableStore, catalog: Folder, number: int, first: int, last: int, window: int) -> list[Run]:
    """Write the sums of 1 / distance over the pairs of items of some users, in both orders, sorted by the first one."""
    found = list(pairs_within(read_histories(catalog).users(first, last), window))
    one, other = (np.concatenate([pair[side] for pair in found]) for side in (0, 1))
    values = np.concatenate([np.full(len(pair[0]), pair[2], np.float32) for pair in found])
    one, other, values = np.append(one, other), np.append(other, one), np.append(values, values)
    keys, place = np.unique(one.astype(np.int64) << 32 | other, return_inverse=True)
    if not len(keys):
        return []
    summed = np.bincount(place, values).astype(np.float32)
    columns = {_KEY: (keys >> 32).astype(np.int32), "column": keys.astype(np.int32), "value": summed}
    return [write_run(store, f"pairs-{number:05d}", pa.table(columns), _KEY, _GROUP_ENTRIES)]


def _merge(store: TableStore, runs: Sequence[Run], keys: KeyRange, rows: _Rows) -> npt.NDArray[np.float64]:
    """Write the rows of a range; return their sums."""
    parts = [table for _, table in read_range(store, runs, keys, _KEY)]
    row, column, value = (
        np.concatenate([np.asarray(part[name]) for part in parts]) for name in (_KEY, "column", "value")
    )
    entries, place = np.unique(row.astype(np.int64) << 32 | column, return_inverse=True)
    summed = np.bincount(place, value).astype(np.float32)
    row = (entries >> 32).astype(np.int32)
    store.write(_sums_name(rows), pa.table({_KEY: row, "column": entries.astype(np.int32), "value": summed}))
    sums: npt.NDArray[np.float64] = np.bincount(row - rows.begin, summed, rows.end - rows.begin).astype(np.float64)
    return sums


def _with_context(sums: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return sums [items] and the smoothed probability of each item as a context; see `collaborative`."""
    context = sums**0.75
    context /= context.sum()
    return sums, context


def _inform(store: TableStore, rows: _Rows, measured: tuple[Any, Any]) -> None:
    """Write the positive pointwise mutual information of a range of rows."""
    sums, context = measured
    table = store.read(_sums_name(rows))
    row, column, value = (np.asarray(table[name]) for name in (_KEY, "column", "value"))
    information = np.log(value / (sums[row] * context[column])), np.log(value / (sums[column] * context[row]))
    kept = (information[0] > 0) | (information[1] > 0)
    columns = {_KEY: row[kept], "column": column[kept]}
    for name, each in zip(_VALUES, information, strict=True):
        columns[name] = np.maximum(each[kept], 0).astype(np.float32)
    store.write(_name(rows), pa.table(columns))


def _sums_name(rows: _Rows) -> str:
    return f"sums-{rows.index:05d}"


def _name(rows: _Rows) -> str:
    return f"rows-{rows.index:05d}"


def _product_name(rows: _Rows, step: int) -> str:
    return f"product-{step:02d}-{rows.index:05d}"


def _random(num_items: int, width: int, seed: int) -> Matrix:
    return np.random.default_rng(seed).standard_normal((num_items, width), np.float32)


def _multiply(store: TableStore, rows: _Rows, basis: Matrix, step: int) -> npt.NDArray[np.float64]:
    """Write the product of a range of rows with a basis [items, w]; return its Gram matrix [w, w].

    Odd steps are those of the transposed matrix.
    """
    names = [_KEY, "column", _VALUES[step % 2]]
    table = store.read(_name(rows), names)
    row, column, value = (np.asarray(table[name]) for name in names)
    starts = np.searchsorted(row, np.arange(rows.begin, rows.end + 1))
    part = scipy.sparse.csr_matrix((value, column, starts), (rows.end - rows.begin, len(basis)))
    product: Matrix = part @ basis
    store.write(_product_name(rows, step), pa.table({"vector": vector_column(product)}), 1 << 16)
    gram: npt.NDArray[np.float64] = product.astype(np.float64).T @ product
    return gram


def _orthonormal(gram: npt.NDArray[np.float64]) -> Matrix:
    """Return the matrix [w, w] that makes the columns of a product orthonormal, given its Gram matrix."""
    squares, vectors = np.linalg.eigh(gram)
    floor = 1e-12 * max(float(squares[-1]), 1e-300)
    change: Matrix = (vectors / np.sqrt(np.maximum(squares, floor))).astype(np.float32)
    return change


def _gather(store: TableStore, ranges: Sequence[_Rows], step: int, change: Matrix) -> Matrix:
    """Return the product of a step, of all rows, with a matrix [w, w]."""
    gathered = np.empty((ranges[-1].end, change.shape[1]), np.float32)
    for rows in ranges:
        gathered[rows.begin : rows.end] = matrix(store.read(_product_name(rows, step))).numpy() @ change
    return gathered


def _unit_factors(basis: Matrix, change: Matrix, known: npt.NDArray[np.bool_]) -> Matrix:
    """Return unit rows of basis [items, w] x change [w, r]; zero for items without pairs."""
    factors = np.empty((len(basis), change.shape[1]), np.float32)
    for begin in range(0, len(basis), 1 << 16):
        rows = slice(begin, begin + (1 << 16))
        factors[rows] = unit_rows(basis[rows] @ change) * known[rows, None].astype(np.float32)
    return factors


# --- texts --------------------------------------------------------------------------------------------------------


def _texts(embeddings: Folder, names: Sequence[str]) -> Iterator[tuple[npt.NDArray[np.int64], Matrix]]:
    return (read_shard(embeddings, name) for name in names)


def _sum_texts(embeddings: Folder, names: Sequence[str]) -> npt.NDArray[np.float64]:
    sums: npt.NDArray[np.float64] = np.sum(
        [text.sum(0, dtype=np.float64) for _, text in _texts(embeddings, names)], axis=0
    )
    return sums


def _regress(
    embeddings: Folder, names: Sequence[str], mean: Matrix, given: tuple[Matrix, npt.NDArray[np.int64]]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the sums of the regression from texts to co-occurrence vectors, weighted by purchases."""
    factors, counts = given
    size = len(mean) + 1
    gram, product = np.zeros((size, size)), np.zeros((size, factors.shape[1]))
    for items, text in _texts(embeddings, names):
        own_gram, own_product = regression_sums(text - mean, factors[items], counts[items])
        gram += own_gram
        product += own_product
    return gram, product


def _fuse(
    embeddings: Folder,
    names: Sequence[str],
    first: int,
    fusion: Fusion,
    given: tuple[Matrix, npt.NDArray[np.int64]],
    target: Folder,
) -> int:
    """Write the item vectors of some shards; return the number of items."""
    factors, counts = given
    rows = 0
    for number, (items, text) in enumerate(_texts(embeddings, names), first):
        fused = fusion.fuse(factors[items], counts[items], text)
        table = pa.table({"item_id": pa.array(items, pa.int32()), "vector": vector_column(fused)})
        target.write_table(f"vectors/part-{number:05d}.parquet", table)
        rows += len(items)
    return rows
