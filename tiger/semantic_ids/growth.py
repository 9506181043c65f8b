"""Semantic IDs of new items next to published ones, which never change.

A new item gets the nearest codes of the frozen tokenizer if an ID with them is free. Otherwise the new items of a
crowded prefix share its free codes of the last level at minimum total cost, and those for which no code is left go to
the nearest prefix with a free one. IDs of deleted items are not free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiger.core.errors import DataError
from tiger.semantic_ids.assignment import Costs, SemanticIds, SemanticIdsConfig, assign, packed

Codes = npt.NDArray[np.int64]

TOLERANCE = 0.1
"""How much larger the error of a published ID may be than that of the nearest codes after the next training."""

Errors = Callable[[Codes, Codes], npt.NDArray[np.floating]]

Elsewhere = Callable[[int], Iterable[tuple[Codes, npt.NDArray[np.floating]]]]
"""Position of a new item -> batches of other codes [M, L] with their costs [M], nearest prefixes first."""


@dataclass(frozen=True)
class Growth:
    """Semantic IDs of all items, and what became of the new ones.

    Attributes:
        ids: of the published items, unchanged, and then of the new ones.
        moved: bool [n], whether each new item has other codes than the nearest ones.
        displaced: number of new items whose prefix was full.
    """

    ids: SemanticIds
    moved: npt.NDArray[np.bool_]
    displaced: int


def append_ids(
    ids: SemanticIds, nearest: Codes, config: SemanticIdsConfig, costs: Costs, elsewhere: Elsewhere
) -> Growth:
    """Return semantic IDs with new items behind the published ones.

    Args:
        ids: the published IDs.
        nearest: int64 [n, L], the tokenizer's codes of the new items.
        config: the collision policy with which the published IDs were made.
        costs: positions of new items [m] -> cost of every last-level code after their earlier codes, [m, codes].
        elsewhere: other codes for an item whose prefix is full.

    Raises:
        DataError: there is no free ID for a new item, or the policy is `error` and there is none with its codes.
    """
    rooms = _Rooms(ids, config)
    final = nearest.astype(np.int64).copy()
    placed = np.zeros(len(nearest), bool)
    for group in _groups(rooms.prefix_keys(nearest)):
        _place_group(group, nearest, final, placed, rooms, costs, config)
    left = np.flatnonzero(~placed)
    if len(left) and config.collision_policy == "error":
        raise DataError(
            f"{len(left):,} new items have the codes of others, and semantic_ids.collision_policy is error; the first "
            f"of them is the new item {left[0]}: is it already in the catalog under another id?"
        )
    for item in left.tolist():
        _place_elsewhere(item, final, rooms, elsewhere)
    new = np.concatenate([final, rooms.collision_codes(final)[:, None]], axis=1) if rooms.has_level else final
    grown = SemanticIds(np.concatenate([ids.codes, new.astype(np.int16)]), ids.level_sizes, ids.levels)
    return Growth(grown, (final != nearest).any(axis=1), len(left))


def align_ids(
    nearest: Codes,
    published: SemanticIds,
    before: npt.NDArray[np.int64],
    config: SemanticIdsConfig,
    codebook_size: int,
    costs: Costs,
    elsewhere: Elsewhere,
    errors: Errors,
) -> SemanticIds:
    """Return IDs of the items of a new training, in which published items keep their IDs as far as these fit.

    An ID fits if the new tokenizer gives the item the same codes except for the last one, or if its codes are nearly as
    good as the nearest ones (`TOLERANCE`). Other items are placed next to those that stay.

    Args:
        nearest: int64 [N, L], codes of all items by the new tokenizer.
        published: IDs of before.
        before: int64 [N], index of each item among the published ones; -1: it is new.
        config: the collision policy.
        codebook_size: number of codes per level.
        costs: as for `append_ids`, of positions in `nearest`.
        elsewhere: as for `append_ids`.
        errors: items [n], codes [n, L] -> error of each item under the new tokenizer, [n].
    """
    sizes = (codebook_size,) * nearest.shape[1]
    if published.level_sizes[: published.levels] != sizes:
        return assign(nearest, codebook_size, config, costs)
    codes = published.codes[before.clip(0)]
    known = np.flatnonzero(before >= 0)
    fits = np.zeros(len(nearest), bool)
    given = codes[known, : len(sizes)].astype(np.int64)
    same_prefix = (given[:, :-1] == nearest[known, :-1]).all(axis=1)
    fits[known] = same_prefix | (errors(known, given) <= (1 + TOLERANCE) * errors(known, nearest[known]))
    stay, rest = np.flatnonzero(fits), np.flatnonzero(~fits)
    if not len(stay):
        return assign(nearest, codebook_size, config, costs)
    kept = SemanticIds(codes[stay], published.level_sizes, published.levels)
    grown = append_ids(
        kept, nearest[rest], config, lambda items: costs(rest[items]), lambda item: elsewhere(int(rest[item]))
    ).ids
    ordered = np.empty_like(grown.codes)
    ordered[np.concatenate([stay, rest])] = grown.codes
    return SemanticIds(ordered, grown.level_sizes, grown.levels)


class _Rooms:
    """How many items each tuple of codes can still take."""

    def __init__(self, ids: SemanticIds, config: SemanticIdsConfig) -> None:
        self.sizes = ids.level_sizes[: ids.levels]
        self.codes = self.sizes[-1]
        self.has_level = ids.codes.shape[1] > ids.levels
        keys = packed(ids.codes[:, : ids.levels], self.sizes)
        order = np.argsort(keys, kind="stable")
        self.sorted_keys, self.sorted_collisions = keys[order], ids.collisions[order]
        self.keys, self.counts = np.unique(keys, return_counts=True)
        limit = ids.level_sizes[-1] if self.has_level else 1
        self.capacity = limit if config.collision_policy == "extra_code" else min(limit, config.items_per_id)
        self.taken: dict[int, npt.NDArray[np.int64]] = {}

    def prefix_keys(self, codes: Codes) -> npt.NDArray[np.int64]:
        """Return a number per tuple [n, L] of its codes but the last, int64 [n]."""
        return packed(codes, self.sizes) // self.codes

    def under(self, prefix: int) -> npt.NDArray[np.int64]:
        """Return the room of every last-level code under a prefix, int64 [codes]."""
        if prefix not in self.taken:
            begin, end = np.searchsorted(self.keys, [prefix * self.codes, (prefix + 1) * self.codes])
            taken = np.zeros(self.codes, np.int64)
            taken[self.keys[begin:end] - prefix * self.codes] = self.counts[begin:end]
            self.taken[prefix] = taken
        return np.maximum(self.capacity - self.taken[prefix], 0)

    def take(self, prefix: int, codes: npt.NDArray[np.int64]) -> None:
        """Give codes under a prefix to as many items."""
        np.add.at(self.taken[prefix], codes, 1)

    def collision_codes(self, codes: Codes) -> npt.NDArray[np.int64]:
        """Return the collision codes of new items with codes [n, L]: the lowest that no published item has."""
        keys = packed(codes, self.sizes)
        numbers = np.empty(len(keys), np.int64)
        for group in _groups(keys):
            begin, end = np.searchsorted(self.sorted_keys, [keys[group[0]], keys[group[0]] + 1])
            taken = self.sorted_collisions[begin:end]
            free = np.setdiff1d(np.arange(len(taken) + len(group)), taken)
            numbers[group] = free[: len(group)]
        return numbers


def _groups(keys: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Return the positions of equal keys, in the order of the keys."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1) if len(keys) else []


def _place_group(
    group: npt.NDArray[np.int64],
    nearest: Codes,
    final: Codes,
    placed: npt.NDArray[np.bool_],
    rooms: _Rooms,
    costs: Costs,
    config: SemanticIdsConfig,
) -> None:
    """Place the new items of one prefix under it, as many as there is room for."""
    from scipy.optimize import linear_sum_assignment  # imported lazily: it takes a second per process

    prefix = int(rooms.prefix_keys(nearest[group[:1]])[0])
    room, wanted = rooms.under(prefix), nearest[group, -1]
    if config.collision_policy == "nearest_free" and (np.bincount(wanted, minlength=rooms.codes) <= room).all():
        fits = np.ones(len(group), bool)
    elif config.collision_policy == "nearest_free":
        fits = np.zeros(len(group), bool)  # all of them are assigned together
    else:
        earlier = np.array([(wanted[:row] == wanted[row]).sum() for row in range(len(group))])
        fits = earlier < room[wanted]
    rooms.take(prefix, wanted[fits])
    placed[group[fits]] = True
    rest = group[~fits]
    if not len(rest) or config.collision_policy == "error":
        return
    free = np.repeat(np.arange(rooms.codes), np.minimum(rooms.under(prefix), len(rest)))
    rows, columns = linear_sum_assignment(costs(rest)[:, free])
    final[rest[rows], -1] = free[columns]
    rooms.take(prefix, free[columns])
    placed[rest[rows]] = True


def _place_elsewhere(item: int, final: Codes, rooms: _Rooms, elsewhere: Elsewhere) -> None:
    """Place an item at the nearest free codes of another prefix."""
    for codes, costs in elsewhere(item):
        prefixes = rooms.prefix_keys(codes)
        room = np.array([rooms.under(int(prefix))[code] for prefix, code in zip(prefixes, codes[:, -1], strict=True)])
        free = np.flatnonzero(room > 0)
        if len(free):
            best = free[int(np.argmin(costs[free]))]
            final[item] = codes[best]
            rooms.take(int(prefixes[best]), codes[best, -1:])
            return
    raise DataError(
        f"there is no free semantic ID near the new item {item}, whose codes are {final[item].tolist()}: train again "
        "with a larger tokenizer.codebook_size or more tokenizer.num_levels"
    )
