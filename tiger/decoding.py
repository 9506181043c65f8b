"""Beam search that can only end on real items.

All users and beams of a batch go through the model together. The history is encoded once a user and its keys and values
are shared by the user's beams, which are further queries; copying them per beam is what makes other implementations
slow. A score is the item's log-probability under the model, not renormalised over what the trie allows; where the model
has a dense head, it orders the generated candidates: a score is then its inner product, or a mixture (`dense_share`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiger.model import GenerativeRecommender
from tiger.trie import Trie

_CANDIDATES_PER_BEAM = 4
"""Leaves that a dense head orders: more than the beam's width cost it little, and it often prefers one of them."""


@torch.inference_mode()
def beam_search(
    model: GenerativeRecommender,
    trie: Trie,
    history: Tensor,
    *,
    beam: int,
    results: int | None = None,
    keys: Tensor | None = None,
    user: Tensor | None = None,
    exclude: Tensor | None = None,
    alive: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The best items of each user, best first.

    Args:
        history: int64 [B, N, C] columns of items, PAD in front of shorter histories.
        beam: prefixes that are kept at each level; a beam of the catalog's size is exact.
        results: items that come back, as many as the beam by default; more are those that the last prefixes lead to.
        keys: `model.item_keys()`, made once for many searches; by default they are made here.
        user: int64 [B] user tokens, where the model has them.
        exclude: int64 [B, X] items that must not come back, of each user, padded with -1; left out at the last level.
        alive: `trie.reachable(items)`, a filter for all users; followed at every level, so that the beam stays full.

    Returns:
        items int64 [B, R] and scores float32 [B, R], R at most `results`; item -1 with score -inf where fewer exist.
    """
    memory = model.encode(history, user)
    batch, results = len(history), results or beam
    ordered_by_both = model.dense > 0 and model.dense_share > 0
    leaves = max(results, _CANDIDATES_PER_BEAM * beam) if ordered_by_both else results
    nodes = history.new_zeros(batch, 1)
    scores = torch.zeros(batch, 1, device=history.device)
    codes, past = None, None
    for level in range(trie.depth):
        log_probabilities, past = model.step(level, codes, past, memory)
        children, child_codes, exists = trie.expand(nodes, level, alive[level] if alive else None)
        candidates = scores[..., None] + log_probabilities.gather(-1, child_codes)
        if exclude is not None and level == trie.depth - 1:
            items = trie.leaf_items[children]
            exists = exists & ~(items[..., None] == exclude[:, None, None, :]).any(-1)
        candidates = candidates.masked_fill(~exists, -torch.inf)
        width = candidates.shape[-1]
        keep = min(beam if level < trie.depth - 1 else leaves, candidates[0].numel())
        scores, chosen = candidates.flatten(1).topk(keep, dim=1)
        nodes = children.flatten(1).gather(1, chosen)
        codes = child_codes.flatten(1).gather(1, chosen)
        if level < trie.depth - 1:
            rows = (
                torch.arange(batch, device=chosen.device)[:, None] * candidates.shape[1] + chosen // width
            ).flatten()
            past = [(key[rows], value[rows]) for key, value in past]
    items = torch.where(scores > -torch.inf, trie.leaf_items[nodes], -1)
    if ordered_by_both:
        keys = model.item_keys() if keys is None else keys
        inner = (keys[items.clamp_min(0)] @ memory.query[:, :, None]).squeeze(2).float()
        scores = _mixed(model, scores, inner).masked_fill(items < 0, -torch.inf)
        scores, chosen = scores.topk(min(results, scores.shape[1]), dim=1)
        items = items.gather(1, chosen)
    return items, scores


def _mixed(model: GenerativeRecommender, log_probability: Tensor, inner: Tensor) -> Tensor:
    if model.dense_share == 1:  # not 0 x -inf
        return inner
    return (1 - model.dense_share) * log_probability + model.dense_share * inner


@torch.inference_mode()
def score_all(model: GenerativeRecommender, ids: Tensor, history: Tensor, user: Tensor | None = None) -> Tensor:
    """Score float32 [B, items] of every item, without any search: the truth that beam search is held against.

    Args:
        ids: int64 [items, C] columns of the items, all of them and in their order.
    """
    rows = []
    for index in range(len(history)):
        repeated = history[index : index + 1].expand(len(ids), -1, -1)
        if model.fast:
            sequence = torch.cat([repeated[:, -model.max_items :], ids[:, None]], dim=1)
            losses, _ = model.losses(sequence, torch.ones(len(ids), dtype=torch.int64, device=ids.device))
        else:
            users = None if user is None else user[index : index + 1].expand(len(ids))
            losses, _ = model.losses(repeated, ids, users)
        rows.append(-losses * len(model.level_sizes))
    scores = torch.stack(rows)
    if model.dense and model.dense_share:
        scores = _mixed(model, scores, model.encode(history, user).query @ model.item_keys().T)
    return scores
