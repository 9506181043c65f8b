"""A first-order Markov chain: what most often followed the last item in training; then what is most popular."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from pydantic import Field
from torch import nn

from tiger.data.histories import Histories
from tiger.models.base import ModelConfig, ModelData
from tiger.models.recommender import Recommender, Rows
from tiger.models.scoring import RankingRecommender, first_unseen

_PAIRS_AT_ONCE = 1 << 25


class Config(ModelConfig):
    """The Markov chain has no options."""

    kind: Literal["markov_chain"] = Field("markov_chain", description="what most often came next after the last item")


class MarkovChain(RankingRecommender):
    """Ranks items by how often they followed the last item, from the sparse row of that item."""

    def __init__(self, data: ModelData) -> None:
        super().__init__(data)
        self.transitions = count_transitions(data.history_blocks(), data.num_items)
        counts = self.training_counts()
        self.tie_break = counts / (counts.max() + 1.0)  # below 1, the weight of a transition

    def best_items(
        self,
        history: Rows,
        excluded: Rows,
        ranking: npt.NDArray[np.int64],
        allowed_items: npt.NDArray[np.bool_] | None,
        width: int,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Return successors of the last item by transitions, ties by popularity, and then the most popular items."""
        last = int(history[-1])
        begin, end = self.transitions.indptr[last : last + 2]
        following = self.transitions.indices[begin:end].astype(np.int64)
        score = self.transitions.data[begin:end] + self.tie_break[following]
        kept = ~np.isin(following, excluded) if len(excluded) else np.ones(len(following), bool)
        if allowed_items is not None:
            kept &= allowed_items[following]
        following, score = following[kept], score[kept]
        best = np.lexsort((following, -score))[:width]
        found = following[best]
        if (missing := width - len(found)) > 0:
            others = first_unseen(ranking, np.concatenate([following, excluded]), missing)
            return np.concatenate([found, others]), np.concatenate([score[best], self.tie_break[others]])
        return found, score[best]


def count_transitions(blocks: Iterable[Histories], num_items: int) -> scipy.sparse.csr_matrix:
    """Return how often each item follows another one in the training parts, int32 [items, items].

    Memory is 8 bytes per pair that occurs, and a chunk of pairs that are still to be added.
    """
    shape = (num_items, num_items)
    total = scipy.sparse.csr_matrix(shape, dtype=np.int32)
    pairs: list[npt.NDArray[np.int32]] = []
    waiting = 0

    def added() -> scipy.sparse.csr_matrix:
        before, following = np.concatenate(pairs, axis=1)
        ones = np.ones(len(before), np.int32)
        return total + scipy.sparse.coo_matrix((ones, (before, following)), shape=shape).tocsr()

    for block in blocks:
        targets = block.training_target_positions()
        pairs.append(np.stack([block.items[targets - 1], block.items[targets]]))
        waiting += len(targets)
        if waiting >= _PAIRS_AT_ONCE:
            total, pairs, waiting = added(), [], 0
    return added() if pairs else total


def recommender(module: nn.Module, config: Config, data: ModelData, device: torch.device) -> Recommender:
    """Count the transitions of the training parts."""
    return MarkovChain(data)
