"""What any result is held against: lists by simple rules, under the same evaluator.

Each function gives the `k` best items of each user, int64 [U, k], best first; none looks beyond users' histories and
the training parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse

from tiger.data.histories import Histories

_CHUNK = 1024


def popularity(histories: Histories, n_items: int, k: int) -> npt.NDArray[np.int64]:
    """The `k` items with most interactions in the training parts, int64 [k]; of equals the lower id first."""
    return np.lexsort((np.arange(n_items), -histories.training_counts(n_items)))[:k]


def markov_chain(
    histories: Histories, n_items: int, taken: Sequence[npt.NDArray[np.integer]], k: int
) -> npt.NDArray[np.int64]:
    """What most often came next, in training, after the user's last item; then what is most popular.

    Args:
        taken: what each user has taken so far, in time order.
    """
    lasts = np.array([history[-1] for history in taken])
    targets = histories.training_target_positions()
    following, before = histories.items[targets], histories.items[targets - 1]
    pairs = scipy.sparse.coo_matrix((np.ones(len(before)), (before, following)), shape=(n_items, n_items)).tocsr()
    counts = histories.training_counts(n_items)
    return _best(lambda rows: pairs[lasts[rows]].toarray() + counts / (counts.max() + 1.0), len(lasts), k)


def nearest_by_embedding(
    vectors: npt.NDArray[np.float32], taken: Sequence[npt.NDArray[np.integer]], k: int
) -> npt.NDArray[np.int64]:
    """The items nearest, by cosine of their text embeddings, to the user's last item, that one left out.

    Args:
        vectors: float32 [n_items, d].
    """
    lasts = np.array([history[-1] for history in taken])
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def score(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        similarity = unit[lasts[rows]] @ unit.T
        similarity[np.arange(len(rows)), lasts[rows]] = -np.inf
        return similarity

    return _best(score, len(lasts), k)


def _best(score: Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]], users: int, k: int) -> npt.NDArray[np.int64]:
    """The `k` best columns of each row, of equals the lower first; rows are scored in pieces."""
    lists = []
    for rows in np.array_split(np.arange(users), max(1, -(-users // _CHUNK))):
        scores = score(rows)
        width = min(k, scores.shape[1])
        top = np.sort(np.argpartition(-scores, width - 1, axis=1)[:, :width], axis=1)
        order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable")
        found = np.full((len(rows), k), -1, np.int64)
        found[:, :width] = np.take_along_axis(top, order, axis=1)
        lists.append(found)
    return np.concatenate(lists)
