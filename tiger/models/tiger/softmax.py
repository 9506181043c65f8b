"""From the decoder's state to the probability of the next code: over the trie's nodes, or over the codes of a level.

Shapes: T targets, L levels, M model dimension, B users, Q beams, W children, N items of a history, R pairs of a target
and a sibling (see `Siblings`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiger.models.padding import PAD
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.encoder import EncodedHistory
from tiger.models.tiger.items import ItemEmbedding
from tiger.models.tiger.pairs import child_products, pair_products
from tiger.semantic_ids.trie import Siblings, Trie

_NODES_AT_ONCE = 1 << 14


class CodeSoftmax(nn.Module):
    """One output vector per code, tied to its input embedding: TIGER as published (Rajput et al. 2023)."""

    def __init__(self, config: TigerConfig) -> None:
        super().__init__()
        self.over_children = config.softmax_support == "children"

    def losses(
        self,
        items: ItemEmbedding,
        trie: Trie,
        x_TLM: Tensor,
        user_state_TM: Tensor,
        history_TN: Tensor,
        target_T: Tensor,
        siblings: list[Siblings],
    ) -> Tensor:
        """Return the cross-entropy of every target's code at every level, float32 [T, L]."""
        codes = trie.codes[target_T].long()
        losses = []
        for level in range(trie.depth):
            logits = self._logits(items, trie, x_TLM[:, level], level)
            if not self.over_children:
                losses.append(F.cross_entropy(logits, codes[:, level], reduction="none"))
            elif level == 0:
                exists = torch.zeros(trie.level_sizes[0], dtype=torch.bool, device=logits.device)
                exists[trie.node_codes(0)] = True
                losses.append(F.cross_entropy(logits.masked_fill(~exists, -torch.inf), codes[:, 0], reduction="none"))
            else:
                among = siblings[level - 1]
                pairs = logits[among.targets, trie.node_codes(level)[among.nodes][among.positions]]
                losses.append(_cross_entropy_of_pairs(pairs, among, len(target_T)))
        return torch.stack(losses, dim=1)

    def node_vectors(self, items: ItemEmbedding, trie: Trie) -> list[Tensor]:
        """Return nothing: codes have no vectors per node."""
        return []

    def log_probs(
        self,
        items: ItemEmbedding,
        trie: Trie,
        level: int,
        x_BQM: Tensor,
        encoded: EncodedHistory,
        nodes: Tensor,
        children: Tensor,
        exists: Tensor,
        node_vectors: list[Tensor],
        bonus: Tensor | None = None,
    ) -> Tensor:
        """Return log-probabilities float32 [B, Q, W] of children; see `TrieSoftmax.log_probs`."""
        logits = self._logits(items, trie, x_BQM, level)
        codes = trie.node_codes(level)[children]
        if not self.over_children:
            return logits.log_softmax(-1).gather(-1, codes).masked_fill_(~exists, -torch.inf)
        return logits.gather(-1, codes).masked_fill(~exists, -torch.inf).log_softmax(-1)

    @staticmethod
    def _logits(items: ItemEmbedding, trie: Trie, x: Tensor, level: int) -> Tensor:
        begin = sum(trie.level_sizes[:level])
        return F.linear(x, items.code_embedding.weight[begin : begin + trie.level_sizes[level]]).float()


