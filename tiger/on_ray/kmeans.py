"""Residual k-means for catalogs larger than memory, over a Ray Dataset.

Codebooks are initialized from a sample that fits in memory (`tokenizer.kmeans_sample`). Then Lloyd's algorithm makes
full passes over all vectors for each level: each shard of the embeddings is reduced to one row of sums and counts,
which the driver adds up, one shard at a time. No task holds more than one shard. Full passes rather than mini-batches,
because mini-batch k-means leaves most codes of the later levels unused and reads as much.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from torch import Tensor

from tiger.core.errors import ConfigError
from tiger.core.progress import Progress
from tiger.core.storage import Folder
from tiger.embedding.vectors import matrix
from tiger.on_ray import cluster
from tiger.tokenizers._residual import ResidualTokenizer
from tiger.tokenizers.base import Tokenizer, build, check_codebook_size
from tiger.tokenizers.kmeans import cluster_sums, revive
from tiger.tokenizers.rkmeans import Config

log = logging.getLogger(__name__)

_TASK_CPUS = 1


def fit(config: Config, embeddings: Folder) -> ResidualTokenizer:
    """Fit residual k-means to the vectors of an embeddings artifact, streamed by shard.

    The result does not depend on the number of tasks: sums are computed in float64, in the order of the shards.

    Raises:
        ConfigError: fewer items than codes, or a balanced last level, which needs all distances at once.
    """
    if config.sinkhorn_last_level:
        raise ConfigError("tokenizer.sinkhorn_last_level needs all vectors in memory; set tokenizer.streaming = false")
    cluster.connect(embeddings.parent)
    parts, rows = _parts(embeddings)
    check_codebook_size(config, rows)
    sample = _sample(embeddings, parts, rows, config.kmeans_sample, config.seed)
    tokenizer = build(config, sample.shape[1])
    assert isinstance(tokenizer, ResidualTokenizer)
    tokenizer.fit_normalizer(sample)
    sample = tokenizer.standardize(sample)
    tokenizer.initialize(sample, torch.Generator().manual_seed(config.seed))
    progress = Progress("k-means", config.num_levels * config.passes_per_level * rows, "rows")
    for level in range(config.num_levels):
        for _ in range(config.passes_per_level):
            _pass(tokenizer, level, embeddings, parts, sample, progress)
    progress.close()
    return tokenizer


def encode(tokenizer: Tokenizer, embeddings: Folder) -> tuple[npt.NDArray[np.int64], float]:
    """Return the codes int64 [N, L] of all items, and the normalized mean squared reconstruction error."""
    cluster.connect(embeddings.parent)
    parts, rows = _parts(embeddings)
    codes, error, done = np.zeros((rows, tokenizer.levels), np.int64), 0.0, 0
    progress = Progress("encode", rows, "rows")
    for result in _over(parts, _encode_part, {"uri": embeddings.uri, "tokenizer": ray.put(tokenizer)}):
        codes[result["items"]] = result["codes"]
        error += float(result["error"])
        done += len(result["items"])
        progress.add(len(result["items"]))
    progress.close()
    assert done == rows, f"{rows} input rows, {done} output rows"
    return codes, error / (rows * tokenizer.dim)


def _parts(embeddings: Folder) -> tuple[list[str], int]:
    """Return the names of the Parquet files, and their total number of rows."""
    names = [name for name in embeddings.files() if name.startswith("vectors/") and name.endswith(".parquet")]
    rows = 0
    for name in names:
        with embeddings.filesystem.open_input_file(embeddings.join(name)) as file:
            rows += pq.ParquetFile(file).metadata.num_rows
    return names, rows


def _vectors(folder: Folder, name: str) -> tuple[npt.NDArray[np.int64], Tensor]:
    """Read items int64 [n] and vectors float32 [n, d] of one shard."""
    table = folder.read_table(name, ["item_id", "vector"]).combine_chunks()
    return np.asarray(table["item_id"]).astype(np.int64), matrix(table)


def _sample(embeddings: Folder, parts: list[str], rows: int, size: int, seed: int) -> Tensor:
    """Return `size` rows sampled without replacement, float32, in the order of the shards."""
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:size])
    taken, begin = [], 0
    for name in parts:
        with embeddings.filesystem.open_input_file(embeddings.join(name)) as file:
            end = begin + pq.ParquetFile(file).metadata.num_rows
        own = chosen[np.searchsorted(chosen, begin) : np.searchsorted(chosen, end)]
        if len(own):
            taken.append(_vectors(embeddings, name)[1][own - begin])
        begin = end
    return torch.cat(taken)


def _over(
    parts: list[str], work: Callable[..., dict[str, Any]], arguments: dict[str, Any]
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Run `work(part, **arguments)` as one task per shard; yield results in the order of the shards."""
    options = ray.data.DataContext.get_current().execution_options
    before, options.preserve_order = options.preserve_order, True
    try:  # a dataset keeps the context of its creation; other datasets of this process do not need the order
        stream = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
            _Task(work), batch_size=1, batch_format="pyarrow", num_cpus=_TASK_CPUS, fn_kwargs=arguments
        )
    finally:
        options.preserve_order = before
    for batch in stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in range(batch.num_rows):
            yield {
                name: np.frombuffer(bytearray(batch[name][row].as_py()), batch[f"{name}:dtype"][row].as_py()).reshape(
                    batch[f"{name}:shape"][row].as_py()
                )
                for name in batch.column_names
                if ":" not in name
            }


