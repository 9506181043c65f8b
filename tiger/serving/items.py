"""What the service knows of the catalog's items: ids, titles, and the fields that requests filter by."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tiger.core.storage import Folder
from tiger.data.item_names import display_titles
from tiger.serving.schemas import Filters

_CATEGORY_COLUMNS = ("categories", "category", "category_leaf")
_PRICE_TEXT = r"(?P<number>\d[\d,]*\.?\d*)"

Indices = npt.NDArray[np.int64]


class Categories:
    """Items by category name; upper and lower case are not distinguished.

    Memory is 8 bytes per item and name.
    """

    def __init__(self, names: pa.Array, rows: Indices) -> None:
        """Index pairs of a name and an item, which may repeat."""
        encoded = pc.utf8_lower(names).dictionary_encode()
        self._code_of = {name: code for code, name in enumerate(encoded.dictionary.to_pylist())}
        codes = np.asarray(encoded.indices).astype(np.int64)
        pairs = np.unique(codes * (int(rows.max(initial=0)) + 1) + rows) if len(rows) else codes
        width = int(rows.max(initial=0)) + 1
        self._items = pairs % width
        self._starts = np.searchsorted(pairs // width, np.arange(len(self._code_of) + 1))

    def __len__(self) -> int:
        return len(self._code_of)

    def items(self, name: str) -> Indices:
        """Return the items of a category.

        Raises:
            KeyError: there is no such category; holds the names most like it.
        """
        code = self._code_of.get(name.lower())
        if code is None:
            raise KeyError(*difflib.get_close_matches(name.lower(), list(self._code_of), n=3))
        return self._items[self._starts[code] : self._starts[code + 1]]


class ItemTable:
    """Ids, titles, categories and prices of the items, row = item index.

    Attributes:
        source_ids: the catalog's own ids.
        titles: display titles, see `display_titles`.
        index: item index by id.
        prices: float64 [items], NaN without a price; None if the catalog has no prices.
        categories: None if the catalog has no categories.
    """

    def __init__(
        self,
        source_ids: list[str],
        titles: list[str],
        prices: npt.NDArray[np.float64] | None = None,
        category_columns: Sequence[pa.ChunkedArray] = (),
    ) -> None:
        self.source_ids, self.titles, self.prices = source_ids, titles, prices
        self.index = {name: item for item, name in enumerate(source_ids)}
        self._category_columns = category_columns
        self.categories = _index_categories(category_columns)

    @classmethod
    def read(cls, folder: Folder) -> ItemTable:
        """Read items.parquet of a catalog, without the descriptions; texts are streamed to save memory."""
        names: list[str] = []
        titles: list[str] = []
        kept: list[pa.RecordBatch] = []
        with folder.open_input("items.parquet") as source:
            file = pq.ParquetFile(source)
            columns = file.schema_arrow.names
            fields = [name for name in ("price", *_CATEGORY_COLUMNS) if name in columns]
            wanted = [name for name in ("source_id", "title", "text") if name in columns]
            for batch in file.iter_batches(columns=wanted + fields):
                names += batch["source_id"].to_pylist()
                titles += display_titles(pa.Table.from_batches([batch.select(wanted)])).to_pylist()
                kept.append(batch.select(fields))
        if not fields:
            return cls(names, titles)
        table = pa.Table.from_batches(kept)
        prices = parse_prices(table["price"]) if "price" in fields else None
        return cls(names, titles, prices, [table[name] for name in fields if name != "price"])

    def categories_of(self, item: int) -> list[str]:
        """Return the category names of an item as the catalog writes them, in order, without repetition."""
        return list(dict.fromkeys(name for column in self._category_columns for name in _names(column[item].as_py())))

    def allowed(self, filters: Filters, is_new: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | None:
        """Return which items pass the filters, bool [items]; None if none is set. Unknown ids are passed over.

        Args:
            filters: the filters.
            is_new: bool [items], items that training has not seen.

        Raises:
            ValueError: a filter asks for a field that the catalog does not have, or for an unknown category.
        """
        if filters == Filters():
            return None
        mask = np.ones(len(self.source_ids), bool) if filters.allow is None else self._mask(self._known(filters.allow))
        mask[self._known(filters.deny)] = False
        if filters.category is not None:
            mask &= self._mask(self._of_categories(filters.category))
        if filters.min_price is not None or filters.max_price is not None:
            if self.prices is None:
                raise ValueError("filters.min_price, max_price: the items of this catalog have no prices")
            low = -np.inf if filters.min_price is None else filters.min_price
            high = np.inf if filters.max_price is None else filters.max_price
            mask &= (self.prices >= low) & (self.prices <= high)  # false for NaN
        if filters.only_new:
            mask &= is_new
        return mask

    def unknown(self, filters: Filters) -> list[str]:
        """Return the ids in `allow` and `deny` that the catalog does not have, in order, without repetition."""
        return list(dict.fromkeys(name for name in [*(filters.allow or []), *filters.deny] if name not in self.index))

    def _known(self, names: list[str]) -> list[int]:
        return [self.index[name] for name in names if name in self.index]

    def _mask(self, items: Indices | list[int]) -> npt.NDArray[np.bool_]:
        mask = np.zeros(len(self.source_ids), bool)
        mask[items] = True
        return mask

    def _of_categories(self, names: str | list[str]) -> Indices:
        if self.categories is None:
            raise ValueError("filters.category: the items of this catalog have no categories")
        found = [np.zeros(0, np.int64)]
        for name in [names] if isinstance(names, str) else names:
            try:
                found.append(self.categories.items(name))
            except KeyError as error:
                hint = f"; similar: {', '.join(error.args)}" if error.args else ""
                raise ValueError(f"filters.category: no item is in {name!r}{hint}") from None
        return np.concatenate(found)


def parse_prices(column: pa.ChunkedArray) -> npt.NDArray[np.float64] | None:
    """Return prices float64 [items], NaN where there is none; of text, the first number; None if no item has one."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        number = pc.struct_field(pc.extract_regex(column, _PRICE_TEXT), "number")
        column = pc.replace_substring(number, ",", "")
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    values: npt.NDArray[np.float64] = column.cast(pa.float64()).to_numpy()
    return None if np.isnan(values).all() else values


def _index_categories(columns: Sequence[pa.ChunkedArray]) -> Categories | None:
    """Index the names of columns of text, lists, or lists of lists; None if there are none."""
    names, rows = [], []
    for column in columns:
        values, positions = column.combine_chunks(), np.arange(len(column))
        if isinstance(values, pa.ChunkedArray):
            values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], column.type)
        while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            positions = positions[np.asarray(pc.list_parent_indices(values))]
            values = pc.list_flatten(values)
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            there = np.asarray(pc.is_valid(values))
            names.append(values.drop_null().cast(pa.large_string()))  # together they may pass 2 GiB
            rows.append(positions[there])
    found = Categories(pa.concat_arrays(names), np.concatenate(rows).astype(np.int64)) if names else None
    return found if found else None


def _names(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for inner in value for name in _names(inner)]
    return [value] if isinstance(value, str) else []
