"""Search of titles: an inverted index of their words in flat arrays."""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import reduce

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_WORD = re.compile(r"[^\W_]+")
_SEPARATORS = r"[^\pL\pN]+"  # the same words, for Arrow

_LAST = "\U0010ffff"


class TitleIndex:
    """Finds items by words of their titles, in about a millisecond per 100,000 items.

    Memory is 8 bytes per word of a title, and the vocabulary.
    """

    def __init__(
        self,
        titles: list[str],
        popularity: npt.NDArray[np.int64],
        available: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Index the titles.

        Args:
            titles: [items].
            popularity: int64 [items]; of two items found, the more popular one comes first.
            available: bool [items], items that can be found; None: all.
        """
        self.popularity = popularity
        words = pc.split_pattern_regex(pc.utf8_lower(pa.array(titles, pa.large_string())), _SEPARATORS)
        encoded = words.flatten().dictionary_encode()
        vocabulary: list[str] = encoded.dictionary.to_pylist()
        order = np.argsort(np.array(vocabulary, object), kind="stable") if vocabulary else np.zeros(0, np.int64)
        rank = np.empty(len(vocabulary), np.int64)
        rank[order] = np.arange(len(vocabulary))
        width = max(len(titles), 1)
        codes = rank[np.asarray(encoded.indices)] if vocabulary else np.zeros(0, np.int64)
        pairs = np.unique(codes * width + np.asarray(pc.list_parent_indices(words)).astype(np.int64))
        if available is not None:
            pairs = pairs[available[pairs % width]]
        self._vocabulary = [vocabulary[code] for code in order]
        self._items = pairs % width
        self._starts = np.searchsorted(pairs // width, np.arange(len(vocabulary) + 1))

    def find(self, query: str, limit: int) -> list[int]:
        """Return at most `limit` items in whose titles every word of the query begins a word.

        Items with more whole words of the query come first, then the more popular ones.
        """
        words = list(dict.fromkeys(word.lower() for word in _WORD.findall(query)))
        if not words:
            return []
        found = reduce(np.intersect1d, [self._beginning_with(word) for word in words])
        whole = sum((np.isin(found, self._equal_to(word)).astype(np.int64) for word in words), np.zeros_like(found))
        order = np.lexsort((found, -self.popularity[found], -whole))[:limit]
        items: list[int] = found[order].tolist()
        return items

    def _beginning_with(self, word: str) -> npt.NDArray[np.int64]:
        first, last = bisect_left(self._vocabulary, word), bisect_left(self._vocabulary, word + _LAST)
        return np.unique(self._items[self._starts[first] : self._starts[last]])

    def _equal_to(self, word: str) -> npt.NDArray[np.int64]:
        first = bisect_left(self._vocabulary, word)
        last = first + (first < len(self._vocabulary) and self._vocabulary[first] == word)
        return self._items[self._starts[first] : self._starts[last]]