class _Task:
    """Converts the arrays that `work` returns to one row of bytes, dtypes and shapes."""

    def __init__(self, work: Callable[..., dict[str, Any]]) -> None:
        self.work = work

    def __call__(self, batch: pa.Table, uri: str, tokenizer: Any, **arguments: Any) -> pa.Table:
        torch.set_num_threads(_TASK_CPUS)
        results = self.work(Folder(uri), batch["part"][0].as_py(), ray.get(tokenizer), **arguments)
        row: dict[str, list[Any]] = {}
        for name, array in results.items():
            row |= {name: [array.tobytes()], f"{name}:dtype": [array.dtype.str], f"{name}:shape": [list(array.shape)]}
        return pa.table(row)


def _pass(
    tokenizer: ResidualTokenizer, level: int, embeddings: Folder, parts: list[str], sample: Tensor, progress: Progress
) -> None:
    """Run one Lloyd iteration on a level's codebook, and update the lengths of the next level."""
    arguments = {"uri": embeddings.uri, "tokenizer": ray.put(tokenizer), "level": level}
    totals: dict[str, npt.NDArray[np.float64]] = {}
    for result in _over(parts, _sum_part, arguments):
        for name, array in result.items():
            totals[name] = totals[name] + array if name in totals else array
        progress.add(int(result["counts"].sum()))
    counts = torch.from_numpy(totals["counts"])
    means = torch.from_numpy(totals["points"]) / counts.clamp_min(1)[:, None]
    moved = torch.where(counts[:, None] > 0, means.float(), tokenizer.codebooks[level])
    *_, sampled = islice(tokenizer.quantize(tokenizer.latent(sample)), level + 1)
    distance = (sampled.point - sampled.chosen).square().sum(1)
    tokenizer.codebooks[level] = revive(moved, counts, sampled.point, distance)
    if level + 1 < tokenizer.levels and tokenizer.distance != "euclidean":
        tokenizer.lengths[level + 1] = torch.from_numpy(totals["lengths"]).float() / counts.clamp_min(1).float()
        tokenizer.lengths[level + 1].clamp_min_(1e-6)


@torch.no_grad()
def _sum_part(folder: Folder, part: str, tokenizer: ResidualTokenizer, level: int) -> dict[str, Any]:
    _, vectors = _vectors(folder, part)
    *_, found = islice(tokenizer.quantize(tokenizer.latent(tokenizer.standardize(vectors))), level + 1)
    points, counts = cluster_sums(found.point.double(), found.code, tokenizer.codebook_size)
    left = (found.rest - found.chosen).norm(dim=1, keepdim=True)
    lengths, _ = cluster_sums(left.double(), found.code, tokenizer.codebook_size)
    return {"points": points.numpy(), "counts": counts.numpy(), "lengths": lengths.squeeze(1).numpy()}


@torch.no_grad()
def _encode_part(folder: Folder, part: str, tokenizer: Tokenizer) -> dict[str, Any]:
    items, vectors = _vectors(folder, part)
    codes = tokenizer.encode(vectors)
    error = tokenizer.errors(vectors, codes).double().sum()
    return {"items": items, "codes": codes.numpy().astype(np.int32), "error": error.numpy()}
