"""Residual k-means for catalogs larger than memory, in tasks of many shards each.

Codebooks are initialized from a sample that fits in memory (`tokenizer.kmeans_sample`). Then Lloyd's algorithm makes
full passes over all vectors for each level: a task reads its shards one after another and returns one matrix of sums,
so that little goes through the process that adds them up. Full passes rather than mini-batches, because mini-batch
k-means leaves most codes of the later levels unused and reads as much.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger.core.errors import ConfigError
from tiger.core.progress import Progress
from tiger.core.runner import Runner
from tiger.core.storage import Folder
from tiger.embedding.vectors import VectorShard, list_shards, read_shard
from tiger.tokenizers._residual import ResidualTokenizer
from tiger.tokenizers.base import build, check_codebook_size
from tiger.tokenizers.kmeans import cluster_sums, revive
from tiger.tokenizers.rkmeans import Config
from tiger.tokenizers.shards import group_shards

Sums = dict[str, npt.NDArray[np.float64]]


def fit_streamed(config: Config, embeddings: Folder, runner: Runner) -> ResidualTokenizer:
    """Fit residual k-means to the vectors of an embeddings artifact.

    The result does not depend on where tasks run, nor on their number: sums are computed in float64, in an order that
    is a function of the shards.

    Args:
        config: options of the tokenizer.
        embeddings: folder of the vectors.
        runner: where tasks run.

    Raises:
        ConfigError: fewer items than codes, or a balanced last level, which needs all distances at once.
    """
    if config.sinkhorn_last_level:
        raise ConfigError("tokenizer.sinkhorn_last_level needs all vectors in memory; set tokenizer.streaming = false")
    shards = list_shards(embeddings)
    rows = sum(shard.rows for shard in shards)
    check_codebook_size(config, rows)
    groups = [[shard.name for shard in group] for group in group_shards(shards)]
    sample = _sample(embeddings, shards, config.kmeans_sample, config.seed, runner)
    tokenizer = build(config, sample.shape[1])
    assert isinstance(tokenizer, ResidualTokenizer)
    tokenizer.fit_normalizer(sample)
    sample = tokenizer.standardize(sample)
    tokenizer.initialize(sample, torch.Generator().manual_seed(config.seed))
    progress = Progress("k-means", config.num_levels * config.passes_per_level * rows, "rows")
    for level in range(config.num_levels):
        for _ in range(config.passes_per_level):
            shared = runner.share(_as_is, tokenizer)
            tasks = [(shared, embeddings, names, level) for names in groups]
            totals: Sums = {}
            for sums in runner.map(_sum_shards, tasks, what="k-means"):
                _add(totals, sums)
                progress.add(int(sums["counts"].sum()))
            _update(tokenizer, level, totals, sample)
    progress.close()
    return tokenizer


def _as_is(value: Any) -> Any:
    return value


def _sample(embeddings: Folder, shards: list[VectorShard], size: int, seed: int, runner: Runner) -> Tensor:
    """Return `size` rows sampled without replacement, float32, in the order of the shards."""
    begins = np.concatenate([[0], np.cumsum([shard.rows for shard in shards])])
    chosen = np.sort(np.random.default_rng(seed).permutation(int(begins[-1]))[:size])
    tasks, first = [], 0
    for group in group_shards(shards):
        wanted = {}
        for shard in group:
            own = chosen[np.searchsorted(chosen, begins[first]) : np.searchsorted(chosen, begins[first + 1])]
            if len(own):
                wanted[shard.name] = own - begins[first]
            first += 1
        if wanted:
            tasks.append((embeddings, wanted))
    return torch.from_numpy(np.concatenate(list(runner.map(_rows_of_shards, tasks, what="k-means"))))


def _rows_of_shards(embeddings: Folder, wanted: dict[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
    return np.concatenate([read_shard(embeddings, name)[1][rows] for name, rows in wanted.items()])


@torch.no_grad()
def _sum_shards(tokenizer: ResidualTokenizer, embeddings: Folder, names: list[str], level: int) -> Sums:
    """Return sums and counts of the points of each cluster of a level, and sums of the norms of what is left."""
    totals: Sums = {}
    for name in names:
        vectors = torch.from_numpy(read_shard(embeddings, name)[1])
        *_, found = islice(tokenizer.quantize(tokenizer.latent(tokenizer.standardize(vectors))), level + 1)
        points, counts = cluster_sums(found.point.double(), found.code, tokenizer.codebook_size)
        left = (found.rest - found.chosen).norm(dim=1, keepdim=True)
        lengths, _ = cluster_sums(left.double(), found.code, tokenizer.codebook_size)
        _add(totals, {"points": points.numpy(), "counts": counts.numpy(), "lengths": lengths.squeeze(1).numpy()})
    return totals


def _add(totals: Sums, sums: Sums) -> None:
    for name, array in sums.items():
        totals[name] = totals[name] + array if name in totals else array.copy()  # Ray's is read-only


def _update(tokenizer: ResidualTokenizer, level: int, totals: Sums, sample: Tensor) -> None:
    """Move a level's codewords to the means of their points, and update the lengths of the next level."""
    counts = torch.from_numpy(totals["counts"])
    means = torch.from_numpy(totals["points"]) / counts.clamp_min(1)[:, None]
    moved = torch.where(counts[:, None] > 0, means.float(), tokenizer.codebooks[level])
    *_, sampled = islice(tokenizer.quantize(tokenizer.latent(sample)), level + 1)
    distance = (sampled.point - sampled.chosen).square().sum(1)
    tokenizer.codebooks[level] = revive(moved, counts, sampled.point, distance)
    if level + 1 < tokenizer.levels and tokenizer.distance != "euclidean":
        tokenizer.lengths[level + 1] = torch.from_numpy(totals["lengths"]).float() / counts.clamp_min(1).float()
        tokenizer.lengths[level + 1].clamp_min_(1e-6)
