"""Metrics of codes and vectors: utilization, perplexity, collisions, neighbor agreement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tiger.semantic_ids.assignment import packed, sorted_keys, used_codes

_SAMPLE_PAIRS = 20_000
_ROWS_AT_ONCE = 1024
_CODES_AT_ONCE = 1 << 20


def pairwise_distance(vectors: npt.NDArray[np.float32], seed: int = 0) -> float:
    """Return the mean Euclidean distance of random pairs of different rows of vectors [N, d]."""
    random = np.random.default_rng(seed)
    first = random.integers(0, len(vectors), _SAMPLE_PAIRS)
    second = (first + random.integers(1, max(2, len(vectors)), _SAMPLE_PAIRS)) % len(vectors)
    return float(np.linalg.norm(vectors[first] - vectors[second], axis=1).mean())


def code_metrics(codes: npt.NDArray[Any], codebook_size: int | Sequence[int]) -> dict[str, float]:
    """Return codebook utilization, perplexity and distinct prefixes of every level, and the fraction of unique tuples.

    unique@l is the number of distinct prefixes of l codes divided by the number of items, unique_ratio that of all L
    codes. usage@l is the codebook utilization: the fraction of the level's codes that any item has. perplexity@l is
    exp(entropy) of the codes' frequencies, the effective number of codes.

    Args:
        codes: [N, L], without the collision level.
        codebook_size: number of codes of all levels, or of each.
    """
    sizes = [codebook_size] * codes.shape[1] if isinstance(codebook_size, int) else codebook_size
    distinct = _distinct_prefixes(codes)
    figures = {"unique_ratio": distinct[-1] / len(codes)}
    for level, size in enumerate(sizes):
        figures[f"unique@{level + 1}"] = distinct[level] / len(codes)
        counts = _counts(codes[:, level], size)
        share = counts[counts > 0] / len(codes)
        figures[f"usage@{level + 1}"] = float((counts > 0).sum() / size)
        figures[f"perplexity@{level + 1}"] = float(np.exp(-(share * np.log(share)).sum()))
    return figures


def unique_ratio(codes: npt.NDArray[Any]) -> float:
    """Return the number of distinct tuples divided by the number of items, of codes [N, L]."""
    return _distinct_prefixes(codes)[-1] / len(codes)


def _counts(codes: npt.NDArray[Any], size: int) -> npt.NDArray[np.int64]:
    """Return how many items have each code, int64 [size], of the codes [N] of one level, without a copy of all."""
    counts = np.zeros(size, np.int64)
    for begin in range(0, len(codes), _CODES_AT_ONCE):
        counts += np.bincount(codes[begin : begin + _CODES_AT_ONCE], minlength=size)
    return counts


def _distinct_prefixes(codes: npt.NDArray[Any]) -> list[int]:
    """Return the numbers of distinct prefixes of 1 to L codes, with one sort and 5 or 9 bytes per item."""
    sizes = used_codes(codes)
    keys = sorted_keys(codes, sizes)
    found = []
    for size in reversed(sizes):
        found.append(int(np.count_nonzero(keys[1:] != keys[:-1])) + min(1, len(keys)))
        keys //= size
    return found[::-1]


def nearest_neighbors(
    vectors: npt.NDArray[np.float32], k: int = 10, sample: int = 1000, seed: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return randomly sampled items int64 [S], and the k nearest other items of each by cosine, int64 [S, k]."""
    items = np.random.default_rng(seed).permutation(len(vectors))[:sample]
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    similarity = unit[items] @ unit.T
    similarity[np.arange(len(items)), items] = -np.inf
    return items, np.argsort(-similarity, axis=1, kind="stable")[:, : min(k, len(vectors) - 1)]


def nearest_distances(
    vectors: npt.NDArray[np.float32], queries: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Return the cosine distance of each query [n, d] to the nearest row of vectors [m, d], float32 [n].

    Without queries, that of each row to the nearest other row.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    asked = unit
    if queries is not None:
        asked = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
    parts = []
    for first in range(0, len(asked), _ROWS_AT_ONCE):
        similarity = asked[first : first + _ROWS_AT_ONCE] @ unit.T
        if queries is None:
            rows = np.arange(len(similarity))
            similarity[rows, first + rows] = -np.inf
        parts.append(1 - similarity.max(axis=1))
    return np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32)


def neighbor_prefix_agreement(
    codes: npt.NDArray[Any], neighbors: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
) -> dict[str, float]:
    """Return overlap@l: the fraction of an item's nearest neighbors in embedding space with the same first l codes.

    High uniqueness can come from noise; neighbor agreement cannot.
    """
    items, nearest = neighbors
    same = np.cumprod(codes[nearest] == codes[items][:, None], axis=2).mean(axis=(0, 1))
    return {f"overlap@{level + 1}": float(share) for level, share in enumerate(same)}


def gini(counts: npt.NDArray[np.integer]) -> float:
    """Return the Gini coefficient of the codes' frequencies: 0 if they are uniform, close to 1 if one code has all."""
    ordered, n = np.sort(counts).astype(np.float64), len(counts)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))


def category_agreement(codes: npt.NDArray[np.integer], categories: list[str | None], depth: int) -> tuple[float, float]:
    """Return how often items with the same prefix have the same category.

    Args:
        codes: [N, L].
        categories: [N], None for an item without one.
        depth: number of codes of the prefix.

    Returns:
        The probability that two different items with the same first `depth` codes have the same category; and that of
        any two items, the level that random codes would reach. Items without a category, and prefixes with one item,
        are ignored; NaN if no pair is left.
    """
    known = np.array([category is not None for category in categories])
    labels = np.unique([category for category in categories if category is not None], return_inverse=True)[1]
    prefixes = np.unique(packed(np.asarray(codes)[known, :depth]), return_inverse=True)[1]

    def agreeing(groups: npt.NDArray[np.int64]) -> float:
        pairs = np.unique(np.stack([groups, labels], axis=1), axis=0, return_counts=True)[1]
        within = np.bincount(groups)
        possible = (within * (within - 1)).sum()
        return float((pairs * (pairs - 1)).sum() / possible) if possible else float("nan")

    return agreeing(prefixes), agreeing(np.zeros_like(prefixes))
