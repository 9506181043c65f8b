"""Codes -> semantic IDs: one unique tuple per item.

Collisions (items with equal codes) are resolved by policy: reassign items to the nearest free codes of the last level,
append a code that numbers them, or raise an error. Collisions are between items with the same first codes, so that the
items of different prefixes are resolved independently (`resolve`), by several tasks for large catalogs; the result is
deterministic given the codes, regardless of how they were computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from tiger.core.artifacts import Artifact, open_artifact
from tiger.core.config import Config
from tiger.core.errors import ArtifactError, DataError
from tiger.core.row_groups import groups_of, regroup, write_row_groups
from tiger.core.storage import Folder

Costs = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.floating]]

_GROUP_ROWS = 1 << 20  # items per row group of ids.parquet
_COSTS_AT_ONCE = 16_384  # items whose costs are in memory at a time


class SemanticIdsConfig(Config):
    """Collision policy."""

    collision_policy: Literal["extra_code", "nearest_free", "error"] = Field(
        "nearest_free",
        description="items with equal codes: extra_code: append a code that numbers them; nearest_free: reassign them "
        "to the nearest free codes of the last level, and append a code only if needed; error: raise an error",
    )
    items_per_id: int = Field(
        1, ge=1, description="maximum items per tuple of codes, with collision_policy = nearest_free"
    )
    collision_codes: int = Field(
        256, ge=1, le=32_767, description="size of the appended level: maximum items with equal codes"
    )


def packed(codes: npt.NDArray[np.integer], sizes: tuple[int, ...] | None = None) -> npt.NDArray[np.int64]:
    """Return one integer per row of codes, int64 [N], in the lexicographic order of the rows: it sorts 10x faster.

    Args:
        codes: [N, L], not negative.
        sizes: codes per level; by default the maximum of each column + 1. Keys with equal sizes can be compared.

    Raises:
        DataError: the levels have 2**63 tuples or more.
    """
    return _packed(codes, sizes or used_codes(codes), np.zeros(len(codes), np.int64))


def used_codes(codes: npt.NDArray[np.integer]) -> tuple[int, ...]:
    """Return the maximum of each column of codes [N, L], plus 1."""
    return tuple(int(column.max(initial=0)) + 1 for column in codes.T)


def sorted_keys(
    codes: npt.NDArray[np.integer], sizes: tuple[int, ...] | None = None
) -> npt.NDArray[np.int32] | npt.NDArray[np.int64]:
    """Return `packed(codes, sizes)` in ascending order, in 4 bytes per row where these suffice, else in 8."""
    sizes = sizes or used_codes(codes)
    keys = _packed(codes, sizes, np.zeros(len(codes), np.int32 if math.prod(sizes) < 2**31 else np.int64))
    keys.sort()
    return keys


def _packed(codes: npt.NDArray[np.integer], sizes: tuple[int, ...], keys: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Fill `keys`, zeros [N], in place."""
    if math.prod(sizes) >= 2**63:
        raise DataError(f"levels of {sizes} codes have 2**63 tuples or more; use fewer or smaller levels")
    for column, size in zip(codes.T, sizes, strict=True):
        keys *= size
        keys += column
    return keys


