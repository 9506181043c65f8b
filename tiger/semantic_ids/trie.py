"""All semantic IDs as a prefix tree in flat arrays, for constrained beam search and for a softmax over its nodes.

Sorting the IDs puts the children of a node next to each other, so a node needs only the number of its first child.
Memory is one integer per node and a few per item; the work of a step is beams x the largest number of children at that
depth (at most the codebook's size), whatever the size of the catalog. STATIC (arXiv 2602.22647) uses the same idea with
dense tables for the first levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tiger.semantic_ids.assignment import SemanticIds


@dataclass(frozen=True)
class Siblings:
    """The nodes that a softmax compares at one level: for each of T targets, all children of its parent.

    Pairs (target, child) are listed target by target, so that nothing is padded.

    Attributes:
        nodes: int64 [U] the children of all parents that occur, each parent once.
        targets: int64 [R] the target of each pair.
        positions: int64 [R] the child of each pair, as an index into `nodes`.
        labels: int64 [T] the pair that holds the target's own node.
    """

    nodes: Tensor
    targets: Tensor
    positions: Tensor
    labels: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the four tensors, in the order of the constructor."""
        return self.nodes, self.targets, self.positions, self.labels


class Trie(nn.Module):
    """Nodes of a level are numbered in sorted order of their prefixes; the root is node 0 of "level -1".

    A module without parameters, so that `.to(device)` moves it along with the model.

    Attributes:
        level_sizes: possible codes of every level.
        num_nodes: nodes of every level; those of the last are the items.
        max_children: the most children of any node, per level of the children.
        leaf_items: int64 [N] the item of every leaf.
        codes: int16 [N, L] the semantic ID of every item.
        paths: int32 [N, L] the nodes from the root to every item's leaf.
    """

    leaf_items: Tensor
    codes: Tensor
    paths: Tensor

    def __init__(self, ids: SemanticIds) -> None:
        super().__init__()
        order = ids.sorted_items
        ordered = ids.codes[order].astype(np.int64)
        self.level_sizes, self.depth = ids.level_sizes, ordered.shape[1]
        self.num_nodes: list[int] = []
        self.max_children: list[int] = []
        is_new_prefix = np.zeros(len(ordered), bool)
        is_new_prefix[:1] = True
        node = np.zeros(len(ordered), np.int64)  # of each ID at the level above
        paths = np.empty(ordered.shape, np.int32)
        for level in range(self.depth):
            is_new_prefix[1:] |= ordered[1:, level] != ordered[:-1, level]
            starts = np.flatnonzero(is_new_prefix)
            num_children = np.bincount(node[starts], minlength=int(node[-1]) + 1)
            node = np.cumsum(is_new_prefix) - 1
            paths[order, level] = node
            self.max_children.append(int(num_children.max()))
            self.num_nodes.append(len(starts))
            num_items = np.diff(np.append(starts, len(ordered))).astype(np.float32)
            self._buffer("first_child", level, np.concatenate([[0], np.cumsum(num_children)]))
            self._buffer("code", level, ordered[starts, level])
            self._buffer("num_items", level, num_items)
        self.register_buffer("leaf_items", torch.from_numpy(order), persistent=False)
        self.register_buffer("codes", torch.from_numpy(np.array(ids.codes)), persistent=False)
        self.register_buffer("paths", torch.from_numpy(paths), persistent=False)

    def _buffer(self, name: str, level: int, values: npt.NDArray[np.generic]) -> None:
        self.register_buffer(f"{name}_{level}", torch.from_numpy(values), persistent=False)

    def first_child(self, level: int) -> Tensor:
        """Return the first child of every node of the level above, int64 [nodes above + 1]; the last entry ends it."""
        return self.get_buffer(f"first_child_{level}")

    def node_codes(self, level: int) -> Tensor:
        """Return the code that leads to every node of a level, int64 [nodes]."""
        return self.get_buffer(f"code_{level}")

    def num_items_below(self, level: int) -> Tensor:
        """Return how many items every node of a level holds, float32 [nodes]."""
        return self.get_buffer(f"num_items_{level}")

    def expand(self, nodes: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Return the children of nodes of the level above `level`.

        Args:
            nodes: int64 [...].
            level: the level of the children.

        Returns:
            children int64 [..., W], and which of them exist, bool [..., W]; W is the largest number of children at this
            level. A child that does not exist is some valid node.
        """
        first_child = self.first_child(level)
        begin, end = first_child[nodes], first_child[nodes + 1]
        position = torch.arange(self.max_children[level], device=nodes.device)
        children = torch.minimum(begin[..., None] + position, end[..., None] - 1)
        return children, position < (end - begin)[..., None]

    def allowed_nodes(self, allowed_items: Tensor) -> list[Tensor]:
        """Return which nodes lead to an allowed item: per level bool [nodes].

        This takes about 1 ms per million items; a filtered beam then contains only prefixes of allowed items.

        Args:
            allowed_items: bool [items].
        """
        return [below > 0 for below in self.sum_below(allowed_items.to(torch.int64))]

    def sum_below(self, values: Tensor) -> list[Tensor]:
        """Return the sum of a value over the items below every node, per level int64 [nodes].

        Args:
            values: int64 [items].
        """
        below = values[self.leaf_items]
        sums = [below]
        for level in range(self.depth - 1, 0, -1):
            first_child = self.first_child(level)
            before = torch.nn.functional.pad(below.cumsum(0), (1, 0))
            below = before[first_child[1:]] - before[first_child[:-1]]
            sums.insert(0, below)
        return sums

    def mean_below(self, vectors: Tensor, level: int) -> Tensor:
        """Return the mean vector of the items below every node of a level, float32 [nodes, d], without a second table.

        Args:
            vectors: floating-point [items, d].
            level: of the nodes.
        """
        mean = torch.zeros(self.num_nodes[level], vectors.shape[1], device=vectors.device)
        for items in torch.arange(len(vectors), device=vectors.device).split(1 << 16):
            mean.index_add_(0, self.paths[items, level].long(), vectors[items].float())
        return mean / self.num_items_below(level)[:, None]

    def sibling_tensors(
        self, items: npt.NDArray[np.integer], known: list[npt.NDArray[np.bool_]] | None = None
    ) -> list[Tensor]:
        """Return the tensors of `siblings`, level after level, as the model's forward reads them.

        Args:
            items: [T] target items.
            known: per level bool [nodes], the nodes that take part; None: all.
        """
        known = known or [np.ones(count, bool) for count in self.num_nodes]
        return [tensor for level in self.siblings(items, known) for tensor in level.tensors()]

    def siblings(self, items: npt.NDArray[np.integer], known: list[npt.NDArray[np.bool_]]) -> list[Siblings]:
        """Return what a softmax over the children of the targets' parents reads, for the levels after the first.

        It runs on the CPU, where batches are made, so that a GPU is never asked for sizes.

        Args:
            items: [T] target items.
            known: per level bool [nodes], the nodes that take part; the targets' own nodes must.
        """
        paths = self.paths.numpy()[items].astype(np.int64)
        result = []
        for level in range(1, self.depth):
            first_child = self.first_child(level).numpy()
            parents, which = np.unique(paths[:, level - 1], return_inverse=True)
            nodes, counts = _ranges(first_child[parents], first_child[parents + 1])
            if not known[level].all():
                kept = known[level][nodes]
                counts = np.add.reduceat(kept, np.cumsum(counts) - counts, dtype=np.int64)
                nodes = nodes[kept]
            begins = (np.cumsum(counts) - counts)[which]
            positions, counts_of_target = _ranges(begins, begins + counts[which])
            own = np.searchsorted(nodes, paths[:, level])  # ranges of ascending parents are ascending
            labels = np.cumsum(counts_of_target) - counts_of_target + own - begins
            targets = np.repeat(np.arange(len(items)), counts_of_target)
            result.append(Siblings(*map(torch.from_numpy, (nodes, targets, positions, labels))))
        return result


def _ranges(
    begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return all integers of [begin, end) of each row, row after row, and the length of each row."""
    counts = ends - begins
    return np.arange(counts.sum()) + np.repeat(begins - (np.cumsum(counts) - counts), counts), counts
