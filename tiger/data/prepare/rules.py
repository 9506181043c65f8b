"""The rules of the catalog for interactions, on arrays: duplicates, k-core, order, splits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]


def unrepeated(
    user: Ints, item: Ints, time: npt.NDArray[np.int64], duplicates: Literal["first", "all"]
) -> tuple[npt.NDArray[np.bool_], int, int]:
    """Apply rule 3.

    Returns:
        The interactions to keep, bool [E]; how many are equal to an earlier one; how many others are repeated.
    """
    order = np.lexsort((time, item, user))
    same = np.ones(max(len(order) - 1, 0), bool)
    for column in (user, item):
        ordered = column[order]
        same &= ordered[1:] == ordered[:-1]
    ordered_time = time[order]
    equal = same & (ordered_time[1:] == ordered_time[:-1])
    repeated = int((same & ~equal).sum()) if duplicates == "first" else 0
    kept = np.ones(len(user), bool)
    kept[order[1:][same if duplicates == "first" else equal]] = False
    return kept, int(equal.sum()), repeated


def in_core(
    user: Ints, item: Ints, num_users: int, alive: npt.NDArray[np.bool_] | None, k: int
) -> npt.NDArray[np.bool_]:
    """Return the interactions with items that are alive (None: all) and of users with at least `k` of them, bool [E].

    The k-core of all interactions is what is left when no item that is alive has fewer than `k` of them: items that
    have are no longer alive, and so on. All interactions of a user must be given.
    """
    kept = np.ones(len(user), bool) if alive is None else alive[item]
    if k > 1:
        kept &= (np.bincount(user[kept], minlength=num_users) >= k)[user]
    return kept


def dense(codes: Ints, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Renumber the codes below `size` that occur as 0, 1, ...; return (these codes in ascending order, new numbers)."""
    occurs = np.zeros(size, bool)
    occurs[codes] = True
    return np.flatnonzero(occurs), (np.cumsum(occurs, dtype=np.int32) - 1)[codes]


def in_order(
    user: Ints, item: Ints, time: npt.NDArray[np.int64], tie_break: Literal["file", "shuffle", "id"], seed: int
) -> npt.NDArray[np.int64]:
    """Return the order of interactions (rule 6): by user, time, `tie_break`; stable.

    Args:
        user: number of each interaction's user in the catalog.
        item: item ids in the catalog.
        time: microseconds since 1970.
        tie_break: order at equal times; `shuffle`: by a hash of user, item and `seed`, which no two interactions of a
            user at one time share.
        seed: seed of the shuffling.
    """
    if tie_break == "file":
        return np.lexsort((time, user))
    if tie_break == "id":
        return np.lexsort((item, time, user))
    return np.lexsort((item, _hashes(user, item, seed), time, user))


def _hashes(user: Ints, item: Ints, seed: int) -> npt.NDArray[np.uint64]:
    """Return pseudorandom numbers that are a function of (user, item, seed): SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed = np.full(len(user), seed, np.uint64)
        for values in (user, item):
            mixed += np.uint64(0x9E3779B97F4A7C15) + values.astype(np.uint64)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
    return mixed


def split_points(
    offsets: npt.NDArray[np.int64], time: npt.NDArray[np.int64], cuts: tuple[int, int] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the absolute positions [U] at which training and validation end (rule 7).

    Args:
        offsets: int64 [U + 1] of the users' interactions.
        time: of the interactions, in order.
        cuts: times at which validation and test begin, see `time_cuts`; None: leave-one-out.
    """
    begin, end = offsets[:-1], offsets[1:]
    if cuts is None:
        enough = end - begin >= 3  # a shorter history is only for training
        return np.where(enough, end - 2, end), np.where(enough, end - 1, end)
    before_valid, before_test = (np.concatenate([[0], np.cumsum(time < cut)]) for cut in cuts)
    return begin + before_valid[end] - before_valid[begin], begin + before_test[end] - before_test[begin]


Histogram = Callable[[int, int, int], npt.NDArray[np.int64]]
"""(first, last, width) -> how many times are in each interval of `width` from `first` on, up to `last` inclusive."""


def time_cuts(total: int, shares: Sequence[float], span: tuple[int, int], histogram: Histogram) -> tuple[int, ...]:
    """Return the quantiles of the times of all interactions, each the higher of the two around it.

    Args:
        total: number of interactions.
        shares: the quantiles, in [0, 1].
        span: two times, between which all times are.
        histogram: counts times; it is called a few times per quantile.
    """
    return tuple(_select(math.ceil((total - 1) * share), span, histogram) for share in shares)


def _select(rank: int, span: tuple[int, int], histogram: Histogram) -> int:
    """Return the time with `rank` times before it in ascending order, by narrowing down the range that contains it."""
    first, last = span
    while first < last:
        width = -(-(last - first + 1) // BINS)
        before = np.cumsum(histogram(first, last, width))
        chosen = int(np.searchsorted(before, rank, side="right"))
        rank -= int(before[chosen - 1]) if chosen else 0
        first = first + width * chosen
        last = min(first + width - 1, last)
    return first


BINS = 1 << 18
"""Intervals of a histogram of times, at most."""


def count_times(time: npt.NDArray[np.int64], first: int, last: int, width: int) -> npt.NDArray[np.int64]:
    """Return the histogram of times; see `Histogram`."""
    inside = time[(time >= first) & (time <= last)]
    since = inside.view(np.uint64) - np.int64(first).view(np.uint64)  # wraps around, also if the span is 2^64
    return np.bincount((since // np.uint64(width)).astype(np.int64), minlength=-(-(last - first + 1) // width))
