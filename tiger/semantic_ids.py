"""Codes -> semantic IDs: every item one unique tuple, by one more level that counts the items of equal codes.

One sort over all items, on one machine: 10 million items take seconds, and the result is a function of the codes alone.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from tiger.artifacts import Folder
from tiger.config import Config
from tiger.errors import ArtifactError, DataError


class SemanticIdsConfig(Config):
    """The level that resolves collisions."""

    collision_codes: int = Field(256, ge=1, le=32_767, description="items of equal codes that can be told apart")


def packed(codes: npt.NDArray[np.integer], sizes: tuple[int, ...] | None = None) -> npt.NDArray[np.int64]:
    """One integer per row of codes [N, L], in the lexical order of the rows: sorting it is ten times faster.

    Args:
        sizes: codes of every level; by default what the rows need. Rows packed with equal sizes can be compared.

    Raises:
        DataError: the levels have more than 2**63 tuples.
    """
    sizes = sizes or tuple(int(column.max(initial=0)) + 1 for column in codes.T)
    if math.prod(sizes) >= 2**63:
        raise DataError(f"levels of {sizes} codes have more than 2**63 tuples; use fewer or smaller levels")
    keys = np.zeros(len(codes), np.int64)
    for column, size in zip(codes.T, sizes, strict=True):
        keys *= size
        keys += column
    return keys


class SemanticIds:
    """The unique IDs of items 0 .. N-1 and the way back.

    Attributes:
        codes: int16 [N, L+1], row = item_id; the last column is the collision code.
        level_sizes: number of possible codes of each of the L+1 levels.
    """

    def __init__(self, codes: npt.NDArray[np.int16], level_sizes: tuple[int, ...]) -> None:
        """
        Raises:
            ArtifactError: two items share an ID, or a code is outside its level.
        """
        sizes = np.array(level_sizes)
        outside = ((codes < 0) | (codes >= sizes)).any(axis=1)
        if outside.any():
            item = int(outside.argmax())
            raise ArtifactError(f"semantic ID of item {item}, {codes[item].tolist()}, is outside of {level_sizes}")
        self.codes, self.level_sizes = codes, tuple(level_sizes)
        sorted_keys = self._sorted[0]
        same = np.flatnonzero(np.diff(sorted_keys) == 0)
        if len(same):
            first, second = self._sorted[1][same[0] : same[0] + 2]
            raise ArtifactError(f"items {first} and {second} share the semantic ID {codes[first].tolist()}")

    def __len__(self) -> int:
        return len(self.codes)

    @cached_property
    def _sorted(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Packed IDs in ascending order, and the items they belong to."""
        keys = packed(self.codes, self.level_sizes)
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    @property
    def sorted_items(self) -> npt.NDArray[np.int64]:
        """Items in the lexical order of their IDs, [N]."""
        return self._sorted[1]

    @cached_property
    def unique_before(self) -> npt.NDArray[np.bool_]:
        """Which items' codes were unique without the collision level, [N]."""
        _, inverse, counts = np.unique(packed(self.codes[:, :-1]), return_inverse=True, return_counts=True)
        return counts[inverse] == 1

    def item_of(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Items [M] of semantic IDs [M, L+1]; -1 for an ID that no item has."""
        asked = np.asarray(codes).reshape(-1, self.codes.shape[1])
        possible = np.all((asked >= 0) & (asked < np.array(self.level_sizes)), axis=1)
        keys, order = self._sorted
        wanted = packed(np.where(possible[:, None], asked, 0), self.level_sizes)
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(possible & (keys[place] == wanted), order[place], -1)

    @classmethod
    def read(cls, folder: Folder) -> SemanticIds:
        table = folder.read_table("ids.parquet").combine_chunks()
        lists = table["codes"].combine_chunks()
        codes = np.asarray(lists.flatten()).reshape(len(lists), -1)
        items = np.asarray(table["item_id"])
        if not np.array_equal(items, np.arange(len(items))):
            raise ArtifactError(f"{folder.uri}/ids.parquet: item_id is not 0 .. {len(items) - 1} in order")
        return cls(codes, tuple(folder.read_json("levels.json")["level_sizes"]))

    def write(self, folder: Folder, source_ids: pa.ChunkedArray) -> None:
        """ids.parquet (item_id int32, source_id, codes int16 [L+1], unique bool) and levels.json."""
        width = self.codes.shape[1]
        folder.write_table(
            "ids.parquet",
            pa.table(
                {
                    "item_id": np.arange(len(self), dtype=np.int32),
                    "source_id": source_ids,
                    "codes": pa.FixedSizeListArray.from_arrays(pa.array(self.codes.ravel()), width),
                    "unique": self.unique_before,
                }
            ),
        )
        folder.write_json("levels.json", {"level_sizes": list(self.level_sizes)})


def assign(codes: npt.NDArray[np.integer], codebook_size: int, config: SemanticIdsConfig) -> SemanticIds:
    """Adds the collision level: 0, 1, 2, ... to the items of equal codes in the order of their item ids.

    Args:
        codes: [N, L], row = item_id, each in [0, codebook_size).

    Raises:
        DataError: more items share their codes than the level has codes; names the group and some of its items.
    """
    keys = packed(codes)
    order = np.argsort(keys, kind="stable")  # stable: in the order of item ids within a group
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(np.append(starts, len(codes)))
    largest = int(sizes.argmax())
    if sizes[largest] > config.collision_codes:
        group = order[starts[largest] : starts[largest] + sizes[largest]]
        raise DataError(
            f"{sizes[largest]:,} items share the codes {tuple(codes[group[0]].tolist())}, the collision level tells "
            f"{config.collision_codes} apart (semantic_ids.collision_codes); items {group[:5].tolist()} ... are among "
            "them: are their texts the same?"
        )
    position = np.arange(len(codes)) - np.repeat(starts, sizes)
    collision = np.empty(len(codes), np.int16)
    collision[order] = position
    unique = np.concatenate([codes.astype(np.int16), collision[:, None]], axis=1)
    return SemanticIds(unique, (codebook_size,) * codes.shape[1] + (config.collision_codes,))
