"""Ranking metrics of users, at item level, with confidence intervals over users.

With one target per user, Recall@K is the fraction of users whose target is in the top K (equal to the hit rate),
NDCG@K is 1 / log2(rank + 1) for a target at `rank` <= K and else 0, and MRR@K is 1 / rank likewise.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tiger.core.errors import ConfigError

CUTOFFS = (1, 5, 10, 20, 50)
_RESAMPLES = 1000


def target_ranks(items: npt.NDArray[Any], targets: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the rank from 1 of each user's target in the user's list, int64 [U]; 0 if it is not in the list.

    Args:
        items: [U, K] recommended items, best first, padded with -1.
        targets: [U].
    """
    hit = items == targets[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0)


UserMetric = Callable[[npt.NDArray[np.int64], int], npt.NDArray[np.float64]]
"""(rank of each user's target from 1, or 0, int64 [U]; cutoff) -> value of each user, float64 [U]."""


def recall(ranks: npt.NDArray[np.int64], cutoff: int) -> npt.NDArray[np.float64]:
    """Return 1 for users whose target is in the top `cutoff`."""
    return ((ranks > 0) & (ranks <= cutoff)).astype(np.float64)


def ndcg(ranks: npt.NDArray[np.int64], cutoff: int) -> npt.NDArray[np.float64]:
    """Return 1 / log2(rank + 1) for users whose target is in the top `cutoff`."""
    return recall(ranks, cutoff) / np.log2(np.maximum(ranks, 1) + 1.0)


def mrr(ranks: npt.NDArray[np.int64], cutoff: int) -> npt.NDArray[np.float64]:
    """Return 1 / rank for users whose target is in the top `cutoff`."""
    return recall(ranks, cutoff) / np.maximum(ranks, 1)


USER_METRICS: dict[str, UserMetric] = {"recall": recall, "ndcg": ndcg, "mrr": mrr}
"""The metrics that `evaluation.metrics` names; a new one is a function and an entry."""


def user_metrics(names: Sequence[str]) -> dict[str, UserMetric]:
    """Return metrics by name: of `USER_METRICS`, or a function of any package by its dotted name.

    Raises:
        ConfigError: there is no such metric.
    """
    found = {}
    for name in names:
        module, _, function = name.rpartition(".")
        try:
            metric = getattr(importlib.import_module(module), function) if module else USER_METRICS[name]
        except (ImportError, AttributeError, KeyError, ValueError) as error:
            raise ConfigError(
                f"evaluation.metrics: there is no metric {name!r} ({error!r}); use {', '.join(USER_METRICS)}, or the "
                "dotted name of a function (ranks, cutoff) -> values"
            ) from None
        found[function] = metric
    return found


def ranking(
    ranks: npt.NDArray[np.integer],
    cutoffs: tuple[int, ...] = CUTOFFS,
    metrics: Mapping[str, UserMetric] = USER_METRICS,
) -> dict[str, float]:
    """Return every metric at every cutoff, such as recall@10, averaged over users.

    Raises:
        ValueError: there is no user.
    """
    return {name: float(values.mean()) for name, values in _per_user(ranks, cutoffs, metrics)}


def confidence(
    ranks: npt.NDArray[np.integer],
    cutoffs: tuple[int, ...] = CUTOFFS,
    seed: int = 0,
    metrics: Mapping[str, UserMetric] = USER_METRICS,
) -> dict[str, tuple[float, float]]:
    """Return 95% confidence intervals of `ranking` by the percentile bootstrap over users, with 1,000 resamples."""
    # Users with equal ranks are exchangeable, so a resample is a multinomial draw over the distinct ranks.
    _, first, counts = np.unique(ranks, return_index=True, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(ranks), counts / len(ranks), _RESAMPLES) / len(ranks)
    intervals = {}
    for name, per_user in _per_user(ranks, cutoffs, metrics):
        low, high = np.quantile(draws @ per_user[first], [0.025, 0.975])
        intervals[name] = (float(low), float(high))
    return intervals


def paired_difference(
    ranks: npt.NDArray[np.integer],
    other: npt.NDArray[np.integer],
    cutoffs: tuple[int, ...] = CUTOFFS,
    seed: int = 0,
    metrics: Mapping[str, UserMetric] = USER_METRICS,
) -> dict[str, tuple[float, float, float]]:
    """Return how much better one run is than another on the same users: (difference, bounds of its 95% interval).

    Users are resampled together with the metrics of both runs (paired bootstrap): per-user difficulty cancels, so the
    interval is narrower than the intervals of the two runs.

    Args:
        ranks: [U] of the first run.
        other: [U] of the second run, for the same users in the same order.
        cutoffs: cutoffs of the metrics.
        seed: seed of the resamples.
        metrics: metrics by name.

    Raises:
        ValueError: the numbers of users differ.
    """
    if len(ranks) != len(other):
        raise ValueError(f"a paired comparison needs the same users: {len(ranks)} and {len(other)}")
    # Users with equal pairs of ranks are exchangeable, as in `confidence`.
    pairs = ranks.astype(np.int64) * (int(other.max(initial=0)) + 1) + other
    _, first, counts = np.unique(pairs, return_index=True, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(ranks), counts / len(ranks), _RESAMPLES) / len(ranks)
    differences = {}
    both = zip(_per_user(ranks, cutoffs, metrics), _per_user(other, cutoffs, metrics), strict=True)
    for (name, mine), (_, theirs) in both:
        difference = mine - theirs
        low, high = np.quantile(draws @ difference[first], [0.025, 0.975])
        differences[name] = (float(difference.mean()), float(low), float(high))
    return differences


def by_group(
    ranks: npt.NDArray[np.integer], values: npt.NDArray[Any], edges: tuple[int, ...], cutoff: int = 10
) -> dict[str, dict[str, float]]:
    """Return size and Recall of groups of users: those with a value up to the first edge, up to the second, ..., above.

    Args:
        ranks: [U], see `target_ranks`.
        values: [U], such as the length of the user's history or the target's number of training interactions.
        edges: ascending upper bounds of the groups, inclusive.
        cutoff: cutoff of Recall.
    """
    groups = np.searchsorted(np.array(edges), values, side="left")
    names = [f"{low + 1} to {high}" for low, high in zip((-1, *edges[:-1]), edges, strict=True)] + [f"over {edges[-1]}"]
    figures = {}
    for group, name in enumerate(names):
        own = ranks[groups == group]
        if len(own):
            hits = recall(own.astype(np.int64), cutoff).mean()
            figures[name] = {"users": len(own), "recall": float(hits)}
    return figures


def _per_user(
    ranks: npt.NDArray[np.integer], cutoffs: tuple[int, ...], metrics: Mapping[str, UserMetric]
) -> Iterator[tuple[str, npt.NDArray[np.float64]]]:
    """Yield every metric at every cutoff with its value of each user; one at a time, to bound memory.

    Raises:
        ValueError: there is no user.
    """
    if not len(ranks):
        raise ValueError("there are no users to evaluate")
    wide = ranks.astype(np.int64)
    return ((f"{name}@{cutoff}", metric(wide, cutoff)) for cutoff in cutoffs for name, metric in metrics.items())
