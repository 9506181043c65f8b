"""A trained model for another catalog: what training has learned stays with its items and prefixes.

`grow` gives it further items, without training; `warm_start` begins the next training from it.

New items have no learned vector: their text speaks for them. New prefixes have the mean text of their items, and no
learned vector either. Mean texts of prefixes that training knew stay as they were, and so do the mean and the standard
deviation of the texts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tiger.models.tiger.model import TigerModel
from tiger.models.tiger.softmax import TrieSoftmax
from tiger.semantic_ids.assignment import packed
from tiger.semantic_ids.trie import Trie


def known_nodes(trained: Trie, grown: Trie, level: int) -> Tensor:
    """Return where the nodes of a trie are in one with further items, int64 [nodes of the level].

    Args:
        trained: the trie of the first items.
        grown: the trie of these and of further items, with the same IDs for the same items.
        level: the level of the nodes.
    """
    where = torch.empty(trained.num_nodes[level], dtype=torch.int64)
    where[trained.paths[:, level].long()] = grown.paths[: len(trained.leaf_items), level].long()
    return where


@torch.no_grad()
def grow(model: TigerModel, state: dict[str, Tensor], trained: Trie, vectors: Tensor | None) -> None:
    """Give a model of the grown catalog the weights of one that was trained before the items came.

    Args:
        model: a model of all items; its own weights are replaced.
        state: weights of the trained model.
        trained: the trie that it was trained with.
        vectors: floating-point [items of training, d] text embeddings, for softmax = trie.
    """
    own, grown = model.state_dict(), model.trie
    state = dict(state)
    for name in ("items.training_counts", "items.learned.weight"):
        if name in state:
            padded = torch.zeros_like(own[name])
            padded[: len(state[name])] = state[name]
            state[name] = padded
    if isinstance(model.softmax, TrieSoftmax):
        assert vectors is not None, "the model reads text embeddings"
        for level in range(grown.depth - 1):
            where = known_nodes(trained, grown, level)
            name = f"softmax.inner.{level}.weight"
            padded = torch.zeros_like(own[name])
            padded[where] = state[name]
            state[name] = padded
            model.softmax.get_buffer(f"node_text_{level}")[where] = trained.mean_below(vectors, level)
    model.load_state_dict(state)


@torch.no_grad()
def warm_start(model: TigerModel, state: dict[str, Tensor], trained: Trie, before: Tensor) -> int:
    """Give an untrained model the weights of a trained one, as far as they are of the same items, codes and prefixes.

    Learned vectors go to the same items, vectors of inner nodes to the same prefixes; all other weights are copied if
    their shapes are equal. Text statistics are copied as well, because the projection of texts was learned with them.

    Args:
        model: the model; its other weights stay as they are initialized.
        state: weights of the trained model.
        trained: the trie that it was trained with.
        before: int64 [items], index of each item in `trained`; -1: it is new.

    Returns:
        How many tensors were taken, wholly or in part.
    """
    own, taken = model.state_dict(), 0
    known = before >= 0
    for name, tensor in own.items():
        if name not in state or name == "items.training_counts":
            continue
        given = state[name]
        if name == "items.learned.weight":
            if given.shape[1:] == tensor.shape[1:]:
                tensor[known] = given[before[known]]
                taken += 1
        elif name.startswith("softmax.inner."):
            where, of = common_prefixes(model.trie, trained, int(name.split(".")[2]))
            if given.shape[1:] == tensor.shape[1:]:
                tensor[where] = given[of]
                taken += 1
        elif given.shape == tensor.shape:
            tensor.copy_(given)
            taken += 1
    return taken


def common_prefixes(one: Trie, other: Trie, level: int) -> tuple[Tensor, Tensor]:
    """Return the nodes of a level with equal prefixes in two tries, int64 [n] of each; none if the levels differ."""
    if one.level_sizes != other.level_sizes:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    sizes = one.level_sizes[: level + 1]
    own, others = (
        np.unique(packed(trie.codes[:, : level + 1].numpy(), sizes)) for trie in (one, other)
    )  # as nodes are
    _, where, of = np.intersect1d(own, others, assume_unique=True, return_indices=True)
    return torch.from_numpy(where), torch.from_numpy(of)
