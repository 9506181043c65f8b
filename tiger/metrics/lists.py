"""Metrics of all users' lists together, from sums that add up over shards of users."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tiger.data.histories import most_popular

_SHOWN = "shown"
_ROWS_AT_ONCE = 1 << 20


class ListSums:
    """Sums over lists of recommendations: how often each item is shown, and what is wrong.

    Memory grows with the items that are shown, not with the catalog.

    Attributes:
        num_items: items of the catalog.
        cutoff: positions per list that count as shown.
        lists: number of lists.
        invalid: positions, of whole lists, with a value that is neither an item nor -1.
        invalid_top, filled, repeated: positions of the top `cutoff` with such a value, with any item, with an item that
            occurs before in the list.
    """

    def __init__(self, num_items: int, cutoff: int = 10) -> None:
        self.num_items, self.cutoff = num_items, cutoff
        self._items, self._counts = np.zeros(0, np.int32), np.zeros(0, np.int32)  # shown items, in their order
        self._more: list[pa.Table] = []  # counts that are not in these yet
        self.lists = self.invalid = self.invalid_top = self.filled = self.repeated = 0

    @classmethod
    def of(cls, items: npt.NDArray[np.integer], num_items: int, cutoff: int = 10) -> ListSums:
        """Return the sums of lists int64 [U, K], padded with -1."""
        sums = cls(num_items, cutoff)
        sums.add(sum_lists(items, num_items, cutoff))
        return sums

    def add(self, table: pa.Table) -> None:
        """Add the sums of further lists, as `sum_lists` returns them."""
        is_shown = pc.equal(table["name"], _SHOWN)
        self._more.append(table.filter(is_shown).select(["item", "count"]))
        if sum(map(len, self._more)) > max(_ROWS_AT_ONCE, len(self._items)):
            self._merge()
        for row in table.filter(pc.invert(is_shown)).to_pylist():
            setattr(self, row["name"], getattr(self, row["name"]) + row["count"])

    def _merge(self) -> None:
        items = np.concatenate([self._items, *(np.asarray(part["item"]) for part in self._more)])
        counts = np.concatenate([self._counts, *(np.asarray(part["count"]) for part in self._more)])
        self._items, place = np.unique(items, return_inverse=True)
        self._counts = np.bincount(place, counts, len(self._items)).astype(np.int32)
        self._more = []

    @property
    def distinct(self) -> int:
        """Number of items that are shown."""
        self._merge()
        return len(self._items)

    @property
    def shown(self) -> npt.NDArray[np.int32]:
        """Lists that show each item in their top `cutoff`, int32 [items]."""
        self._merge()
        shown = np.zeros(self.num_items, np.int32)
        shown[self._items] = self._counts
        return shown


def sum_lists(items: npt.NDArray[np.integer], num_items: int, cutoff: int = 10) -> pa.Table:
    """Return the sums of lists as rows (name, item, count); those of a shard are small, whatever the catalog's size.

    Args:
        items: [U, K], best first, padded with -1.
        num_items: items of the catalog.
        cutoff: positions per list that count as shown.
    """
    top = items[:, :cutoff]
    ordered = np.sort(top, axis=1)
    is_item = (top >= 0) & (top < num_items)
    shown, counts = np.unique(top[is_item], return_counts=True)
    values = {
        "lists": len(items),
        "invalid": int(((items >= num_items) | (items < -1)).sum()),
        "invalid_top": int(((top >= num_items) | (top < -1)).sum()),
        "repeated": int(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).sum()),
        "filled": int((top >= 0).sum()),
    }
    return pa.table(
        {
            "name": pa.array([*values, *[_SHOWN] * len(shown)]).dictionary_encode(),
            "item": np.concatenate([np.full(len(values), -1), shown]).astype(np.int32),
            "count": np.concatenate([[*values.values()], counts]).astype(np.int64),
        }
    )


ListMetric = Callable[[npt.NDArray[np.integer], npt.NDArray[np.integer]], float]
"""(lists that show each item [N], training interactions of each item [N]) -> value."""


def distinct_items(shown: npt.NDArray[np.integer], counts: npt.NDArray[np.integer]) -> float:
    """Return the number of items that any list shows."""
    return float((shown > 0).sum())


def coverage(shown: npt.NDArray[np.integer], counts: npt.NDArray[np.integer]) -> float:
    """Return the fraction of the catalog that any list shows."""
    return distinct_items(shown, counts) / len(counts)


def popular_item_fraction(shown: npt.NDArray[np.integer], counts: npt.NDArray[np.integer], share: float = 0.1) -> float:
    """Return the fraction of popular items in all lists.

    Args:
        shown: [N] lists that show each item.
        counts: [N] interactions of each item in training.
        share: fraction of the catalog that is considered popular; ties are broken by item id.
    """
    popular = most_popular(counts, max(1, round(share * len(counts))))
    total = int(shown.sum())
    return float(shown[popular].sum() / total) if total else float("nan")


LIST_METRICS: dict[str, ListMetric] = {
    "distinct_items": distinct_items,
    "coverage": coverage,
    "popular_item_fraction": popular_item_fraction,
}
"""Metrics of all users' lists together; a new one is a function and an entry."""
