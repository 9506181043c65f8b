"""Ranking metrics on arrays, at item level, with confidence intervals over users.

With one target a user, Recall@K is the share of users whose target is among the first K (the same as the hit rate),
NDCG@K is 1 / log2(rank + 1) for a target at `rank` <= K and else 0, MRR@K is 1 / rank likewise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

CUTOFFS = (1, 5, 10, 50)
_RESAMPLES = 1000


def target_ranks(items: npt.NDArray[Any], targets: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Rank from 1 of each user's target in the user's list, 0 where it is not there.

    Args:
        items: [U, K] recommended items, best first, padded with -1.
        targets: [U].
    """
    hit = items == targets[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0)


def ranking(ranks: npt.NDArray[np.int64], cutoffs: tuple[int, ...] = CUTOFFS) -> dict[str, float]:
    """Recall, NDCG and MRR at every cutoff, each the mean over users.

    Raises:
        ValueError: there is no user.
    """
    return {name: float(values.mean()) for name, values in _per_user(ranks, cutoffs).items()}


def confidence(
    ranks: npt.NDArray[np.int64], cutoffs: tuple[int, ...] = CUTOFFS, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals of `ranking` by the percentile bootstrap over users, 1,000 resamples."""
    values = _per_user(ranks, cutoffs)
    # Users of one rank are alike: a resample is a multinomial draw over the distinct ranks.
    _, first, counts = np.unique(ranks, return_index=True, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(ranks), counts / len(ranks), _RESAMPLES) / len(ranks)
    intervals = {}
    for name, per_user in values.items():
        low, high = np.quantile(draws @ per_user[first], [0.025, 0.975])
        intervals[name] = (float(low), float(high))
    return intervals


def _per_user(ranks: npt.NDArray[np.int64], cutoffs: tuple[int, ...]) -> dict[str, npt.NDArray[np.float64]]:
    if not len(ranks):
        raise ValueError("there are no users to evaluate")
    figures = {}
    for cutoff in cutoffs:
        hit = (ranks > 0) & (ranks <= cutoff)
        figures[f"recall@{cutoff}"] = hit.astype(np.float64)
        figures[f"ndcg@{cutoff}"] = np.where(hit, 1 / np.log2(ranks + 1.0, where=hit, out=np.ones(len(ranks))), 0)
        figures[f"mrr@{cutoff}"] = np.where(hit, 1 / np.maximum(ranks, 1), 0)
    return figures


def coverage(items: npt.NDArray[Any], n_items: int, cutoff: int = 10) -> dict[str, float]:
    """How many different items the first `cutoff` places of all users show, and their share of the catalog."""
    shown = np.unique(items[:, :cutoff])
    distinct = int((shown >= 0).sum())
    return {f"distinct@{cutoff}": distinct, f"coverage@{cutoff}": distinct / n_items}
