"""Beam search that can only end on real items.

All users and beams of a batch go through the model together. The history is encoded once per user and its keys and
values are shared by the user's beams, which are further queries; copying them per beam is what makes other
implementations slow. A score is the item's log-probability under the model; with softmax = codes it is not renormalized
over what the trie allows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiger.models.tiger.batches import needs_siblings
from tiger.models.tiger.layers import KVCache, reorder_cache
from tiger.models.tiger.model import TigerModel


@torch.inference_mode()
def beam_search(
    model: TigerModel,
    history: Tensor,
    *,
    beam: int,
    num_results: int | None = None,
    node_vectors: list[Tensor] | None = None,
    user: Tensor | None = None,
    excluded_items: Tensor | None = None,
    allowed_nodes: list[Tensor] | None = None,
    bonus: list[Tensor] | None = None,
    kept: list[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the best items of each user, best first.

    Args:
        history: int64 [B, N] items, PAD in front of shorter histories.
        beam: prefixes that are kept at each level; a beam of the catalog's size is exact.
        num_results: items that come back, as many as the beam by default; more are those that the last prefixes lead
            to.
        node_vectors: `model.node_vectors()`, made once for many searches; by default they are made here.
        user: int64 [B] user tokens, if the model has them.
        excluded_items: int64 [B, X] items that must not come back, of each user, padded with -1; left out at the last
            level.
        allowed_nodes: `trie.allowed_nodes(items)`, a filter for all users; followed at every level, so that the beam
            contains only prefixes of allowed items.
        bonus: per level float32 [nodes], added to the logits; see `new_item_bonus`.
        kept: if given, the beam of every level is appended: nodes int64 [B, W] and scores float32 [B, W], best first.

    Returns:
        items int64 [B, R] and scores float32 [B, R], R at most `num_results`; item -1 with score -inf if fewer exist.
    """
    trie, encoded = model.trie, model.encode(history, user)
    if node_vectors is None:
        node_vectors = model.node_vectors()
    batch, num_results = len(history), num_results or beam
    nodes = history.new_zeros(batch, 1)
    scores = torch.zeros(batch, 1, device=history.device)
    codes: Tensor | None = None
    cache: list[KVCache] = []
    over_level = model.config.softmax == "codes" and model.config.softmax_support == "level"
    # If the last code is certain, nothing is to be decided there.
    last_is_certain = (trie.level_sizes if over_level else trie.max_children)[-1] == 1
    for level in range(trie.depth):
        children, exists = trie.expand(nodes, level)
        if last_is_certain and level == trie.depth - 1:
            log_probs = scores.new_zeros(exists.shape)
        else:
            state, cache = model.decoder.step(model.items, level, codes, cache, encoded)
            log_probs = model.softmax.log_probs(
                model.items, trie, level, state, encoded, nodes, children, exists, node_vectors,
                None if bonus is None else bonus[level],
            )  # fmt: skip
        log_probs += scores[..., None]  # in place, as what follows: of beams x children there are many
        if allowed_nodes is not None:
            log_probs.masked_fill_(~allowed_nodes[level][children], -torch.inf)
        if excluded_items is not None and level == trie.depth - 1:
            log_probs.masked_fill_(_are_among(trie.leaf_items[children], excluded_items), -torch.inf)
        # A beam may be empty (-inf) if there are too few items.
        candidates = log_probs.flatten(1)
        width = min(beam if level < trie.depth - 1 else num_results, candidates.shape[1])
        scores, chosen = candidates.topk(width, dim=1)
        nodes = children.flatten(1).gather(1, chosen)
        codes = trie.node_codes(level)[nodes] + model.items.level_offsets[level]
        if kept is not None:
            kept.append((nodes, scores))
        if level + 1 < trie.depth:
            cache = reorder_cache(cache, chosen // children.shape[-1])
    return torch.where(scores > -torch.inf, trie.leaf_items[nodes], -1), scores


def _are_among(items: Tensor, others: Tensor) -> Tensor:
    """Return which items [B, ...] are among the others [B, X] of their row, without a table of all pairs."""
    ascending = others.sort(dim=1).values
    flat = items.flatten(1)
    position = torch.searchsorted(ascending, flat).clamp_max(ascending.shape[1] - 1)
    return (ascending.gather(1, position) == flat).view_as(items)


def new_item_bonus(model: TigerModel, boost: float) -> list[Tensor] | None:
    """Return what `boost` adds to the logits of nodes, per level float32 [nodes], for items without a learned vector.

    At a leaf it is the boost itself. An inner node with a fraction f of new items below it gets log(1 - f + f e^boost),
    as if all its items were equally likely.
    """
    if not boost or model.config.softmax != "trie":
        return None
    trie = model.trie
    new = trie.sum_below((~model.items.known).to(torch.int64))
    fractions = [count / trie.num_items_below(level) for level, count in enumerate(new)]
    return [(1 - fraction + fraction * torch.e**boost).log() for fraction in fractions]


@torch.inference_mode()
def score_all_items(model: TigerModel, history: Tensor, user: Tensor | None = None) -> Tensor:
    """Return the score of every item, float32 [B, items], from the loss of each as a target: slow, without any search.

    Args:
        history: int64 [B, N] items; the model is on the CPU.
    """
    trie, num_items = model.trie, len(model.trie.leaf_items)
    items = torch.arange(num_items)
    siblings = trie.sibling_tensors(items.numpy()) if needs_siblings(model.config) else []
    rows = []
    for index in range(len(history)):
        repeated = history[index : index + 1, -model.encoder.context :].expand(num_items, -1)
        if model.encoder.causal:
            sequence, ones = torch.cat([repeated, items[:, None]], dim=1), torch.ones(num_items, dtype=torch.int64)
            positions = torch.arange(1, num_items + 1) * repeated.shape[1] - 1
            losses = model(sequence, ones, positions, *siblings)
        else:
            users = None if user is None else user[index : index + 1].expand(num_items)
            losses = model(repeated, items, users, *siblings)
        rows.append(-losses.sum(1))
    return torch.stack(rows)