class SemanticIds:
    """The unique IDs of items 0 .. N-1, with lookup of items by ID.

    Attributes:
        codes: int16 [N, L] or [N, L+1], row = item_id; the last column is the collision code if one was needed.
        level_sizes: number of codes per level.
        levels: L, the number of codes from the tokenizer.
    """

    def __init__(self, codes: npt.NDArray[np.int16], level_sizes: tuple[int, ...], levels: int | None = None) -> None:
        """Check the IDs.

        Args:
            codes: int16 [N, L] or [N, L+1].
            level_sizes: number of codes per level.
            levels: number of codes from the tokenizer; None: all except the last.

        Raises:
            ArtifactError: two items share an ID, or a code is outside its level.
        """
        if codes.shape[1] != len(level_sizes):
            raise ArtifactError(f"semantic IDs have {codes.shape[1]} codes, and sizes of {len(level_sizes)} levels")
        used = used_codes(codes)
        if codes.min(initial=0) < 0 or any(own > size for own, size in zip(used, level_sizes, strict=True)):
            item = int(((codes < 0) | (codes >= np.array(level_sizes))).any(axis=1).argmax())
            raise ArtifactError(f"semantic ID of item {item}, {codes[item].tolist()}, is out of range {level_sizes}")
        self.codes, self.level_sizes = codes, tuple(level_sizes)
        self.levels = len(level_sizes) - 1 if levels is None else levels
        keys = sorted_keys(codes, used)
        same = keys[1:] == keys[:-1]
        if same.any():
            first, second = self.sorted_items[same.argmax() :][:2]
            raise ArtifactError(f"items {first} and {second} share the semantic ID {codes[first].tolist()}")

    def __len__(self) -> int:
        return len(self.codes)

    @cached_property
    def _sorted(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Packed IDs in ascending order, and their items."""
        keys = packed(self.codes, self.level_sizes)
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    @property
    def sorted_items(self) -> npt.NDArray[np.int64]:
        """Items in the lexicographic order of their IDs, int64 [N]."""
        return self._sorted[1]

    @cached_property
    def unique_before(self) -> npt.NDArray[np.bool_]:
        """Whether each item's codes are unique without the collision level, bool [N]."""
        sizes = self.level_sizes[: self.levels]
        if sizes == self.level_sizes:
            return np.ones(len(self), bool)
        keys = sorted_keys(self.codes[:, : self.levels], sizes)
        shared = np.unique(keys[1:][keys[1:] == keys[:-1]])
        del keys
        parts = (self.codes[begin : begin + _GROUP_ROWS, : self.levels] for begin in range(0, len(self), _GROUP_ROWS))
        return np.concatenate([np.zeros(0, bool), *(~np.isin(packed(part, sizes), shared) for part in parts)])

    @property
    def collisions(self) -> npt.NDArray[np.int16]:
        """The collision code of every item, int16 [N]; 0 if there is no collision level."""
        return self.codes[:, self.levels] if self.codes.shape[1] > self.levels else np.zeros(len(self), np.int16)

    def item_of(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Return the items int64 [M] of semantic IDs [M, L] or [M, L+1]; -1 for an ID without an item."""
        queries = np.asarray(codes).reshape(-1, self.codes.shape[1])
        in_range = np.all((queries >= 0) & (queries < np.array(self.level_sizes)), axis=1)
        keys, order = self._sorted
        query_keys = packed(np.where(in_range[:, None], queries, 0), self.level_sizes)
        index = np.minimum(np.searchsorted(keys, query_keys), len(keys) - 1)
        return np.where(in_range & (keys[index] == query_keys), order[index], -1)

    @classmethod
    def load(cls, run: str | Artifact) -> SemanticIds:
        """Open a semantic_ids artifact, or its folder.

        Raises:
            ArtifactError: it is missing, incomplete, or not semantic IDs.
        """
        artifact = open_artifact(run, expected_kind="semantic_ids") if isinstance(run, str) else run
        return cls.read(artifact.folder)

    @classmethod
    def read(cls, folder: Folder) -> SemanticIds:
        """Read ids.parquet and levels.json.

        Raises:
            ArtifactError: the codes are not lists of integers, the item ids are not in order, or the IDs are invalid.
        """
        table = folder.read_table("ids.parquet", ["item_id", "codes"]).combine_chunks()
        kind = table.schema.field("codes").type if "codes" in table.column_names else pa.null()
        if not (isinstance(kind, pa.ListType | pa.FixedSizeListType) and pa.types.is_integer(kind.value_type)):
            raise ArtifactError(f"{folder.uri}/ids.parquet: codes are not lists of integers")
        lists = table["codes"].combine_chunks()
        codes = np.asarray(lists.flatten()).reshape(len(lists), -1)
        items = np.asarray(table["item_id"])
        if not np.array_equal(items, np.arange(len(items), dtype=np.int32)):
            raise ArtifactError(f"{folder.uri}/ids.parquet: item_id is not 0 .. {len(items) - 1} in order")
        levels = folder.read_json("levels.json")
        return cls(codes, tuple(levels["level_sizes"]), levels["levels"])

    def _row_groups(self, items: Iterable[pa.Table]) -> Iterator[pa.Table]:
        width, unique, begin = self.codes.shape[1], self.unique_before, 0
        for names in regroup(items, groups_of(_GROUP_ROWS)):
            end = begin + len(names)
            columns = {
                "item_id": np.arange(begin, end, dtype=np.int32),
                "source_id": names["source_id"],
                "codes": pa.FixedSizeListArray.from_arrays(pa.array(self.codes[begin:end].ravel()), width),
                "unique": unique[begin:end],
            }
            yield pa.table(columns)
            begin = end
        assert begin == len(self), f"{len(self)} semantic IDs, {begin} items"

    def write(self, folder: Folder, items: Iterable[pa.Table]) -> None:
        """Write ids.parquet (item_id int32, source_id, codes int16 [L or L+1], unique bool) and levels.json.

        Args:
            folder: the folder.
            items: tables with the column `source_id`, of all items in their order.
        """
        write_row_groups(folder, "ids.parquet", self._row_groups(items))
        folder.write_json("levels.json", {"level_sizes": list(self.level_sizes), "levels": self.levels})


def assign(
    codes: npt.NDArray[np.integer], codebook_size: int, config: SemanticIdsConfig, costs: Costs | None = None
) -> SemanticIds:
    """Assign unique IDs to items whose codes may collide.

    The collision level, if it is needed, numbers items with equal codes 0, 1, 2, ... in the order of their item ids.

    Args:
        codes: [N, L], row = item_id, each in [0, codebook_size).
        codebook_size: number of codes per level.
        config: the collision policy.
        costs: items [n] -> cost of every last-level code for each item, [n, codebook_size]; required by `nearest_free`.

    Raises:
        DataError: the policy is `error` and items share codes, or more items share one tuple than the collision level
            has codes; reports the group and some of its items.
    """
    resolved = resolve(codes, codebook_size, config, costs)
    return make_ids(resolved.codes, resolved.collisions, [resolved.sharing], codebook_size, config)


@dataclass(frozen=True)
class Sharing:
    """Items that share their codes, of all items or of those of some prefixes.

    Attributes:
        items: number of items that share their codes with others.
        largest: size of the largest group.
        named: the largest group, the first one of several in the order of codes, for messages.
    """

    items: int
    largest: int
    named: str


@dataclass(frozen=True)
class Resolved:
    """Codes after the reassignment of `nearest_free`, and numbers of the items that still share them.

    Attributes:
        codes: int16 [N, L].
        collisions: int32 [N], 0, 1, ... within a group of equal codes, in the order of the items.
        sharing: the groups.
    """

    codes: npt.NDArray[np.int16]
    collisions: npt.NDArray[np.int32]
    sharing: Sharing


def resolve(
    codes: npt.NDArray[np.integer],
    codebook_size: int,
    config: SemanticIdsConfig,
    costs: Costs | None = None,
    items: npt.NDArray[np.integer] | None = None,
) -> Resolved:
    """Resolve the collisions of all items whose codes begin with some prefixes of L - 1 codes.

    Args:
        codes: [N, L], in the order of the items.
        codebook_size: number of codes per level.
        config: the collision policy.
        costs: rows [n] -> cost of every last-level code for each, see `assign`.
        items: item ids [N], for messages; None: 0 .. N-1.
    """
    if config.collision_policy == "nearest_free":
        if costs is None:
            raise ValueError("collision_policy = nearest_free requires the costs of the last level's codes")
        codes = separate(codes, codebook_size, costs, config.items_per_id)
    order, starts, sizes = _groups(packed(codes))
    collision = np.empty(len(codes), np.int32)
    collision[order] = np.arange(len(codes)) - np.repeat(starts, sizes)
    largest = int(sizes.argmax())
    members = order[starts[largest] : starts[largest] + sizes[largest]]
    shown = (members if items is None else items[members])[:5].tolist()
    named = f"{len(members):,} items with {tuple(codes[members[0]].tolist())}, including {shown}"
    sharing = Sharing(int(sizes[sizes > 1].sum()), int(sizes[largest]), named)
    return Resolved(codes.astype(np.int16), collision, sharing)


def make_ids(
    codes: npt.NDArray[np.int16],
    collisions: npt.NDArray[np.integer],
    sharing: Sequence[Sharing],
    codebook_size: int,
    config: SemanticIdsConfig,
) -> SemanticIds:
    """Return the IDs of all items from the parts of `Resolved`, with a collision level if one is needed.

    Args:
        codes: of all items.
        collisions: of all items.
        sharing: of the parts, in the order of their codes.
        codebook_size: number of codes per level.
        config: the collision policy.

    Raises:
        DataError: see `assign`.
    """
    largest = max(sharing, key=lambda part: part.largest)
    if largest.largest > 1 and config.collision_policy == "error":
        raise DataError(
            f"{sum(part.items for part in sharing):,} items share their codes with others, and "
            f"semantic_ids.collision_policy is error; the largest group is {largest.named}"
        )
    if largest.largest > config.collision_codes:
        fix = "increase semantic_ids.collision_codes or tokenizer.codebook_size"
        if config.collision_policy == "extra_code":
            fix = "set semantic_ids.collision_policy = nearest_free, or increase semantic_ids.collision_codes"
        raise DataError(
            f"{largest.largest:,} items share their codes, but the collision level has {config.collision_codes} codes "
            f"(semantic_ids.collision_codes): {largest.named}: are their texts equal? If they should be, {fix}"
        )
    level_sizes = (codebook_size,) * codes.shape[1]
    if config.collision_policy != "extra_code" and largest.largest == 1:
        return SemanticIds(codes, level_sizes, codes.shape[1])
    unique = np.concatenate([codes, collisions.astype(np.int16, copy=False)[:, None]], axis=1)
    return SemanticIds(unique, (*level_sizes, config.collision_codes), codes.shape[1])


def separate(
    codes: npt.NDArray[np.integer], codebook_size: int, costs: Costs, capacity: int = 1
) -> npt.NDArray[np.int64]:
    """Reassign items with equal codes to other codes of the last level, at minimum total cost.

    If a tuple has more items than `capacity`, all items that share its prefix are assigned again, with at most
    `capacity` items per code of the last level (the assignment problem). Items beyond capacity x codebook_size are
    distributed over all last codes, codebook_size items at a time, so that few items need a collision code.

    Args:
        codes: [N, L].
        codebook_size: number of codes of the last level.
        costs: items [n] -> [n, codebook_size].
        capacity: maximum items per tuple.

    Returns:
        int64 [N, L]; all columns except the last are unchanged.
    """
    from scipy.optimize import linear_sum_assignment  # imported lazily: it takes a second per process

    moved = codes.astype(np.int64)
    order, starts, sizes = _groups(packed(moved))
    crowded = np.zeros(len(codes), bool)
    crowded[order] = np.repeat(sizes > capacity, sizes)
    prefixes = packed(moved[:, :-1]) if codes.shape[1] > 1 else np.zeros(len(codes), np.int64)
    items = np.flatnonzero(np.isin(prefixes, np.unique(prefixes[crowded])))
    order, starts, _ = _groups(prefixes[items])
    items, ends = items[order], np.append(starts[1:], len(items))
    begin = 0
    while begin < len(starts):
        # Whole groups, as many as fit into one chunk of costs.
        until = max(begin + 1, int(np.searchsorted(ends, starts[begin] + _COSTS_AT_ONCE, side="right")))
        piece = costs(items[starts[begin] : ends[until - 1]])
        for start, end in zip(starts[begin:until], ends[begin:until], strict=True):
            offset = starts[begin]
            group = piece[start - offset : end - offset]
            rows, columns = linear_sum_assignment(np.tile(group, capacity))
            moved[items[start:end][rows], -1] = columns % codebook_size
            left = np.setdiff1d(np.arange(len(group)), rows)
            for first in range(0, len(left), codebook_size):
                beyond = left[first : first + codebook_size]
                rows, columns = linear_sum_assignment(group[beyond])
                moved[items[start:end][beyond[rows]], -1] = columns
        begin = until
    return moved


def _groups(
    keys: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Group rows by key: rows sorted by key (stable), first position of each key, number of rows of each key."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(keys)])
    return order, starts, np.diff(np.append(starts, len(keys)))