class TrieSoftmax(nn.Module):
    """Hierarchical softmax over the semantic-ID trie (Morin and Bengio 2005): one output vector per node.

    The vector of a node is that of its code plus, at a leaf, the learned vector and projected text of its item (those
    that the encoder reads), and at an inner node a learned vector plus the projected mean text of the items below. The
    query is the decoder's state plus a projection of the user's state, which starts as the identity. Items of the
    history below a node add to its logit: the weight of repeats is learned at every level.

    Each softmax runs over the existing children of a node, so the log-probability of an item is the sum over its path,
    in training as in search; nothing is scored that no target and no beam reaches.
    """

    known_root: Tensor

    def __init__(self, config: TigerConfig, trie: Trie, vectors: Tensor) -> None:
        """
        Args:
            vectors: floating-point [items, d] text embeddings.
        """
        super().__init__()
        d_model = config.d_model or 0
        self.inner = nn.ModuleList(nn.Embedding(count, d_model) for count in trie.num_nodes[:-1])
        self.query_projection = nn.ModuleList(nn.Linear(d_model, d_model, bias=False) for _ in range(trie.depth))
        self.repeats = nn.Parameter(torch.zeros(trie.depth, 2, d_model))
        for level in range(trie.depth - 1):
            self.register_buffer(f"node_text_{level}", trie.mean_below(vectors, level), persistent=False)
        self.register_buffer("known_root", torch.ones(trie.num_nodes[0], dtype=torch.bool), persistent=False)

    def reset_parameters(self) -> None:
        """Initialize: small vectors of inner nodes, identity projections, no effect of repeats."""
        for level in range(len(self.inner)):
            nn.init.normal_(self._inner_weight(level), std=0.02)
        for projection in self.query_projection:
            nn.init.eye_(projection.get_parameter("weight"))
        nn.init.zeros_(self.repeats)

    @torch.no_grad()
    def set_known(self, known: list[Tensor]) -> None:
        """Say which nodes hold items that training sees, per level bool [nodes]; others are left out of the loss."""
        self.known_root.copy_(known[0])
        for level, mask in enumerate(known[:-1]):
            self._inner_weight(level)[~mask] = 0

    def _inner_weight(self, level: int) -> Tensor:
        weight: Tensor = self.inner[level].get_parameter("weight")
        return weight

    def vectors_of(self, items: ItemEmbedding, trie: Trie, level: int, nodes: Tensor) -> Tensor:
        """Return the output vectors [n, M] of nodes int64 [n]."""
        table, rows = self._text(items, trie, level, nodes)
        return self._own_vectors(items, trie, level, nodes) + items.project_text(table[rows])

    def _own_vectors(self, items: ItemEmbedding, trie: Trie, level: int, nodes: Tensor) -> Tensor:
        """Return the output vectors [n, M] of nodes int64 [n] without their text."""
        code: Tensor = items.code_embedding(trie.node_codes(level)[nodes] + items.level_offsets[level])
        if level < trie.depth - 1:
            return code + self.inner[level](nodes)
        learned = items.learned_vectors(trie.leaf_items[nodes])
        return code if learned is None else code + learned

    def _text(self, items: ItemEmbedding, trie: Trie, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return a table of text embeddings [.., d], and the row of each node int64 [n] in it."""
        if level == trie.depth - 1:
            return items.vectors, trie.leaf_items[nodes]
        return self.get_buffer(f"node_text_{level}"), nodes

    def node_vectors(self, items: ItemEmbedding, trie: Trie) -> list[Tensor]:
        """Return the output vectors of all nodes, per level float32 [nodes, M], for many searches."""
        tables = []
        for level, count in enumerate(trie.num_nodes):
            nodes = torch.arange(count, device=items.level_offsets.device)
            table = items.code_embedding.weight.new_empty(
                count, items.code_embedding.embedding_dim, dtype=torch.float32
            )
            for part in nodes.split(_NODES_AT_ONCE):
                table[part] = self.vectors_of(items, trie, level, part).float()
            tables.append(table)
        return tables

    def losses(
        self,
        items: ItemEmbedding,
        trie: Trie,
        x_TLM: Tensor,
        user_state_TM: Tensor,
        history_TN: Tensor,
        target_T: Tensor,
        siblings: list[Siblings],
    ) -> Tensor:
        """Return minus the log-probability of every target's node at every level, float32 [T, L].

        Args:
            x_TLM: decoder states.
            history_TN: int64 items that each target's prediction knows, PAD where there is none.
            siblings: of the targets, for every level but the first.
        """
        paths_TL = trie.paths[target_T].long()
        history_paths = trie.paths[history_TN.clamp_min(0)]
        in_history = history_TN != PAD
        losses = []
        for level in range(trie.depth):
            query = x_TLM[:, level] + self.query_projection[level](user_state_TM)
            repeat = (query @ self.repeats[level].T).float()  # [T, 2]: of each repeat, and of its part of the node
            inner = float(level < trie.depth - 1)
            num_items = trie.num_items_below(level)
            nodes_TN = history_paths[..., level].long()
            repeat_logit = repeat[:, :1] / num_items[nodes_TN] + inner * repeat[:, 1:]
            if level == 0:
                all_nodes = torch.arange(trie.num_nodes[0], device=query.device)
                logits = (query @ self.vectors_of(items, trie, 0, all_nodes).T).float()
                logits = logits.scatter_add(1, nodes_TN, repeat_logit * in_history)
                logits = logits.masked_fill(~self.known_root, -torch.inf)
                losses.append(F.cross_entropy(logits, paths_TL[:, 0], reduction="none"))
                continue
            among = siblings[level - 1]
            pairs = self._pair_logits(items, trie, level, query, among)
            # A history item below the target's parent is one of the pairs: the target's own plus the nodes between.
            below = in_history & (history_paths[..., level - 1] == paths_TL[:, None, level - 1])
            own = among.positions[among.labels]
            at = torch.searchsorted(among.nodes, nodes_TN) - own[:, None] + among.labels[:, None]
            at = torch.where(below, at, len(pairs))
            pairs = F.pad(pairs, (0, 1)).index_add(0, at.flatten(), repeat_logit.flatten())[:-1]
            losses.append(_cross_entropy_of_pairs(pairs, among, len(target_T)))
        return torch.stack(losses, dim=1)

    def _pair_logits(self, items: ItemEmbedding, trie: Trie, level: int, query_TM: Tensor, among: Siblings) -> Tensor:
        """Return the logit of every pair of a target and a sibling, without repeats, float32 [R]."""
        if query_TM.device.type != "cpu":
            vectors = self.vectors_of(items, trie, level, among.nodes)
            return pair_products(query_TM, vectors, among.targets, among.positions)
        own = self._own_vectors(items, trie, level, among.nodes)
        table, rows = self._text(items, trie, level, among.nodes)
        if table.dtype == torch.float32:
            rows = rows[among.positions]
        else:  # no table is converted as a whole
            table, rows = table[rows].float(), among.positions
        return pair_products(query_TM, own, among.targets, among.positions) + items.text_products(
            query_TM, table, among.targets, rows
        )

    def log_probs(
        self,
        items: ItemEmbedding,
        trie: Trie,
        level: int,
        x_BQM: Tensor,
        encoded: EncodedHistory,
        nodes: Tensor,
        children: Tensor,
        exists: Tensor,
        node_vectors: list[Tensor],
        bonus: Tensor | None = None,
    ) -> Tensor:
        """Return log-probabilities float32 [B, Q, W] of the children of each beam's node, -inf where none exists.

        Args:
            x_BQM: decoder states.
            nodes: int64 [B, Q], the beams' nodes at the level above.
            children, exists: as `trie.expand(nodes, level)` returns them.
            node_vectors: as `node_vectors()` returns them.
            bonus: float32 [nodes of the level], added to their logits.
        """
        user_state = self.query_projection[level](encoded.user_state)[:, None]
        query = x_BQM + user_state
        table = node_vectors[level]
        logits = (query @ table.T.to(query.dtype)).float() if level == 0 else child_products(query, table, children)
        repeat = (query @ self.repeats[level].T).float()
        paths = trie.paths[encoded.items.clamp_min(0)].long()  # [B, N, L]
        below = (encoded.items != PAD)[:, None, :].expand(-1, nodes.shape[1], -1)
        if level:
            below = below & (paths[:, None, :, level - 1] == nodes[:, :, None])
        slot = torch.where(below, paths[:, None, :, level] - children[..., :1], 0)
        num_items = trie.num_items_below(level)[paths[..., level]][:, None]
        repeat_logit = repeat[..., :1] / num_items + float(level < trie.depth - 1) * repeat[..., 1:]
        # In place: of beams x children there are many, and a copy takes as long as a softmax.
        logits.scatter_add_(2, slot, repeat_logit.masked_fill(~below, 0))
        if bonus is not None:
            logits += bonus[children]
        return logits.masked_fill_(~exists, -torch.inf).log_softmax(-1)


def _cross_entropy_of_pairs(logits: Tensor, among: Siblings, num_targets: int) -> Tensor:
    """Return minus the log-softmax of each target's label among its pairs, float32 [T].

    Args:
        logits: float32 [R].
    """
    largest = logits.new_full((num_targets,), -torch.inf).scatter_reduce(
        0, among.targets, logits.detach(), "amax", include_self=False
    )
    total = logits.new_zeros(num_targets).index_add(0, among.targets, (logits - largest[among.targets]).exp())
    return largest + total.log() - logits[among.labels]
