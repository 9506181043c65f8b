"""The profile of a catalog: counts, missing values, quantiles. All of them are added up from parts of the catalog."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tiger.data.readers.merge import PIECE

_QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)

SKETCH = 1 << 20
"""Distinct values of a column that are counted exactly; more are estimated, with a standard error of 0.1 %."""


@dataclass(frozen=True)
class Quantiles:
    """All values of a distribution, with how often each occurs.

    Attributes:
        values: int64 [n] ascending.
        counts: int64 [n].
    """

    values: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, values: npt.NDArray[np.integer]) -> Quantiles:
        """Return the distribution of values."""
        distinct, counts = np.unique(values.astype(np.int64), return_counts=True)
        return cls(distinct, counts)

    @classmethod
    def together(cls, parts: Iterable[Quantiles]) -> Quantiles:
        """Add up distributions."""
        parts = list(parts)
        values, place = np.unique(np.concatenate([part.values for part in parts]), return_inverse=True)
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, place, np.concatenate([part.counts for part in parts]))
        return cls(values, counts)

    def record(self) -> dict[str, float]:
        """Return quantiles, interpolated linearly, and the mean."""
        ends, total = np.cumsum(self.counts), int(self.counts.sum())

        def quantile(q: float) -> float:
            position = (total - 1) * q
            below = int(position)
            around = self.values[np.searchsorted(ends, [below, min(below + 1, total - 1)], side="right")]
            return float(np.quantile(around, position - below))

        mean = int((self.values * self.counts).sum()) / total
        return {f"{q:.0%}": quantile(q) for q in _QUANTILES} | {"mean": round(mean, 2)}


@dataclass
class Distinct:
    """Counts distinct values by the smallest of their hashes (Bar-Yossef et al. 2002).

    Attributes:
        hashes: uint64, the smallest ones, ascending; all of them if there are at most `SKETCH`.
    """

    hashes: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    def add(self, hashes: npt.NDArray[np.uint64]) -> None:
        """Add the hashes of further values."""
        self.hashes = np.unique(np.concatenate([self.hashes, hashes]))[:SKETCH]

    @property
    def count(self) -> int:
        """Number of distinct values: exact up to `SKETCH`."""
        if len(self.hashes) < SKETCH:
            return len(self.hashes)
        return round((SKETCH - 1) / (int(self.hashes[-1]) / 2**64))


@dataclass
class ColumnCounts:
    """Missing and distinct values of every column of a table."""

    missing: dict[str, int] = field(default_factory=dict)
    distinct: dict[str, Distinct] = field(default_factory=dict)

    def add(self, other: ColumnCounts) -> None:
        """Add the counts of further rows."""
        for name, missing in other.missing.items():
            self.missing[name] = self.missing.get(name, 0) + missing
            self.distinct.setdefault(name, Distinct()).add(other.distinct[name].hashes)

    def record(self) -> dict[str, dict[str, int]]:
        """Return {column: {"missing": ..., "distinct": ...}}."""
        return {
            name: {"missing": missing, "distinct": self.distinct[name].count} for name, missing in self.missing.items()
        }


def count_columns(table: pa.Table) -> ColumnCounts:
    """Count the missing values (null, "" and []) and the distinct other values of every column."""
    counts = ColumnCounts()
    for name in table.column_names:
        missing, hashes = 0, []
        for begin in range(0, len(table), PIECE):
            present = _present(table[name].slice(begin, PIECE))
            missing += min(PIECE, len(table) - begin) - len(present)
            hashes.append(_hash_all(set(present)))
        counts.missing[name], counts.distinct[name] = missing, Distinct()
        counts.distinct[name].add(np.concatenate([np.empty(0, np.uint64), *hashes]))
    return counts


def _present(column: pa.ChunkedArray) -> list[str]:
    """Return the values that are not missing, as texts that are equal if the values are."""
    if pa.types.is_nested(column.type):
        given = [value for value in column.to_pylist() if value not in (None, [])]
        return [json.dumps(value, sort_keys=True, default=str) for value in given]
    column = column.drop_null()
    if pa.types.is_string(column.type):
        texts: list[str] = column.filter(pc.not_equal(column, "")).to_pylist()
        return texts
    return list(map(repr, column.to_pylist()))


def _hash_all(texts: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Return 64-bit hashes, equal in every process, unlike Python's `hash`."""
    return np.frombuffer(b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts), np.uint64)


def format_profile(profile: dict[str, Any]) -> str:
    """Return the profile as lines of text."""
    lines = [
        f"{profile['items']:,} items, {profile['users']:,} users, {profile['interactions']:,} interactions; "
        f"{profile['training_examples']:,} training examples, {profile['validation_users']:,} validation and "
        f"{profile['test_users']:,} test users"
    ]
    for name, figures in profile["columns"].items():
        lines.append(f"  {name:<16} {figures['distinct']:>9,} distinct {figures['missing']:>9,} missing")
    lines += [
        f"  {name}: " + ", ".join(f"{quantile} {value:g}" for quantile, value in profile[name].items())
        for name in ("text_characters", "history_length")
    ]
    lines.append("  dropped: " + ", ".join(f"{count:,} {what}" for what, count in profile["dropped"].items()))
    return "\n".join(lines)
