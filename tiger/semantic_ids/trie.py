"""Trie of all semantic IDs in flat arrays, supporting vectorized lookup of the valid continuations of a whole beam.

In sorted order, the children of a node are contiguous, so each node stores only its first child's index. Memory is one
integer per node and one code per child; the work per step is beams x the maximum number of children at that depth (at
most the codebook size), regardless of the size of the catalog. STATIC (arXiv 2602.22647) uses the same idea with dense
tables for the first levels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tiger.semantic_ids.assignment import SemanticIds


class Trie(nn.Module):
    """Prefix tree; nodes of depth d are numbered in sorted order of their prefixes, and node 0 of depth 0 is the root.

    It is a module without parameters, so that `.to(device)` moves it along with the model.
    """

    leaf_items: Tensor

    def __init__(self, ids: SemanticIds) -> None:
        super().__init__()
        order = ids.sorted_items
        ordered = ids.codes[order].astype(np.int64)
        self.depth = ordered.shape[1]
        self.widest: list[int] = []  # maximum number of children of any node, per depth
        differs = np.zeros(len(ordered), bool)
        differs[:1] = True
        parent = np.zeros(len(ordered), np.int64)  # node of each ID at the depth above
        for level in range(self.depth):
            differs[1:] |= ordered[1:, level] != ordered[:-1, level]
            starts = np.flatnonzero(differs)
            counts = np.bincount(parent[starts], minlength=int(parent[-1]) + 1)
            self.widest.append(int(counts.max()))
            first_child = np.concatenate([[0], np.cumsum(counts)])
            self.register_buffer(f"first_child_{level}", torch.from_numpy(first_child), persistent=False)
            self.register_buffer(f"code_{level}", torch.from_numpy(ordered[starts, level]), persistent=False)
            parent = np.cumsum(differs) - 1
        self.register_buffer("leaf_items", torch.from_numpy(order), persistent=False)

    def expand(self, nodes: Tensor, level: int, alive: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the children of nodes of depth `level`.

        Args:
            nodes: int64 [...].
            level: depth of the nodes.
            alive: bool [children of the level], those to treat as existing; see `reachable`.

        Returns:
            children int64 [..., W], their codes int64 [..., W], and whether they exist, bool [..., W]; W is the maximum
            number of children at this depth. A child that does not exist has an arbitrary valid node and code.
        """
        first_child, code = self.get_buffer(f"first_child_{level}"), self.get_buffer(f"code_{level}")
        begin, end = first_child[nodes], first_child[nodes + 1]
        children = begin[..., None] + torch.arange(self.widest[level], device=nodes.device)
        exists = children < end[..., None]
        children = torch.where(exists, children, begin[..., None])
        if alive is not None:
            exists = exists & alive[children]
        return children, code[children], exists

    def reachable(self, allowed: Tensor) -> list[Tensor]:
        """Return which nodes lead to an allowed item: per level bool [children of that level], for `expand`.

        This takes about 1 ms per million items; a filtered beam then contains only prefixes of allowed items.

        Args:
            allowed: bool [items].
        """
        alive = allowed[self.leaf_items]
        masks = [alive]
        for level in range(self.depth - 1, 0, -1):
            first_child = self.get_buffer(f"first_child_{level}")
            before = torch.nn.functional.pad(alive.cumsum(0), (1, 0))
            alive = before[first_child[1:]] > before[first_child[:-1]]
            masks.insert(0, alive)
        return masks

    def max_over_descendants(self, values: Tensor, allowed: Tensor | None = None) -> list[Tensor]:
        """Return the maximum value over each node's descendants: per level float32 [B, children of that level].

        It is an upper bound for guided search: a beam that adds it does not drop the prefix of a good item.

        Args:
            values: float32 [B, items].
            allowed: bool [leaves, in the order of `leaf_items`]; the values of all others are treated as -inf.
        """
        best = values[:, self.leaf_items]
        if allowed is not None:
            best = best.masked_fill(~allowed, -torch.inf)
        bounds = [best]
        for level in range(self.depth - 1, 0, -1):
            counts = self.get_buffer(f"first_child_{level}").diff()
            parent = torch.repeat_interleave(torch.arange(len(counts), device=best.device), counts)
            best = best.new_full((len(best), len(counts)), -torch.inf).scatter_reduce_(
                1, parent.expand(len(best), -1), best, "amax"
            )
            bounds.insert(0, best)
        return bounds
