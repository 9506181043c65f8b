"""Beam search that can only end on real items.

All users and beams of a batch go through the model together. The history is encoded once a user and its keys and values
are shared by the user's beams, which are further queries; copying them per beam is what makes other implementations
slow. A score is the item's log-probability under the model, not renormalized over what the trie allows. Where the model
has a dense head, a score is the weighted mean of two log-probabilities, the generated one and the head's
(`dense_share`); by default the search is guided by what the head thinks of the items below a prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiger.models.tiger.layers import KVCache, reorder_cache
from tiger.models.tiger.model import Memory, TigerModel
from tiger.semantic_ids.trie import Trie

_CANDIDATES_PER_BEAM = 4
"""Leaves that a dense head orders: more than the beam's width cost it little, and it often prefers one of them."""


@torch.inference_mode()
def beam_search(
    model: TigerModel,
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
        keys: `model.item_embeddings()`, made once for many searches; by default they are made here.
        user: int64 [B] user tokens, where the model has them.
        exclude: int64 [B, X] items that must not come back, of each user, padded with -1; left out at the last level.
        alive: `trie.reachable(items)`, a filter for all users; followed at every level, so that the beam stays full.

    Returns:
        items int64 [B, R] and scores float32 [B, R], R at most `results`; item -1 with score -inf where fewer exist.
    """
    memory = model.encode(history, user)
    batch, results, share = len(history), results or beam, model.dense_share if model.dense else 0.0
    keys = model.item_embeddings() if share and keys is None else keys
    guide = None
    if share and model.dense_search == "guided":
        assert keys is not None
        of_head = dense_scores(model, memory, keys)
        if exclude is not None:  # a prefix is not worth what its excluded items are; -1 goes to a column of its own
            positions = torch.where(exclude < 0, of_head.shape[1], exclude)
            of_head = torch.nn.functional.pad(of_head, (0, 1)).scatter(1, positions, -torch.inf)[:, :-1]
        guide = trie.max_over_descendants(of_head, alive[-1] if alive else None)
    ordered_after = share > 0 and guide is None
    leaves = max(results, _CANDIDATES_PER_BEAM * beam) if ordered_after else results
    nodes = history.new_zeros(batch, 1)
    log_p = scores = torch.zeros(batch, 1, device=history.device)
    codes: Tensor | None = None
    past: list[KVCache] = []
    certain = model.level_sizes[-1] == 1  # the last code then, and nothing comes after it
    steps = trie.depth - certain
    for level in range(trie.depth):
        if level < steps:
            step_log_p, past = model.step(level, codes, past, memory)
        else:
            step_log_p = log_p.new_zeros(*nodes.shape, 1)
        children, child_codes, exists = trie.expand(nodes, level, alive[level] if alive else None)
        exists = exists & (scores > -torch.inf)[..., None]  # a beam may stand for nothing where there are too few items
        candidates = log_p[..., None] + step_log_p.gather(-1, child_codes)
        if exclude is not None and level == trie.depth - 1:
            items = trie.leaf_items[children]
            exists = exists & ~(items[..., None] == exclude[:, None, None, :]).any(-1)
        width = candidates.shape[-1]
        flat_log_p, children = candidates.flatten(1), children.flatten(1)
        worth = flat_log_p if guide is None else (1 - share) * flat_log_p + share * guide[level].gather(1, children)
        keep = min(beam if level < trie.depth - 1 else leaves, worth.shape[1])
        scores, chosen = worth.masked_fill(~exists.flatten(1), -torch.inf).topk(keep, dim=1)
        nodes, log_p = children.gather(1, chosen), flat_log_p.gather(1, chosen)
        codes = child_codes.flatten(1).gather(1, chosen)
        if level + 1 < steps:
            past = reorder_cache(past, chosen // width)
    items = torch.where(scores > -torch.inf, trie.leaf_items[nodes], -1)
    if ordered_after:
        assert keys is not None
        of_head = model.dense_logits_of(memory.query, keys[items.clamp_min(0)], memory.last, items)
        scores = _mixed(share, scores, of_head).masked_fill(items < 0, -torch.inf)
        scores, chosen = scores.topk(min(results, scores.shape[1]), dim=1)
        items = items.gather(1, chosen)
    return items, scores


def dense_scores(model: TigerModel, memory: Memory, keys: Tensor) -> Tensor:
    """Log-probabilities float32 [B, items] that the dense head gives every item."""
    return model.dense_logits(memory.query, keys, memory.last).log_softmax(1)


def _mixed(share: float, log_probability: Tensor, of_head: Tensor) -> Tensor:
    if share == 1:  # not 0 x -inf
        return of_head
    return (1 - share) * log_probability + share * of_head


def vary(
    items: Tensor,
    scores: Tensor,
    k: int,
    *,
    temperature: float = 0.0,
    uniform: Tensor | None = None,
    groups: Tensor | None = None,
    per_group: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The `k` first of longer lists, drawn at a temperature, or spread over groups of alike items.

    Args:
        items, scores: [B, R] as `beam_search` gives them.
        temperature: above 0, items are drawn without replacement with probabilities proportional to
            exp(score / temperature) (Gumbel's trick: Kool et al. 2019), and stand in the order of their draw.
        uniform: float32 [B, R] in (0, 1), the randomness of that draw.
        groups: int64 [items], of every item the group that `per_group` counts, such as its first code.
        per_group: at most so many items of one group; a list gets shorter, padded with -1, where no others are left.

    Returns:
        items int64 [B, k] and their scores float32 [B, k].
    """
    order = scores
    if temperature > 0:
        assert uniform is not None
        order = scores / temperature - (-uniform.log()).log()
    rank = order.argsort(dim=1, descending=True, stable=True)
    items, scores = items.gather(1, rank), scores.gather(1, rank)
    if per_group is not None:
        assert groups is not None
        group = torch.where(items >= 0, groups[items.clamp_min(0)], -1)
        earlier = (group[:, :, None] == group[:, None, :]).tril(-1).sum(2)
        beyond = (earlier >= per_group) | (items < 0)
        rank = beyond.long().argsort(dim=1, stable=True)
        items = items.masked_fill(beyond, -1).gather(1, rank)
        scores = scores.masked_fill(beyond, -torch.inf).gather(1, rank)
    return items[:, :k], scores[:, :k]


@torch.inference_mode()
def score_all_items(model: TigerModel, ids: Tensor, history: Tensor, user: Tensor | None = None) -> Tensor:
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
        memory, keys = model.encode(history, user), model.item_embeddings()
        of_head = model.dense_logits(memory.query, keys, memory.last)
        of_head = of_head.log_softmax(1) if model.dense_search == "guided" else of_head
        scores = _mixed(model.dense_share, scores, of_head)
    return scores
