"""What is done with ranked candidates: sampling, a limit per group, and seeds of users."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def sample_top_k(items: Tensor, scores: Tensor, k: int, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample `k` items of longer lists without replacement, in the order of their draws.

    Probabilities are proportional to exp(score / temperature) (Gumbel top-k: Kool et al. 2019).

    Args:
        items, scores: [B, R] as `beam_search` returns them.
        temperature: above 0.
        noise: float [B, R] uniform in (0, 1).
    """
    gumbel = -torch.log(-torch.log(noise))
    order = (scores.double() / temperature + gumbel).argsort(dim=1, descending=True, stable=True)[:, :k]
    return items.gather(1, order), scores.gather(1, order)


def limit_per_group(items: Tensor, scores: Tensor, k: int, groups: Tensor, max_per_group: int) -> tuple[Tensor, Tensor]:
    """Keep the first `k` items of longer lists of which at most `max_per_group` share a group.

    Args:
        items, scores: [B, R], best first, item -1 for none.
        groups: int64 [items], the group of every item.
    """
    group = torch.where(items < 0, -1, groups[items.clamp_min(0)])
    same_before = (group[:, :, None] == group[:, None, :]) & torch.ones(
        group.shape[1], group.shape[1], dtype=torch.bool, device=group.device
    ).tril(-1)
    over_limit = (same_before.sum(2) >= max_per_group) | (items < 0)
    order = over_limit.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
    dropped = over_limit.gather(1, order)
    return items.gather(1, order).masked_fill(dropped, -1), scores.gather(1, order).masked_fill(dropped, -torch.inf)


def hash_users(source_ids: Sequence[str], buckets: int) -> npt.NDArray[np.int64]:
    """Return a number of each user in [0, buckets): a stable hash of the user's id, unlike Python's `hash`."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in source_ids)
    return np.fromiter((int.from_bytes(digest, "little") % buckets for digest in digests), np.int64, len(source_ids))
